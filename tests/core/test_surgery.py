"""Edits of optimizer state, checked against torch's own optimizers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from luthier.core.surgery import adam_change, edit_optimizer


def stepped(steps: int = 3, seed: int = 0, kind=torch.optim.AdamW, **options):
    torch.manual_seed(seed)
    param = nn.Parameter(torch.randn(6))
    optimizer = kind([param], lr=0.1, **options)
    for _ in range(steps):
        param.grad = torch.randn(6)
        optimizer.step()
    return param, optimizer


def test_an_entry_with_its_own_age_moves_like_an_adam_that_started_with_it():
    """Entry 2 is reset at step 3; from then on it must equal a fresh Adam that sees the same gradients."""
    param, optimizer = stepped(3, weight_decay=0.0)
    editor = edit_optimizer(optimizer)
    with torch.no_grad():
        param[2] = 0.5
    editor.seed(param, torch.tensor([2]))
    twin = nn.Parameter(torch.tensor([0.5]))
    fresh = torch.optim.AdamW([twin], lr=0.1, weight_decay=0.0)
    others = nn.Parameter(param.detach().clone())
    state = {k: v.clone() for k, v in optimizer.state[param].items() if k in ("exp_avg", "exp_avg_sq", "step")}
    plain = torch.optim.AdamW([others], lr=0.1, weight_decay=0.0)
    plain.state[others] = state
    for _ in range(4):
        grad = torch.randn(6)
        param.grad, twin.grad, others.grad = grad.clone(), grad[2:3].clone(), grad.clone()
        for one in (optimizer, fresh, plain):
            one.step()
        editor.correct(param)
        torch.testing.assert_close(param[2], twin[0])
    rest = torch.tensor([0, 1, 3, 4, 5])
    assert torch.equal(param[rest], others[rest])


def test_seeded_moments_of_a_constant_gradient_give_a_full_step():
    """m = g (1 - b1^a), v = g^2 (1 - b2^a) are what Adam holds after a steps of g: the next step is then lr * sign(g)."""
    param, optimizer = stepped(7, weight_decay=0.0, eps=0.0)
    editor, age, g = edit_optimizer(optimizer), 5.0, torch.tensor([0.3])
    editor.seed(param, torch.tensor([4]), g * (1 - 0.9**age), g**2 * (1 - 0.999**age), age)
    before = param[4].item()
    param.grad = torch.zeros(6)
    param.grad[4] = g[0]
    optimizer.step()
    editor.correct(param)
    assert param[4].item() == pytest.approx(before - 0.1, abs=1e-6)


def test_correct_acts_once_a_step_and_not_on_untouched_state():
    param, optimizer = stepped(2)
    editor = edit_optimizer(optimizer)
    before = param.detach().clone()
    editor.correct(param)
    assert torch.equal(param, before), "nothing was seeded"
    editor.seed(param, torch.tensor([0]))
    editor.correct(param)
    assert torch.equal(param, before), "no step was taken since"
    assert float(optimizer.state[param]["age"][0]) == 0.0
    param.grad = torch.randn(6)
    optimizer.step()
    editor.correct(param)
    once = param.detach().clone()
    editor.correct(param)
    assert torch.equal(param, once)
    assert optimizer.state[param]["age"].tolist() == [1.0] + [3.0] * 5


def test_ages_survive_a_checkpoint():
    param, optimizer = stepped(2)
    edit_optimizer(optimizer).seed(param, torch.tensor([1]), 0.1, 0.2, 4.0)
    other = nn.Parameter(param.detach().clone())
    again = torch.optim.AdamW([other], lr=0.1)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, o in ((param, optimizer), (other, again)):
        p.grad = torch.arange(6.0)
        o.step()
        edit_optimizer(o).correct(p)
    assert torch.equal(param, other)
    assert float(again.state[other]["age"][1]) == 5.0


def test_move_reset_clear_and_swap():
    param, optimizer = stepped(2)
    editor = edit_optimizer(optimizer)
    m = optimizer.state[param]["exp_avg"].clone()
    order = torch.tensor([5, 4, 3, 2, 1, 0])
    editor.move(param, order)
    assert torch.equal(optimizer.state[param]["exp_avg"], m[order])
    editor.clear(param, torch.tensor([0, 1]))
    assert not optimizer.state[param]["exp_avg"][:2].any() and not optimizer.state[param]["exp_avg_sq"][:2].any()
    assert editor.steps(param) == 2
    new = nn.Parameter(torch.zeros(3))
    editor.swap(param, new)
    assert optimizer.param_groups[0]["params"][0] is new and not editor.state(new)
    with pytest.raises(KeyError):
        editor.group(param)
    editor.reset([new])
    new.grad = torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(new.detach(), torch.full((3,), -0.1), atol=1e-6, rtol=0)


def test_sgd_momentum_of_seeded_entries_is_cleared():
    param, optimizer = stepped(3, kind=torch.optim.SGD, momentum=0.9)
    editor = edit_optimizer(optimizer)
    editor.seed(param, torch.tensor([3]), 1.0, 1.0, 2.0)
    buffer = optimizer.state[param]["momentum_buffer"]
    assert float(buffer[3]) == 0.0 and bool(buffer[:3].all())
    editor.correct(param)


def test_adam_change_is_adam():
    torch.manual_seed(1)
    grads = torch.randn(5, 4)
    param = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.Adam([param], lr=0.05, betas=(0.8, 0.95), eps=1e-6)
    for grad in grads:
        before = param.detach().clone()
        param.grad = grad.clone()
        optimizer.step()
    state = optimizer.state[param]
    change = adam_change(state["exp_avg"], state["exp_avg_sq"], torch.full((4,), 5.0), 0.05, (0.8, 0.95), 1e-6)
    torch.testing.assert_close(param.detach() - before, change)
