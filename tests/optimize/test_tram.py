"""TRAM: its step is ASAM's with a measured radius; what each variant measures."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from luthier.core.closure import Closure
from luthier.core.context import Context
from luthier.core.scores import Head, TokenScores
from luthier.errors import RecipeError, TrainingError
from luthier.optimize.sam import SAM
from luthier.optimize.tram import TRAM, divergence, fisher_perturbation, tram
from tests.optimize.fakes import FakeClosure

X, Y = torch.randn(12, 5, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 4


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(5, 8), nn.Linear(8, 4)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, x):
        return self.head(torch.tanh(self.embed(x)))


def loss(network):
    logits = network(X)
    return F.cross_entropy(logits, Y), logits


def run(tuner, network, steps, ctx=None):
    optimizer = tuner.build(network.named_parameters(), ctx)
    closures = []
    for _ in range(steps):
        closures.append(FakeClosure(network, optimizer, loss))
        tuner.step(optimizer, closures[-1], ctx)
    return closures


def test_a_constant_distance_gives_asam_bit_for_bit():
    params = [p.detach() for p in Net().parameters()]
    grads = [torch.randn_like(p) for p in params]
    norm = torch.stack([(p.abs() * g).norm() for p, g in zip(params, grads)]).norm()
    for got, p, g in zip(tram(params, grads, 0.37), params, grads):
        torch.testing.assert_close(got, 0.37 * p**2 * g / norm)
    mine, other = Net(), Net()
    tuner = TRAM(lr=0.05, variant="base", betas=(0.9, 0.999))
    optimizer = tuner.build(mine.named_parameters())
    asam = SAM(lr=0.05, adaptive=True)
    asam_optimizer = asam.build(other.named_parameters())
    for _ in range(4):
        tuner.step(optimizer, FakeClosure(mine, optimizer, loss))
        asam.rho = tuner.distance
        asam.step(asam_optimizer, FakeClosure(other, asam_optimizer, loss))
    assert tuner.distance > 0
    assert all(torch.equal(p, q) for p, q in zip(mine.parameters(), other.parameters()))


@pytest.mark.parametrize("variant", ["previous", "base"])
def test_distance_is_the_kl_to_the_declared_earlier_weights(variant):
    network, tuner = Net(), TRAM(lr=0.05, variant=variant)
    optimizer = tuner.build(network.named_parameters())
    history = []
    for _ in range(4):
        history.append(copy.deepcopy(network))
        tuner.step(optimizer, FakeClosure(network, optimizer, loss))
        past = history[0] if variant == "base" or len(history) == 1 else history[-2]
        with torch.no_grad():
            p, q = F.log_softmax(past(X), -1), F.log_softmax(history[-1](X), -1)
        wanted = F.kl_div(q, p, log_target=True, reduction="batchmean").item()
        assert tuner.distance == pytest.approx(wanted, abs=1e-7)
        if len(history) == 1:
            assert tuner.distance == 0.0
    assert tuner.distance > 0


def test_the_first_step_of_previous_is_a_plain_step():
    network, twin = Net(), Net()
    run(TRAM(lr=0.05), network, 1)
    plain = torch.optim.AdamW(twin.parameters(), lr=0.05, betas=(0.9, 0.99), weight_decay=0.0)
    loss(twin)[0].backward()
    plain.step()
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), twin.parameters()))


def test_ema_lies_between_base_and_previous():
    for decay, variant in ((0.0, "previous"), (1.0, "base")):
        one, two = Net(), Net()
        run(TRAM(lr=0.05, variant="ema", decay=decay), one, 3)
        run(TRAM(lr=0.05, variant=variant), two, 3)
        assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))


@pytest.mark.parametrize("noise", ["normal", "uniform"])
def test_x_compares_with_noised_inputs_in_three_forwards(noise):
    network, tuner, ctx = Net(), TRAM(lr=0.05, variant="x", sigma=0.3, noise=noise), Context()
    start = copy.deepcopy(network)
    (closure,) = run(tuner, network, 1, ctx)
    assert [c["grad"] for c in closure.calls] == [True, False, True] and [c["edited"] for c in closure.calls] == [False, True, False]
    generator = Context().rng("tram")
    z = torch.randn(12, 8, generator=generator) if noise == "normal" else torch.rand(12, 8, generator=generator) * 2 - 1
    with torch.no_grad():
        noised = start.head(torch.tanh(start.embed(X) + 0.3 * z))
        wanted = F.kl_div(F.log_softmax(start(X), -1), F.log_softmax(noised, -1), log_target=True, reduction="batchmean")
    assert tuner.distance == pytest.approx(wanted.item(), rel=1e-5)
    assert ctx.logged["tram/distance"] == tuner.distance
    assert not start.embed._forward_hooks and not network.embed._forward_hooks


def test_no_noise_is_the_base_optimizer():
    one, two = Net(), Net()
    run(TRAM(lr=0.05, variant="x", sigma=0.0), one, 2)
    run(SAM(lr=0.05, betas=(0.9, 0.99), rho=0.0), two, 2)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))


def test_fisher_has_radius_gamma_in_its_metric_and_costs_two_passes():
    grads = [torch.randn(3, 4), torch.randn(5)]
    eps = fisher_perturbation([torch.ones(3, 4), torch.ones(5)], grads, gamma=0.2, eta=0.5)
    # eps^T F eps = gamma^2 in the damped metric F' = 1 + eta g^2.
    length = sum((e**2 * (1 + 0.5 * g**2)).sum() for e, g in zip(eps, grads)).sqrt()
    assert float(length) == pytest.approx(0.2, rel=1e-5)
    (closure,) = run(TRAM(lr=0.05, variant="fisher"), Net(), 1)
    assert [c["grad"] for c in closure.calls] == [True, True] and [c["edited"] for c in closure.calls] == [True, False]


def test_non_adaptive_form_perturbs_zero_weights():
    params, grads = [torch.zeros(3)], [torch.tensor([3.0, 0.0, 4.0])]
    assert not tram(params, grads, 1.0)[0].any()
    torch.testing.assert_close(tram(params, grads, 1.0, adaptive=False)[0], torch.tensor([0.6, 0.0, 0.8]))
    network, ctx = Net(), Context()
    nn.init.zeros_(network.head.weight)
    run(TRAM(lr=0.05, variant="base"), network, 1, ctx)
    assert any("adaptive" in n for n in ctx.notices)


def test_a_trained_head_is_read_at_the_reference_weights():
    """Token scores keep hidden states; the reference's logits need the reference's head, not the current one."""
    torch.manual_seed(0)
    head, old = nn.Linear(6, 9), torch.randn(9, 6)
    hidden, target = torch.randn(5, 6), torch.arange(5)
    scores = TokenScores(hidden, Head(head, softcap=4.0), target, torch.zeros(5, dtype=torch.long), 1)
    found = divergence(SimpleNamespace(scores=[scores]), SimpleNamespace(scores=[scores]), {id(head.weight): old})
    cap = lambda z: torch.tanh(z / 4.0) * 4.0  # noqa: E731
    p, q = (F.log_softmax(cap(F.linear(hidden, w, head.bias)), -1) for w in (old, head.weight))
    assert found == pytest.approx(F.kl_div(q, p, log_target=True, reduction="batchmean").item(), rel=1e-5)
    assert divergence(SimpleNamespace(scores=[scores]), SimpleNamespace(scores=[scores])) == 0.0
    assert divergence(SimpleNamespace(scores=[]), SimpleNamespace(scores=[])) == 0.0


def test_a_resumed_run_continues_exactly():
    whole, first = Net(), Net()
    run(TRAM(lr=0.05, variant="ema", decay=0.5), whole, 4)
    tuner = TRAM(lr=0.05, variant="ema", decay=0.5)
    optimizer = tuner.build(first.named_parameters())
    for _ in range(2):
        tuner.step(optimizer, FakeClosure(first, optimizer, loss))
    saved, state = copy.deepcopy(tuner.state_dict()), copy.deepcopy(optimizer.state_dict())
    second = copy.deepcopy(first)
    again = TRAM(lr=0.05, variant="ema", decay=0.5)
    optimizer = again.build(second.named_parameters())
    again.load_state_dict(saved)
    optimizer.load_state_dict(state)
    for _ in range(2):
        again.step(optimizer, FakeClosure(second, optimizer, loss))
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), second.parameters()))


def test_objectives_without_predictions_are_refused():
    network = Net()
    tuner = TRAM()
    optimizer = tuner.build(network.named_parameters())
    with pytest.raises(TrainingError, match="sam"):
        tuner.step(optimizer, FakeClosure(network, optimizer, lambda n: (n(X).sum(), None)))


def test_the_engines_closure_gives_what_is_needed():
    """The real closure, with a family that classifies."""
    network = Net()
    family = SimpleNamespace(network=network, base_network=network, score=None)
    family.classify = lambda batch: network(X)

    def passes(grad):
        value = F.cross_entropy(family.classify(None), Y)
        if grad:
            value.backward()
        return {"loss": float(value.detach())}

    class Fam:
        def __init__(self):
            self.network = self.base_network = network
            self.referring = False

        def score(self, batch):
            raise NotImplementedError

        def classify(self, batch):
            return network(X)

    model = Fam()
    family.classify = lambda batch: model.classify(batch)
    tuner = TRAM(lr=0.05, variant="base")
    optimizer = tuner.build(network.named_parameters())
    for _ in range(3):
        tuner.step(optimizer, Closure(model, optimizer, passes, lambda: None))
    assert tuner.distance > 0 and math.isfinite(tuner.distance)


def test_bad_values():
    for bad in ({"variant": "next"}, {"sigma": -1.0}, {"decay": 2.0}, {"scale": -1.0}, {"noise": "laplace"}):
        with pytest.raises(RecipeError, match=next(iter(bad))):
            TRAM(**bad)
