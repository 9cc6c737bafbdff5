"""GaLore: rank and span of every update, equality with full-rank descent, the release's Adam, exact resume."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from luthier.core.plugin import Group
from luthier.errors import RecipeError
from luthier.optimize.galore import GaLore, GaLoreAdamW, basis, galore, project


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (6, 6)])
@pytest.mark.parametrize("kind", ["std", "reverse_std", "left", "right", "full"])
def test_projection_keeps_the_leading_directions(shape, kind):
    torch.manual_seed(0)
    grad = torch.randn(shape)
    left, right = basis(grad, 3, kind)
    low, back = project(grad, left, right), galore(project(grad, left, right), left, right)
    u, s, vh = torch.linalg.svd(grad)
    torch.testing.assert_close(back, u[:, :3] @ torch.diag(s[:3]) @ vh[:3], atol=1e-5, rtol=1e-4)
    if kind == "std":
        assert low.shape == ((shape[0], 3) if shape[0] >= shape[1] else (3, shape[1]))
    for side in (left, right):
        if side is not None:
            torch.testing.assert_close(side.T @ side, torch.eye(3), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7)])
def test_full_rank_gradient_descent_is_not_changed_by_the_projection(shape):
    """Momentum-free: back(project(G)) = G, so any step length gives the plain SGD step."""
    torch.manual_seed(0)
    grad = torch.randn(shape)
    sides = basis(grad, 4)
    other = torch.randn(shape)
    if shape[0] < shape[1]:
        assert sides[0] is not None and sides[1] is None
    torch.testing.assert_close(galore(project(other, *sides), *sides), other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(10, 6), (6, 10)])
def test_every_update_has_the_rank_and_span_of_its_basis(shape):
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(shape))
    optimizer = GaLore(lr=0.1, rank=2, refresh=3).build([("layer.weight", param)])
    for step in range(7):
        before = param.detach().clone()
        param.grad = torch.randn(shape)
        grad = param.grad.clone()
        optimizer.step()
        update = param.detach() - before
        state = optimizer.state[param]
        p = state["right"] if shape[0] >= shape[1] else state["left"]
        kept = update @ p @ p.T if shape[0] >= shape[1] else p @ p.T @ update
        assert torch.linalg.matrix_rank(update, tol=1e-5) <= 2
        assert float((update - kept).norm()) < 1e-5
        if step % 3 == 0:
            u, _, vh = torch.linalg.svd(grad)
            want = vh[:2].T if shape[0] >= shape[1] else u[:, :2]
            torch.testing.assert_close(p @ p.T, want @ want.T, atol=1e-5, rtol=1e-4)


def test_vectors_and_embeddings_are_plain_adam():
    torch.manual_seed(0)
    names = ("norm.weight", "embed_tokens.weight")
    params = [nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(6, 4))]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer = GaLore(lr=0.1, rank=2, eps=0.0).build(zip(names, params))
    plain = torch.optim.AdamW(twins, lr=0.1, eps=0.0, weight_decay=0.0)
    for _ in range(4):
        for p, q in zip(params, twins):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        plain.step()
    for p, q in zip(params, twins):
        torch.testing.assert_close(p, q)


def test_one_projected_adam_step_by_hand():
    torch.manual_seed(0)
    w, g = torch.randn(6, 4), torch.randn(6, 4)
    param = nn.Parameter(w.clone())
    optimizer = GaLore(lr=0.1, rank=2, scale=0.25, eps=1e-3, weight_decay=0.01).build([("a.weight", param)])
    param.grad = g.clone()
    optimizer.step()
    _, _, vh = torch.linalg.svd(g)
    r = g @ vh[:2].T
    update = (0.1 * r) / ((0.001 * r**2).sqrt() + 1e-3) @ vh[:2] * 0.25
    wanted = w - 0.1 * (1 - 0.999) ** 0.5 / (1 - 0.9) * update
    torch.testing.assert_close(param.detach(), wanted * (1 - 0.1 * 0.01), atol=1e-5, rtol=1e-4)


def test_inactive_parameters_keep_their_count_and_basis():
    torch.manual_seed(0)
    one, two = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
    optimizer = GaLore(lr=0.1, rank=2, refresh=2).build([Group("body", {"a": one}), Group("body", {"b": two})])
    before = two.detach().clone()
    for _ in range(3):
        one.grad = torch.randn(4, 4)
        optimizer.step()
    assert torch.equal(two, before) and two not in optimizer.state
    assert optimizer.state[one]["step"] == 3


def test_reset_drops_moments_of_the_old_basis():
    torch.manual_seed(0)
    start = torch.randn(5, 3)
    grads = [torch.randn(5, 3) for _ in range(3)]
    param, fresh = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer = GaLore(lr=0.1, rank=2, refresh=2, moments="reset").build([("a", param)])
    for g in grads:
        last = param.detach().clone()
        param.grad = g.clone()
        optimizer.step()
    other = GaLore(lr=0.1, rank=2).build([("a", fresh)])
    with torch.no_grad():
        fresh.copy_(last)
    fresh.grad = grads[2].clone()
    other.step()
    torch.testing.assert_close(param, fresh)


def test_state_resumes_exactly_and_is_smaller():
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(40, 8))
    optimizer = GaLore(lr=0.1, rank=2, refresh=2).build([("a", param)])
    for _ in range(3):
        param.grad = torch.randn(40, 8)
        optimizer.step()
    assert sum(v.numel() for v in optimizer.state[param].values() if isinstance(v, torch.Tensor)) == 2 * 40 * 2 + 8 * 2
    twin = nn.Parameter(param.detach().clone())
    again = GaLore(lr=0.1, rank=2, refresh=2).build([("a", twin)])
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert isinstance(again, GaLoreAdamW) and again.param_groups[0]["names"] == ["a"]
    for _ in range(3):
        g = torch.randn(40, 8)
        for p, o in ((param, optimizer), (twin, again)):
            p.grad = g.clone()
            o.step()
    assert torch.equal(param, twin)


def test_bad_values():
    for bad in ({"rank": 0}, {"refresh": 0}, {"projection": "diag"}, {"lr": -1.0}, {"moments": "turn"}):
        with pytest.raises(RecipeError, match=next(iter(bad))):
            GaLore(**bad)
