"""Optimizers in one pass: the numbers of torch's own loops, whatever the tensors look like."""

from __future__ import annotations

import copy

import pytest
import torch

from luthier.core.one_pass import one_pass

KINDS = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.1, weight_decay=0.1),
    "adam": lambda params: torch.optim.Adam(params, lr=0.1, amsgrad=True),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1),
}


def parameters():
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in ((7, 5), (6,), (7, 5), (4, 4), ())]
    return [torch.nn.Parameter(t.t() if i == 2 else t) for i, t in enumerate(values)]


def walk(optimizer, params, steps=4):
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for i, p in enumerate(params):
            grad = torch.randn(p.shape, generator=generator)
            turned = grad.t().contiguous().t() if grad.ndim == 2 else grad  # another order in memory
            p.grad = None if (i, step) == (3, 1) else turned if step % 2 else grad
        optimizer.step()
    return [p.detach().clone() for p in params]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chosen", [(0, 1, 3, 4), (0, 1, 2, 3, 4)], ids=["contiguous", "one is not"])
def test_the_numbers_are_those_of_torchs_loop(kind, chosen):
    ours, theirs = ([parameters()[i] for i in chosen] for _ in range(2))
    optimizer = one_pass(KINDS[kind](ours))
    torch.testing.assert_close(walk(optimizer, ours), walk(KINDS[kind](theirs), theirs), rtol=1e-5, atol=1e-6)
    assert [g["fused"] for g in optimizer.param_groups] == [len(chosen) == 4]


def test_torchs_own_one_pass_would_take_a_turned_gradient_for_another():
    """The reason why tensors are looked at first; once torch does so, this file may go."""
    ours, theirs = (torch.nn.Parameter(torch.zeros(3, 2)) for _ in range(2))
    grad = torch.arange(6.0).reshape(2, 3).t()
    for p, fused in ((ours, True), (theirs, False)):
        p.grad = grad
        torch.optim.SGD([p], lr=1.0, fused=fused).step()
    assert not torch.equal(ours, theirs)


def test_a_state_is_taken_over_between_both():
    torch.manual_seed(0)
    ours, theirs = parameters()[:2], parameters()[:2]
    first = KINDS["adamw"](theirs)
    walk(first, theirs)
    second = one_pass(KINDS["adamw"](ours))
    for p, q in zip(ours, theirs):
        p.data.copy_(q.data)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    torch.testing.assert_close(walk(second, ours), walk(first, theirs), rtol=1e-5, atol=1e-6)
    assert second.param_groups[0]["fused"]


def test_others_and_what_was_asked_for_stay_as_they_are():
    for optimizer in (torch.optim.Adagrad(parameters(), lr=0.1), torch.optim.AdamW(parameters(), lr=0.1, foreach=True)):
        walk(one_pass(optimizer), list(optimizer.param_groups[0]["params"]), 1)
        assert not optimizer.param_groups[0].get("fused")
