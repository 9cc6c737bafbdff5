"""SpIEL: exact supports, continuity of growth, candidates equal to dense autograd, ages, folding, both variants."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from luthier.adapt.spiel import (
    SparseConv1D,
    SparseLinear,
    Spiel,
    _plant,
    momentum_growth,
    reselection_rate,
    seeds,
    spiel,
)
from luthier.core.plugin import Step
from luthier.errors import RecipeError, TrainingError
from luthier.optimize.sm3 import SM3
from tests.adapt._rows import ROWS, context, llama


# the pure functions -----------------------------------------------------------------------------------------------------
def oracle(values, index, candidates, scores, rate):
    """The rule of the paper, in plain Python sets."""
    number = int(len(values) * rate)
    order = sorted(range(len(values)), key=lambda i: abs(values[i]))
    dropped = [index[i] for i in order[:number]]
    staying = set(index) - set(dropped)
    free = sorted((c for c in range(len(candidates)) if candidates[c] not in staying), key=lambda c: -scores[c])
    grown = [candidates[c] for c in free[:number]]
    new = [g for g in grown if g not in dropped]
    gone = [d for d in dropped if d not in grown][: len(new)]
    return (set(index) - set(gone)) | set(new)


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("number", [3, 10, 14])
def test_drop_and_grow_follow_the_rule(rate, number):
    rng = np.random.default_rng(int(rate * 10) + number)
    for _ in range(30):
        index = np.sort(rng.permutation(30)[:10])
        candidates = rng.permutation(30)[:number]
        values, scores = rng.normal(size=10), rng.random(number)
        changed, grown = spiel(*(torch.tensor(x) for x in (values, index, candidates, scores)), rate)
        new = torch.tensor(index)
        new[changed] = torch.tensor(candidates)[grown]
        assert set(new.tolist()) == oracle(values, index, candidates, scores, rate) and len(set(new.tolist())) == 10
        assert len(changed) == len(grown)


def test_seeds_are_adams_moments_of_the_mean_gradient():
    g = torch.tensor([[0.1, -2.0], [0.3, 1.0], [0.2, 0.5]])
    m, v = seeds(g.sum(0), g.square().sum(0), 3, (0.9, 0.99))
    torch.testing.assert_close(m, g.mean(0) * (1 - 0.9**3))
    torch.testing.assert_close(v, g.square().mean(0) * (1 - 0.99**3))


def test_rate_is_one_first_and_falls_to_zero():
    assert reselection_rate(5, 5, 400, 0.2) == 1.0
    assert reselection_rate(205, 5, 400, 0.2) == pytest.approx(0.2 * (1 - 205 / 400))
    assert reselection_rate(400, 5, 400, 0.2) == 0.0
    assert reselection_rate(200, 5, 400, 0.2, "cosine") == pytest.approx(0.1)


def test_momentum_growth_takes_the_largest_outer_products_outside_the_support():
    rows, columns, index = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 1.0, 5.0]), torch.tensor([5])
    found, scores = momentum_growth(rows, columns, index, 2)
    assert found.tolist() == [3, 2] and scores.tolist() == [6.0, 5.0]
    assert len(momentum_growth(rows, columns, torch.arange(6), 3)[0]) == 0


# the layer ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_equals_a_dense_delta_in_values_and_gradients(kind, bias):
    torch.manual_seed(0)
    layer = nn.Linear(5, 4, bias=bias) if kind == "linear" else Conv1D(4, 5)
    layer.requires_grad_(False)
    index = torch.tensor([0, 3, 7, 19])
    plain = copy.deepcopy(layer)
    _plant(layer, index)
    assert type(layer) is (SparseLinear if kind == "linear" else SparseConv1D)
    with torch.no_grad():
        layer.delta.copy_(torch.randn(4))
    seen = []
    layer.watch = seen.append
    x = torch.randn(2, 3, 5, requires_grad=True)
    dense = torch.zeros(20).index_add(0, index, layer.delta.detach()).view_as(plain.weight).requires_grad_()
    y = torch.randn(2, 3, 5)
    twin = x.detach().clone().requires_grad_()
    full = plain.weight + dense
    wanted = nn.functional.linear(twin, full if kind == "linear" else full.T, plain.bias)
    out = layer(x)
    torch.testing.assert_close(out, wanted)
    (out.square().sum()).backward()
    (wanted.square().sum()).backward()
    torch.testing.assert_close(x.grad, twin.grad)
    torch.testing.assert_close(layer.delta.grad, dense.grad.flatten()[index])
    torch.testing.assert_close(seen[0], dense.grad.flatten())
    copied = copy.deepcopy(layer)
    assert torch.equal(copied(y), layer(y)) and copied.delta is not layer.delta


# the method ---------------------------------------------------------------------------------------------------------------
def make(steps=60, optimizer=None, **fields):
    model = llama()
    method = Spiel(**{"density": 0.05, "every": 6, "collect": 2} | fields)
    ctx = context(model)
    ctx.clock.steps = steps
    parts = method.attach(model, ctx)
    params = [p for g in parts.groups for p in g.params.values()]
    return model, method, ctx, parts, optimizer(parts.groups) if optimizer else torch.optim.AdamW(params, lr=0.02, weight_decay=0.0)


def one(model, method, ctx, optimizer, number, skip=False):
    step = Step(number, 0, model, [], optimizer, skip=skip)
    model.train()
    method.before_step(step, ctx)
    (-model.score(model.collate(ROWS)).logp.mean()).backward()
    if not skip:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    method.after_step(step, ctx)
    model.eval()


def logits(model):
    with torch.no_grad():
        return model.network(input_ids=torch.tensor([ROWS[4]["ids"]])).logits


def test_supports_keep_their_size_and_pretrained_weights_stay():
    model, method, ctx, parts, optimizer = make()
    base = {n: m.weight.detach().clone() for n, m in method._layers.items()}
    sizes = {n: len(m.delta) for n, m in method._layers.items()}
    assert all(s == int(0.05 * base[n].numel()) for n, s in sizes.items())
    assert {p for p in model.network.parameters() if p.requires_grad} == {p for g in parts.groups for p in g.params.values()}
    moves = []
    for number in range(21):
        supports = {n: set(m.delta_index.tolist()) for n, m in method._layers.items()}
        one(model, method, ctx, optimizer, number)
        moves.append(sum(len(set(m.delta_index.tolist()) - supports[n]) for n, m in method._layers.items()))
        for n, m in method._layers.items():
            assert len(set(m.delta_index.tolist())) == sizes[n] and bool((m.delta_index.diff() > 0).all())
            assert torch.equal(m.weight, base[n])
    assert {i for i, x in enumerate(moves) if x} == {1, 7, 13, 19}, "after step A, then every S"
    share = [m / sum(sizes.values()) for m in (moves[1], moves[7])]
    assert share[0] > 0.5 and 0 < share[1] <= 0.2


def test_a_dropped_weight_is_pretrained_again_and_growth_is_continuous():
    """Only drops change the function: setting the dropped values to 0 beforehand gives the very same logits."""
    model, method, ctx, _, optimizer = make(rate=0.5)
    for number in range(7):
        one(model, method, ctx, optimizer, number)
    before = {n: (m.delta_index.clone(), m.delta.detach().clone()) for n, m in method._layers.items()}
    step = Step(7, 0, model, [], optimizer)
    model.train()
    method.before_step(step, ctx)
    (-model.score(model.collate(ROWS)).logp.mean()).backward()
    optimizer.zero_grad(set_to_none=True)
    method.after_step(SimpleNamespace(number=7, skip=True, optimizer=optimizer), ctx)
    model.eval()
    # a dropped step counts no gradient; with what was seen before the support has moved
    after = logits(model)
    for n, m in method._layers.items():
        old, values = before[n]
        kept = torch.isin(old, m.delta_index)
        new = ~torch.isin(m.delta_index, old)
        assert not m.delta[new].any()
        torch.testing.assert_close(m.delta[~new], values[kept])
    twin = copy.deepcopy(model)
    for n, m in twin.network.named_modules():
        if isinstance(m, SparseLinear):
            old, values = before[n]
            stays = torch.isin(old, method._layers[n].delta_index)
            m.delta_index.copy_(old)
            m.delta.data.copy_(torch.where(stays, values, torch.zeros_like(values)))
    assert torch.equal(logits(twin), after)


def test_candidates_are_autograds_top_k_and_their_sums():
    model, method, ctx, _, optimizer = make(collect=3)
    name = "model.layers.0.mlp.up_proj"
    dense = []
    for number in range(2):
        twin = copy.deepcopy(model)
        method_layers = {n: m for n, m in twin.network.named_modules() if isinstance(m, SparseLinear)}
        layer = method_layers[name]
        full = (layer.weight + torch.zeros(layer.weight.numel()).index_add(0, layer.delta_index, layer.delta.detach()).view_as(layer.weight)).requires_grad_()
        layer.forward = lambda x, full=full: nn.functional.linear(x, full)
        (-twin.score(twin.collate(ROWS)).logp.mean()).backward()
        dense.append(full.grad.flatten())
        one(model, method, ctx, optimizer, number)
    seen = method._candidates[name]
    k = len(method._layers[name].delta)
    assert set(seen.index.tolist()) == set(dense[0].abs().topk(k).indices.tolist())
    torch.testing.assert_close(seen.total, (dense[0] + dense[1])[seen.index], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(seen.squares, (dense[0] ** 2 + dense[1] ** 2)[seen.index], atol=1e-6, rtol=1e-4)
    assert seen.count == 2


def test_micro_batches_of_a_step_are_summed():
    whole, parts_ = make(), make()
    for made, cut in ((whole, [ROWS]), (parts_, [ROWS[:5], ROWS[5:]])):
        model, method, ctx, _, optimizer = made
        method.before_step(Step(0, 0, model, [], optimizer), ctx)
        model.train()
        for rows in cut:
            scores = model.score(model.collate(rows))
            (-scores.logp.sum() / 40).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.after_step(Step(0, 0, model, [], optimizer), ctx)
    a, b = whole[1]._candidates, parts_[1]._candidates
    for n in a:
        shared = torch.isin(a[n].index, b[n].index)
        other = torch.isin(b[n].index, a[n].index)
        torch.testing.assert_close(a[n].total[shared], b[n].total[other], atol=1e-6, rtol=1e-4)
        assert a[n].count == b[n].count == 1


def test_of_two_passes_the_last_one_counts():
    """A two-pass optimizer clears the gradients between its passes."""
    once, twice = make(), make()
    for made, passes in ((once, [0.1]), (twice, [3.0, 0.1])):
        model, method, ctx, _, optimizer = made
        method.before_step(Step(0, 0, model, [], optimizer), ctx)
        model.train()
        for scale in passes:
            optimizer.zero_grad(set_to_none=True)
            (-scale * model.score(model.collate(ROWS)).logp.mean()).backward()
        optimizer.step()
        method.after_step(Step(0, 0, model, [], optimizer), ctx)
    for name, seen in once[1]._candidates.items():
        torch.testing.assert_close(seen.total, twice[1]._candidates[name].total)


def test_without_reselection_it_is_plain_adam_on_the_support():
    model, method, ctx, _, optimizer = make(every=1000, collect=999)
    twin, other, *_ = make(every=1000, collect=999)
    plain = torch.optim.AdamW([m.delta for m in other._layers.values()], lr=0.02, weight_decay=0.0)
    for number in range(4):
        one(model, method, ctx, optimizer, number)
        (-twin.score(twin.collate(ROWS)).logp.mean()).backward()
        plain.step()
        plain.zero_grad()
    for n, m in method._layers.items():
        torch.testing.assert_close(m.delta, other._layers[n].delta)


def test_grown_entries_have_their_age_and_moments():
    model, method, ctx, _, optimizer = make()
    one(model, method, ctx, optimizer, 0)
    one(model, method, ctx, optimizer, 1)  # reselection with p = 1
    layer = method._layers["model.layers.0.mlp.up_proj"]
    state = optimizer.state[layer.delta]
    assert set(state["age"].tolist()) == {2.0} and float(state["step"]) == 2.0
    one(model, method, ctx, optimizer, 2)
    assert set(state["age"].tolist()) == {3.0}
    for number in range(3, 8):
        one(model, method, ctx, optimizer, number)  # the second reselection: ages now differ
    ages = state["age"].tolist()
    assert set(ages) == {2.0, 8.0}
    assert bool((state["exp_avg_sq"][state["age"] == 2.0] > 0).any())


def test_folding_gives_plain_layers_with_the_same_logits_and_is_undone_exactly():
    model, method, ctx, _, optimizer = make()
    for number in range(4):
        one(model, method, ctx, optimizer, number)
    before, names = logits(model), set(model.network.state_dict())
    weights = {n: m.weight.clone() for n, m in method._layers.items()}
    params = [m.delta for m in method._layers.values()]
    with method.folded(model):
        torch.testing.assert_close(logits(model), before)
        assert set(model.network.state_dict()) == set(llama().network.state_dict())
        assert all(type(m) is nn.Linear for m in method._layers.values())
    assert set(model.network.state_dict()) == names and torch.equal(logits(model), before)
    assert all(torch.equal(m.weight, weights[n]) for n, m in method._layers.items())
    assert all(a is m.delta for a, m in zip(params, method._layers.values()))
    pretrained = logits(llama())
    with method.disabled(model):
        assert torch.equal(logits(model), pretrained)


def test_the_ma_variant_grows_by_sm3():
    model, method, ctx, _, optimizer = make(variant="ma", optimizer=lambda g: SM3(lr=0.02).build(g))
    before = {n: m.delta_index.clone() for n, m in method._layers.items()}
    one(model, method, ctx, optimizer, 0)
    one(model, method, ctx, optimizer, 1)
    for n, m in method._layers.items():
        new = ~torch.isin(m.delta_index, before[n])
        assert new.any() and not m.delta[new].any() and len(set(m.delta_index.tolist())) == len(before[n])
        state = optimizer.state[m.delta]
        assert state["rows"].shape == (m.weight.shape[0],) and not state["momentum_buffer"][new].any()
        scores = torch.outer(state["rows"], state["columns"]).flatten()
        inactive = torch.ones(len(scores), dtype=torch.bool)
        inactive[before[n]] = False
        assert float(scores[m.delta_index[new]].min()) >= float(scores[inactive].topk(int(new.sum())).values.min()) - 1e-12
    one(model, method, ctx, optimizer, 2)
    with pytest.raises(TrainingError, match="sm3"):
        model, method, ctx, _, optimizer = make(variant="ma")
        one(model, method, ctx, optimizer, 0)
        one(model, method, ctx, optimizer, 1)


def test_refusals():
    assert "sm3" in Spiel(variant="ma").check(SimpleNamespace(optimize=[SimpleNamespace(method="adamw")]))
    assert Spiel().check(SimpleNamespace(optimize=[SimpleNamespace(method="adamw")])) is None
    for bad in ({"density": 0.0}, {"rate": 2.0}, {"every": 0}, {"variant": "dense"}, {"collect": 30}, {"schedule": "flat"}):
        with pytest.raises(RecipeError, match=next(iter(bad))):
            Spiel(**bad)
    with pytest.raises(RecipeError, match="density"):
        Spiel(density=1e-9).attach(llama())
    with pytest.raises(RecipeError, match="weights"):
        Spiel(weights=10**9).attach(llama())


def test_a_total_number_of_weights_is_spread_evenly():
    model, method, *_ = make(weights=400)
    shares = [len(m.delta) / m.weight.numel() for m in method._layers.values()]
    assert abs(sum(len(m.delta) for m in method._layers.values()) - 400) <= len(shares)
    assert max(shares) - min(shares) < 0.01 and not hasattr(model.network.lm_head, "delta")
