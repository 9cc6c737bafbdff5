"""PV-Tuning's two steps: what may move in each, the exact nearest code, and Adam with trust ratios elsewhere."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from luthier.core.plugin import Group
from luthier.core.quant import VectorQuant
from luthier.errors import RecipeError
from luthier.optimize.pv_tuning import PVTuning, pv_tuning


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def coded(count=1, **fields):
    """A coded matrix with a gradient, and the optimizer that holds it."""
    quant = VectorQuant.fit(normal(16, 12), group=4, size=6, count=count)
    weight = nn.Parameter(quant().detach().clone())
    groups = [Group("codes", {"layer.weight": weight}, options={"quantised": {"layer": quant}}), Group("codebook", {"c": quant.codebooks, "s": quant.scales})]
    weight.grad = normal(16, 12, seed=1)
    quant.chain(weight.grad)
    return quant, weight, PVTuning(**fields).build(groups)


@pytest.mark.parametrize("share", [0.01, 0.1, 1.0])
def test_the_v_step_changes_few_groups_to_their_nearest_codes_and_no_value(share):
    quant = VectorQuant.fit(normal(16, 12), group=4, size=6)
    before, books, scales = quant.codes.clone(), quant.codebooks.clone(), quant.scales.clone()
    now, reference = quant().detach(), normal(16, 12, seed=3)
    changed = pv_tuning(quant, reference, share)
    assert torch.equal(quant.codebooks, books) and torch.equal(quant.scales, scales)
    limit = math.ceil(share * quant.groups)
    moved = (quant.codes != before).any(0)
    assert int(moved.sum()) == changed <= limit
    far = (reference - now).reshape(-1, 4).norm(dim=1).topk(limit).indices
    assert set(moved.nonzero()[:, 0].tolist()) <= set(far.tolist())
    units = (reference / scales).detach().reshape(-1, 4)[far]
    assert torch.equal(quant.codes[0, far].long(), torch.cdist(units, books[0].detach()).argmin(1))


@pytest.mark.parametrize("trust", [0.5, 1e-6])
def test_the_trust_ratio_admits_the_farthest_groups_until_it_is_reached(trust):
    quant, free = (VectorQuant.fit(normal(16, 12), group=4, size=6) for _ in range(2))
    old, reference = quant().detach(), normal(16, 12, seed=3)
    changed = pv_tuning(quant, reference, 1.0, trust=trust)
    pv_tuning(free, reference, 1.0)
    order = (reference - old).reshape(-1, 4).norm(dim=1).argsort(descending=True)
    moves, total, admitted = (free().detach() - old).reshape(-1, 4).square().sum(1), 0.0, []
    for group in order.tolist():
        admitted.append(group)
        total += float(moves[group])
        if math.sqrt(total) >= trust * float(old.norm()):
            break
    wanted = VectorQuant.fit(normal(16, 12), group=4, size=6).codes
    wanted[:, admitted] = free.codes[:, admitted]
    assert torch.equal(quant.codes, wanted) and 0 < changed < quant.groups
    assert trust > 0.1 or changed == 1, "one may always change"


@pytest.mark.parametrize("temperature", [0.5, 2.0, 1e-3])
def test_groups_are_drawn_in_proportion_to_a_power_of_their_wanted_change(temperature):
    """How often each of 48 groups is the one that is drawn, of 2,000 draws; a low temperature takes the largest."""
    quant, reference = VectorQuant.fit(normal(16, 12), group=4, size=6), normal(16, 12, seed=3)
    start, generator, times = quant.codes.clone(), torch.Generator().manual_seed(0), torch.zeros(quant.groups)
    distance = (reference - quant()).detach().reshape(-1, 4).norm(dim=1)
    for _ in range(2000):
        quant.codes.copy_(start)
        pv_tuning(quant, reference, 1 / quant.groups, force=True, temperature=temperature, generator=generator)
        times += (quant.codes != start).any(0)
    assert float(times.sum()) == 2000
    expected = torch.softmax(distance.double().log() / temperature, 0)
    assert float((times / 2000 - expected).abs().max()) < 0.035  # three deviations of a share of a half


def test_several_codebooks_are_searched_in_an_order_that_is_drawn():
    found = set()
    for seed in range(8):
        quant = VectorQuant.fit(normal(16, 12), group=4, size=6, count=3)
        quant.recode(normal(16, 12, seed=3), torch.arange(quant.groups), 1, False, torch.Generator().manual_seed(seed))
        found.add(tuple(quant.codes.flatten().tolist()))
    assert len(found) > 1


def test_a_step_without_a_gradient_of_codes_is_a_p_step():
    quant, weight, optimizer = coded()
    weight.grad, codes, books = None, quant.codes.clone(), quant.codebooks.detach().clone()
    optimizer.step()
    assert torch.equal(quant.codes, codes) and not torch.equal(quant.codebooks, books)


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_weights_are_always_what_the_codes_say(decay):
    quant, weight, optimizer = coded(delta_decay=decay, code_lr=10.0, max_change=0.1)
    optimizer.step()
    assert torch.equal(weight, quant().detach()) and 0 < optimizer.changed <= math.ceil(0.1 * quant.groups)
    assert ("buffer" in optimizer.state[weight]) == (decay < 1)


def test_small_steps_change_codes_only_through_the_buffer():
    """The paper's starting point: rounding a small step gives back the codes; a buffer collects the steps."""
    flips = {}
    for decay in (0.0, 1.0):
        quant, weight, optimizer = coded(delta_decay=decay, code_lr=0.02, max_change=1.0, lr=1e-9)
        total = 0
        for _ in range(100):
            weight.grad = normal(16, 12, seed=1)
            optimizer.step()
            total += optimizer.changed
        flips[decay] = total
    assert flips[1.0] == 0 and flips[0.0] > 5
    quant, weight, optimizer = coded(delta_decay=1.0, code_lr=0.01, max_change=0.05, force=True)
    optimizer.step()
    assert optimizer.changed == math.ceil(0.05 * quant.groups)


def by_hand(start, grads, lr, one, two, eps=1e-6):
    """The release's update: Adam's without correction, made as long as the tensor; the correction then scales the step."""
    w, m, v = start.double(), torch.zeros_like(start).double(), torch.zeros_like(start).double()
    for t, g in enumerate(grads, 1):
        m, v = one * m + (1 - one) * g, two * v + (1 - two) * g.double().square()
        update = m / (v.sqrt() + eps)
        w = w - lr * math.sqrt(1 - two**t) / (1 - one**t) * w.norm() / update.norm() * update
    return w.float()


def test_a_step_is_as_long_as_the_release_says_from_the_first_on():
    start, grads = normal(5, 3), [normal(5, 3, seed=s) for s in (1, 2, 3)]
    param = nn.Parameter(start.clone())
    optimizer = PVTuning(lr=1e-2).build([("w", param)])
    for t, g in enumerate(grads, 1):
        param.grad = g.clone()
        optimizer.step()
        torch.testing.assert_close(param.detach(), by_hand(start, grads[:t], 1e-2, 0.9, 0.95))


@pytest.mark.parametrize("decay", [0.0, 0.25, 1.0])
def test_the_reference_is_the_buffer_or_the_old_matrix_and_its_own_step(decay, monkeypatch):
    """Trust ratios are the buffer's; where there is none the step is from the matrix before the codebooks moved."""
    seen = []
    monkeypatch.setattr("luthier.optimize.pv_tuning.pv_tuning", lambda q, reference, *rest: (seen.append(reference.clone()), pv_tuning(q, reference, *rest))[1])
    quant, weight, optimizer = coded(delta_decay=decay, code_lr=0.5, max_change=0.05, lr=0.1)
    grads, start, second = [normal(16, 12, seed=s) for s in (1, 2)], weight.detach().clone(), torch.zeros(16, 12)
    for t, g in enumerate(grads, 1):
        weight.grad = g.clone()
        quant.chain(weight.grad)
        second = 0.95 * second + 0.05 * g.square()
        update = g / (second.sqrt() + 1e-6)
        wanted = start - 0.5 * math.sqrt(1 - 0.95**t) * start.norm() / update.norm() * update
        optimizer.step()
        torch.testing.assert_close(seen[-1], wanted, atol=1e-5, rtol=1e-4)
        start = (1 - decay) * wanted + decay * weight.detach()


def test_forced_groups_take_the_best_codes_that_differ():
    """With several codebooks, too: a beam as wide as all combinations is brute force."""
    quant = VectorQuant.fit(normal(6, 8), group=4, size=3, count=2)
    before, books, reference = quant.codes.clone(), quant.codebooks.detach(), quant().detach()
    assert pv_tuning(quant, reference, 1.0, beam=9, force=True) == quant.groups
    units = (reference / quant.scales.detach()).reshape(-1, 4)
    for i, unit in enumerate(units):
        costs = {(a, b): float((unit - books[0, a] - books[1, b]).square().sum()) for a in range(3) for b in range(3) if [a, b] != before[:, i].tolist()}
        a, b = quant.codes[:, i].tolist()
        assert costs[a, b] == pytest.approx(min(costs.values()), abs=1e-6)


def test_the_plain_update_is_adam_times_the_trust_ratio():
    start, grads = normal(5, 3), [normal(5, 3, seed=s) for s in (1, 2)]
    mine, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    own, adam = PVTuning(lr=1e-2, lamb=False, eps=1e-12).build([("w", mine)]), torch.optim.Adam([theirs], lr=1e-2, betas=(0.9, 0.95), eps=1e-12)
    for g in grads:
        mine.grad, theirs.grad = g.clone(), g.clone()
        own.step()
        adam.step()
        torch.testing.assert_close(mine, theirs)
    nothing = nn.Parameter(torch.zeros(3))
    nothing.grad = torch.ones(3)
    PVTuning(lr=1e-2, eps=1e-12).build([("w", nothing)]).step()
    torch.testing.assert_close(nothing.detach(), torch.full((3,), -1e-2))


def test_bad_values_are_refused():
    for bad in ({"lr": 0.0}, {"code_lr": -1.0}, {"delta_decay": 1.5}, {"max_change": 0.0}, {"beam": 0}, {"trust": 0.0}, {"betas": (0.9, 1.0)}):
        with pytest.raises(RecipeError, match=next(iter(bad))):
            PVTuning(**bad)
