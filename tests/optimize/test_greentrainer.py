"""GreenTrainer: its programme against brute force, its cost against what autograd spends, its trial step against arithmetic."""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from luthier.core.context import Context
from luthier.core.meters import BackwardCosts, Flops
from luthier.core.surgery import rewind
from luthier.errors import RecipeError
from luthier.optimize.greentrainer import GreenTrainer, backward_budget, cost, greentrainer, reachable
from tests.helpers import tiny_llama
from tests.objective.lm_batches import random_batch
from tests.optimize.fakes import FakeClosure

X, Y = torch.randn(16, 6, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 4


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 4))


def loss(network):
    logits = network(X)
    return F.cross_entropy(logits, Y), logits


@pytest.mark.parametrize("charge", ["exact", "release"])
@pytest.mark.parametrize("seed", range(12))
def test_the_optimum_is_that_of_brute_force(seed, charge):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 11))
    dw, dy, gain = rng.integers(0, 15, n), rng.integers(0, 15, n), np.round(rng.normal(0.3, 1, n), 3)
    budget = float(rng.integers(0, int(dw.sum() + dy.sum()) + 2))
    subsets = [list(s) for r in range(n + 1) for s in itertools.combinations(range(n), r)]
    best = max(sum(gain[s]) for s in subsets if cost(s, dw, dy, charge) <= budget)
    found = greentrainer(gain, dw, dy, budget, resolution=int(dw.sum() + dy.sum()) or 10, charge=charge)
    assert cost(found, dw, dy, charge) <= budget
    assert sum(gain[found]) == pytest.approx(best)
    assert all(gain[found] > 0)


def test_rounded_costs_never_break_the_budget():
    rng = np.random.default_rng(0)
    dw, dy, gain = rng.uniform(0, 9, 60), rng.uniform(0, 9, 60), rng.uniform(0, 1, 60)
    for budget in (0.0, 30.0, 200.0, 1e9):
        found = greentrainer(gain, dw, dy, budget, resolution=100)
        assert cost(found, dw, dy) <= budget
    assert found == list(range(60)), "without a bound all that helps"
    finer = [sum(gain[greentrainer(gain, dw, dy, 200.0, resolution=r)]) for r in (50, 5000)]
    assert finer[1] >= finer[0]


def test_a_trial_step_leaves_no_trace():
    network = net()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    for _ in range(2):
        loss(network)[0].backward()
        before = copy.deepcopy((network.state_dict(), optimizer.state_dict()))
        with rewind(optimizer) as weights:
            optimizer.step()
            assert all(not torch.equal(p, weights[p]) for p in network.parameters())
        for a, b in zip((network.state_dict(), optimizer.state_dict()), before):
            flat = [torch.utils._pytree.tree_leaves(x) for x in (a, b)]
            assert len(flat[0]) == len(flat[1])
            assert all(torch.equal(p, q) if isinstance(p, torch.Tensor) else p == q for p, q in zip(*flat))
        optimizer.step()
        optimizer.zero_grad()


def one_step(tuner, network, optimizer, ctx=None):
    for p in network.parameters():  # as the engine does before each step
        p.requires_grad_(True)
    return tuner.step(optimizer, FakeClosure(network, optimizer, loss), ctx)


@pytest.mark.parametrize(("forward", "share", "wanted"), [(20, 0.5, 90.0), (60, 0.25, 5.0), (60, 0.2, 10.0), (100, 0.2, 10.0)])
def test_the_budget_is_what_the_forward_pass_leaves_and_five_percent_where_it_leaves_nothing(forward, share, wanted):
    assert backward_budget(BackwardCosts(["a"], [150], [50], forward, 200, 0), share) == pytest.approx(wanted)


def test_only_tensors_within_reach_take_part_in_the_trial():
    """As in the release: the others are frozen in both of its passes, so the gradient after the step is that of a network that moved above alone."""
    network, twin = net(), net()
    tuner = GreenTrainer(lr=0.05, share=0.45, weight_decay=0.0)
    optimizer = tuner.build(network.named_parameters())
    one_step(tuner, network, optimizer)
    costs = tuner.costs
    near = reachable(costs, backward_budget(costs, 0.45))
    assert near == [n for k, n in enumerate(costs.names) if sum(costs.dy[:k]) <= backward_budget(costs, 0.45)] and 2 < len(near) < 8
    moving = {n: p for n, p in twin.named_parameters() if n in near}
    other = torch.optim.AdamW(moving.values(), lr=0.05, weight_decay=0.0)
    loss(twin)[0].backward()
    start = {n: p.detach().clone() for n, p in moving.items()}
    other.step()
    twin.zero_grad()
    loss(twin)[0].backward()
    by_hand = {n: float(-(p.grad * (p.detach() - start[n])).sum()) for n, p in moving.items()}
    largest = max(map(abs, by_hand.values()))
    assert tuner.importance == {n: pytest.approx(by_hand.get(n, 0.0) / largest, abs=1e-5) for n in costs.names}


def test_importance_is_the_predicted_fall_of_the_loss():
    network, twin = net(), net()
    tuner = GreenTrainer(lr=1e-3, share=1.0, weight_decay=0.0)
    optimizer = tuner.build(network.named_parameters())
    one_step(tuner, network, optimizer)
    other = torch.optim.AdamW(twin.parameters(), lr=1e-3, weight_decay=0.0)
    loss(twin)[0].backward()
    start = {n: p.detach().clone() for n, p in twin.named_parameters()}
    other.step()
    other.zero_grad()
    loss(twin)[0].backward()
    by_hand = {n: float(-(p.grad * (p.detach() - start[n])).sum()) for n, p in twin.named_parameters()}
    largest = max(map(abs, by_hand.values()))
    for name, value in by_hand.items():
        assert tuner.importance[name] == pytest.approx(value / largest, abs=1e-5)
    assert set(tuner.chosen) == {n for n, v in by_hand.items() if v > 0}, "all that helps, where the budget holds all"
    for (name, p), q in zip(network.named_parameters(), twin.parameters()):
        if name in tuner.chosen:
            assert torch.equal(p, q), "one real step was taken, not two"


@pytest.mark.parametrize("share", [0.45, 0.6, 0.8])
def test_a_step_costs_what_was_promised_and_the_rest_rests(share):
    network, ctx = net(), Context()
    tuner = GreenTrainer(lr=1e-2, share=share, every=3)
    optimizer = tuner.build(network.named_parameters())
    for number in range(7):
        before = {n: p.detach().clone() for n, p in network.named_parameters()}
        with Flops() as flops:
            one_step(tuner, network, optimizer, ctx)
        moved = {n for n, p in network.named_parameters() if not torch.equal(p, before[n])}
        assert moved == set(tuner.chosen) and moved
        if number % 3 == 0:
            costs = tuner.costs
            places = [costs.names.index(n) for n in tuner.chosen]
            price = costs.fixed + cost(places, costs.dw, costs.dy)
            assert cost(places, costs.dw, costs.dy) <= backward_budget(costs, share)
            logged = ctx.logged.pop("greentrainer/operations")
            assert logged == pytest.approx((costs.forward + price) / (costs.forward + costs.backward)) and logged <= share
        else:
            assert flops.backward == price and "greentrainer/operations" not in ctx.logged
    assert optimizer.state[network[6].weight]["step"] <= 7


def test_a_language_model_whose_head_trains():
    """Its logits are made in checkpointed chunks, and its head is tied to the embedding, the deepest tensor of all."""
    model, ctx, batch = tiny_llama(layers=3, tie_word_embeddings=True), Context(), random_batch()
    network = model.network.train()
    tuner = GreenTrainer(lr=1e-3, share=0.6)
    optimizer = tuner.build(network.named_parameters())
    tuner.step(optimizer, FakeClosure(network, optimizer, lambda _: (-model.score(batch).logp.mean(), None)), ctx)
    assert 0 < ctx.logged["greentrainer/operations"] <= 0.6 and tuner.chosen
    assert tuner.costs.names[-1] == "model.embed_tokens.weight"
    assert all((p.grad is None) and p.requires_grad == (n in tuner.chosen) for n, p in network.named_parameters())


def test_choices_follow_epochs_and_survive_a_checkpoint():
    network = net()
    tuner = GreenTrainer(lr=1e-2, share=0.6, interval=2)
    optimizer = tuner.build(network.named_parameters())
    choices = []
    for epoch in (0, 0, 1, 2, 3):
        tuner.before_step(SimpleNamespace(epoch=epoch), None)
        tuner.costs = None
        one_step(tuner, network, optimizer)
        choices.append(tuner.costs is not None)
    assert choices == [True, False, False, True, False]
    again = GreenTrainer(lr=1e-2, share=0.6, interval=2)
    again.load_state_dict(tuner.state_dict())
    again.before_step(SimpleNamespace(epoch=3), None)
    one_step(again, network, optimizer)
    assert again.costs is None and again.chosen == tuner.chosen


def test_nothing_fits_where_what_must_be_spent_is_over_the_budget():
    assert greentrainer([1.0, 1.0], [0.0, 0.0], [5.0, 0.0], -3.0) == [] == greentrainer([], [], [], 10.0)


@pytest.mark.parametrize("others", [0, 1])
def test_tensors_without_a_price_are_named(others):
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(others))
    network = nn.ModuleDict({"unused": nn.Linear(6, 6, bias=False), "layers": layers})
    tuner, ctx = GreenTrainer(lr=1e-2, share=1.0), Context()
    optimizer = tuner.build(network.named_parameters())

    def passed(_):
        out = X.clone().requires_grad_()
        for layer in layers:
            out = layer(out)
        return F.cross_entropy(out, Y), out

    closure = FakeClosure(network, optimizer, passed)
    if not others:
        with pytest.raises(RecipeError, match="cannot watch where 'unused.weight'"):
            tuner.step(optimizer, closure, ctx)
    else:
        tuner.step(optimizer, closure, ctx)
        assert tuner.chosen == ["layers.0.weight"] and any("1 of 2 tensors" in said for said in ctx.notices)


def test_bad_values():
    for bad in ({"lr": 0.0}, {"share": 0.0}, {"share": 1.5}, {"interval": 0}, {"every": 0}, {"resolution": 1}, {"charge": "free"}, {"weight_decay": -1.0}):
        with pytest.raises(RecipeError, match=next(iter(bad))):
            GreenTrainer(**bad)
