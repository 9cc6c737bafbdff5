"""SAM and ASAM: the perturbation's geometry, the gradient's place, exact restoration."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from luthier.catalog import method
from luthier.core.plugin import Group
from luthier.errors import RecipeError
from luthier.optimize.sam import SAM, sam
from tests.optimize.fakes import FakeClosure


def quadratic(network):
    """f(w) = 1/2 w^T H w has the gradient H w everywhere."""
    w = torch.cat([p.flatten() for p in network.parameters()])
    h = torch.diag(torch.linspace(0.5, 3.0, len(w)))
    return 0.5 * w @ h @ w, None


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))


def test_sam_moves_by_rho_along_the_gradient(network):
    params = list(network.parameters())
    grads = [torch.randn_like(p) for p in params]
    eps = sam(params, grads, 0.3)
    flat, g = torch.cat([e.flatten() for e in eps]), torch.cat([x.flatten() for x in grads])
    assert float(flat.norm()) == pytest.approx(0.3, rel=1e-5)
    torch.testing.assert_close(flat / flat.norm(), g / g.norm())


def test_asam_has_radius_rho_in_relative_weights_and_is_scale_invariant(network):
    params = [p.detach() for p in network.parameters()]
    grads = [torch.randn_like(p) for p in params]
    eps = sam(params, grads, 0.3, adaptive=True)
    relative = torch.cat([(e / p.abs()).flatten() for e, p in zip(eps, params)])
    assert float(relative.norm()) == pytest.approx(0.3, rel=1e-5)
    # Rescaling a tensor by c divides its gradient by c and leaves the function alone; eps must scale with the tensor.
    scaled = sam([params[0] * 4, *params[1:]], [grads[0] / 4, *grads[1:]], 0.3, adaptive=True)
    torch.testing.assert_close(scaled[0], eps[0] * 4)
    torch.testing.assert_close(scaled[1], eps[1])


def test_zero_weights_stay_in_the_adaptive_form_and_zero_gradients_are_safe():
    zero, one = torch.zeros(3), torch.ones(3)
    assert not sam([zero, one], [one, one], 0.5, adaptive=True)[0].any()
    assert all(torch.isfinite(e).all() and not e.any() for e in sam([one], [zero], 0.5))
    assert sam([], [], 0.5) == []


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_base_step_uses_the_gradient_at_the_perturbed_point(network, base, adaptive):
    twin = copy.deepcopy(network)
    tuner = SAM(lr=0.1, base=base, rho=0.2, adaptive=adaptive)
    optimizer = tuner.build(network.named_parameters())
    closure = FakeClosure(network, optimizer, quadratic)
    start = [p.detach().clone() for p in network.parameters()]
    tuner.step(optimizer, closure)
    eps = sam(start, torch.autograd.grad(quadratic(twin)[0], list(twin.parameters())), 0.2, adaptive)
    for got, w, e in zip(closure.calls[1]["weights"], start, eps):
        torch.testing.assert_close(got, w + e)
    # An independent step: analytic gradient of the quadratic at w + eps, by the same torch optimizer.
    flat = torch.cat([(w + e).flatten() for w, e in zip(start, eps)]) * torch.linspace(0.5, 3.0, sum(w.numel() for w in start))
    kind = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9) if base == "sgd" else torch.optim.AdamW(twin.parameters(), lr=0.1, weight_decay=0)
    for p, g in zip(twin.parameters(), flat.split([w.numel() for w in start])):
        p.grad = g.view_as(p).clone()
    kind.step()
    for p, q in zip(network.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q)
    assert closure.finished == 1 and all(p.grad is None for p in network.parameters())


def test_radius_zero_is_the_base_optimizer_bit_for_bit(network):
    twin = copy.deepcopy(network)
    tuner = SAM(lr=0.05, rho=0.0)
    optimizer = tuner.build(network.named_parameters())
    plain = torch.optim.AdamW(twin.parameters(), lr=0.05, weight_decay=0.0)
    for _ in range(3):
        tuner.step(optimizer, FakeClosure(network, optimizer, quadratic))
        plain.zero_grad()
        quadratic(twin)[0].backward()
        plain.step()
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), twin.parameters()))


def test_weights_are_restored_exactly_and_a_dropped_step_moves_nothing(network):
    tuner = SAM(lr=0.1, rho=0.3, adaptive=True)
    optimizer = tuner.build(network.named_parameters())
    start = [p.detach().clone() for p in network.parameters()]
    closure = FakeClosure(network, optimizer, quadratic)
    closure.go = False
    tuner.step(optimizer, closure)
    assert all(torch.equal(p, s) for p, s in zip(network.parameters(), start))


def test_inactive_parameters_are_left_out(network):
    groups = [Group("body", dict(network[0].named_parameters())), Group("head", dict(network[1].named_parameters()), lr_scale=0.5)]
    network[0].requires_grad_(False)
    tuner = SAM(lr=0.1)
    optimizer = tuner.build(groups)
    assert {g["role"] for g in optimizer.param_groups} == {"body", "head"} and "lr_scale" in optimizer.param_groups[0]
    before = network[0].weight.detach().clone()
    tuner.step(optimizer, FakeClosure(network, optimizer, lambda n: (n[1](torch.ones(1, 2)).sum(), None)))
    assert torch.equal(network[0].weight, before) and torch.equal(network[0].weight, before)
    assert network[1].weight.grad is None


def test_dropout_is_shared_by_both_passes():
    torch.manual_seed(3)
    network = nn.Sequential(nn.Linear(20, 20), nn.Dropout(0.5))
    seen = []

    def loss(n):
        out = n(torch.ones(2, 20))
        seen.append(out == 0)
        return out.sum(), None

    tuner = SAM(lr=0.1)
    optimizer = tuner.build(network.named_parameters())
    tuner.step(optimizer, FakeClosure(network, optimizer, loss))
    assert torch.equal(seen[0], seen[1])


def test_default_radius_and_bad_values():
    assert SAM().radius == 0.05 and SAM(adaptive=True).radius == 0.5
    assert method("optimize", "sam") is SAM
    for bad in ({"rho": -1.0}, {"lr": 0.0}, {"base": "adagrad"}):
        with pytest.raises(RecipeError, match=next(iter(bad))):
            SAM(**bad)
