"""log p under a head taken in blocks is log softmax of whole rows of logits, and so are its gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from luthier.core import head_logp as blocks
from luthier.core.head_logp import head_logp
from luthier.core.scores import Head

N, WIDTH, WORDS = 7, 5, 23
"""The last of six blocks of four is short."""
CASES = [(frozen, bias, scale) for frozen in (True, False) for bias in (True, False) for scale in (1.0, 0.3)]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 4)


def drawn(frozen: bool, bias: bool, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    torch.manual_seed(seed)
    hidden, weight, shift = (2 * torch.randn(s) for s in ((N, WIDTH), (WORDS, WIDTH), (WORDS,)))
    for t in (hidden,) if frozen else (hidden, weight, shift):
        t.requires_grad_()
    return hidden, weight, shift if bias else None, torch.randint(WORDS, (N,))


def usual(hidden, weight, bias, target, scale):
    return F.log_softmax(F.linear(hidden, weight, bias).float() * scale, -1)[torch.arange(len(target)), target]


def trained(*tensors):
    return [t for t in tensors if t is not None and t.requires_grad]


@pytest.mark.parametrize("frozen, bias, scale", CASES)
def test_values_and_gradients(frozen, bias, scale):
    *given, target = drawn(frozen, bias)
    along = torch.randn(N)
    found, wanted = (f(*given, target, scale) for f in (head_logp, usual))
    torch.testing.assert_close(found, wanted)
    for a, b in zip(*(torch.autograd.grad((v * along).sum(), trained(*given)) for v in (found, wanted))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(head_logp(*given, target, scale), wanted.detach())


def test_a_head_that_trains_under_a_frozen_body():
    hidden, weight, _, target = drawn(False, False)
    found, wanted = (torch.autograd.grad(f(hidden.detach(), weight, None, target, 1.0).sum(), weight)[0] for f in (head_logp, usual))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen, bias, scale", CASES)
def test_second_derivatives(frozen, bias, scale):
    *given, target = drawn(frozen, bias)
    curvature = []
    for f in (head_logp, usual):
        first = torch.autograd.grad(f(*given, target, scale).square().sum(), trained(*given), create_graph=True)
        curvature.append(torch.autograd.grad(sum(g.square().sum() for g in first), trained(*given)))
    for a, b in zip(*curvature):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("frozen", [True, False])
def test_autocast_makes_the_products_in_its_type(frozen):
    *given, target = drawn(frozen, True)
    exact = torch.autograd.grad(usual(*given, target, 1.0).sum(), trained(*given))
    errors = []
    for f in (head_logp, usual):
        with torch.autocast("cpu", torch.bfloat16):
            value = f(*given, target, 1.0)
        assert value.dtype == torch.float32
        found = torch.autograd.grad(value.sum(), trained(*given))
        assert all(g.dtype == torch.float32 for g in found)
        errors.append(max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact)))
    assert 1e-4 < errors[0] < 1.5 * errors[1] < 0.1


def test_no_more_than_a_block_of_logits_at_once(monkeypatch):
    sizes, plain = [], F.linear
    monkeypatch.setattr(F, "linear", lambda *given: sizes.append(len(given[1])) or plain(*given))
    *given, target = drawn(False, False)
    head_logp(*given, target).sum().backward()
    assert sizes == 2 * [4, 4, 4, 4, 4, 3]


def test_blocks_of_impossible_tokens_and_far_apart_logits():
    hidden, weight, bias, target = drawn(True, True)
    bias[:8], bias[10], bias[17] = -torch.inf, 300.0, -300.0
    target = target.clamp(min=8)
    found, wanted = (f(hidden, weight, bias, target, 1.0) for f in (head_logp, usual))
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(v.sum(), hidden)[0] for v in (found, wanted)), rtol=1e-4, atol=1e-5)


def test_who_looks_on_sees_rows_of_logits():
    head = Head(torch.nn.Linear(3, 4))
    assert head.linear and not Head(torch.nn.Linear(3, 4), softcap=2.0).linear
    handle = head.projection.register_forward_hook(lambda *_: None)
    assert not head.linear
    handle.remove()
    assert head.linear
