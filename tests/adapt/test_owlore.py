"""OwLore: the outlier ratio by hand, the draw, and layers that rest bit-identical."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from luthier.adapt.owlore import OwLore, outlier_ratio, owlore
from luthier.core.plugin import Step
from luthier.errors import RecipeError
from luthier.optimize.galore import GaLore
from tests.adapt._rows import ROWS, context, llama


def test_outlier_ratio_by_hand():
    """Scores |W| ||X||: 1, 1, 1, 9 | mean 3; above 2 x 3 is one of four."""
    w, x = torch.tensor([[1.0, -0.5], [1.0, 4.5]]), torch.tensor([1.0, 2.0])
    assert outlier_ratio([w], [x], 2.0) == 0.25
    assert outlier_ratio([w], [x], 3.0) == 0.0, "not above"
    small = torch.full((2, 2), 0.01)
    assert outlier_ratio([w, small], [x, torch.ones(2)], 2.0) == 1 / 8
    assert outlier_ratio([w, small], [x, torch.ones(2)], 2.0, "matrix") == 1 / 8
    lopsided = torch.tensor([[0.01, 0.01], [0.01, 0.09]])
    assert outlier_ratio([w, lopsided], [x, torch.ones(2)], 2.0, "matrix") == 2 / 8
    assert outlier_ratio([w * 7], [x * 3], 2.0) == 0.25, "scale does not matter"
    assert outlier_ratio([], [], 2.0) == 0.0


def test_probabilities():
    ratios = [0.1, 0.3, 0.6]
    np.testing.assert_allclose(owlore(ratios), [0.1, 0.3, 0.6], atol=1e-8)
    np.testing.assert_allclose(owlore(ratios, "owl-reverse"), [0.5 / 0.8, 0.3 / 0.8, 0], atol=1e-7)
    np.testing.assert_allclose(owlore(ratios, "increasing"), [1 / 6, 2 / 6, 3 / 6], atol=1e-8)
    np.testing.assert_allclose(owlore(ratios, "decreasing"), [3 / 6, 2 / 6, 1 / 6], atol=1e-8)
    for p in (owlore(ratios, "uniform"), owlore([0.2] * 3), owlore([0.0] * 3), owlore([0.2] * 3, "owl-reverse")):
        np.testing.assert_allclose(p, 1 / 3, atol=1e-8)
    for mode in ("owl", "owl-reverse"):
        p = owlore([0.0, 0.5, 0.0, 0.5], mode)
        assert p.min() > 0 and p.sum() == pytest.approx(1.0)
        assert len(set(np.random.default_rng(0).choice(4, 4, replace=False, p=p))) == 4, "any number can be drawn"


def test_layers_are_drawn_by_their_probability():
    p = owlore([1.0, 2.0, 3.0, 4.0])
    rng = np.random.default_rng(0)
    first = np.bincount([rng.choice(4, 1, replace=False, p=p)[0] for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(first, [0.1, 0.2, 0.3, 0.4], atol=0.03)


def run(method, model, steps, optimizer_of, ctx=None):
    ctx = ctx or context(model)
    parts = method.attach(model, ctx)
    optimizer = optimizer_of(parts.groups)
    history = []
    for number in range(steps):
        before = {n: p.detach().clone() for n, p in model.network.named_parameters()}
        method.before_step(Step(number, 0, model, parts.groups, optimizer), ctx)
        (-model.score(model.collate(ROWS[:6])).logp.mean()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        moved = {n for n, p in model.network.named_parameters() if not torch.equal(p, before[n])}
        active = {n for n, p in model.network.named_parameters() if p.requires_grad}
        assert moved == active
        history.append({int(n.split("layers.")[1].split(".")[0]) for n in moved if "layers." in n})
    return history, optimizer, parts


@pytest.mark.parametrize("always", [True, False])
def test_exactly_gamma_layers_train_between_draws(always):
    model = llama(layers=6)
    method = OwLore(active=2, every=3, samples=8, always=always)
    history, _, parts = run(method, model, 12, lambda g: torch.optim.AdamW([p for x in g for p in x.params.values()], lr=0.01, weight_decay=0.1))
    assert all(len(h) == 2 for h in history)
    assert all(history[i] == history[i - i % 3] for i in range(12)) and len({frozenset(h) for h in history}) > 1
    assert any("embed" in n for g in parts.groups for n in g.params) == always
    assert sum(method.probabilities) == pytest.approx(1.0)


@pytest.mark.parametrize("state", ["keep", "drop"])
def test_optimizer_state_of_resting_layers(state):
    model = llama(layers=6)
    method = OwLore(active=1, every=1, samples=4, state=state, mode="uniform")
    history, optimizer, parts = run(method, model, 8, lambda g: torch.optim.AdamW([p for x in g for p in x.params.values()], lr=0.01))
    held = {g.options["block"] for g in parts.groups if "block" in g.options for p in g.params.values() if p in optimizer.state}
    assert held == (set.union(*history) if state == "keep" else history[-1])


def test_composes_with_galore():
    model = llama(layers=4)
    method = OwLore(active=2, every=2, samples=4)
    _, optimizer, _ = run(method, model, 5, lambda g: GaLore(lr=0.01, rank=2, refresh=2).build(g))
    ranks = {s["exp_avg"].shape for p, s in optimizer.state.items() if (p.ndim == 2 and "right" in s) or "left" in s}
    assert ranks and all(2 in r for r in ranks)


def test_a_too_high_threshold_is_lowered_and_said():
    model = llama()
    ctx = context(model)
    method = OwLore(active=1, samples=8, threshold=500.0)
    method.attach(model, ctx)
    assert any("500" in n for n in ctx.notices) and max(method.scores) > 0
    quiet = context(llama())
    OwLore(active=1, samples=8, threshold=3.0).attach(llama(), quiet)
    assert not quiet.notices


def test_the_ratio_of_a_planted_outlier_layer_is_largest():
    model = llama(layers=4)
    with torch.no_grad():
        weight = model.network.model.layers[2].mlp.up_proj.weight
        weight.view(-1)[torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(0))[: weight.numel() // 40]] *= 60
    method = OwLore(active=1, samples=8, threshold=13.0)
    method.attach(model, context(model))
    assert int(np.argmax(method.scores)) == 2


def test_norm_mode_and_state_dict():
    model = llama(layers=3)
    method = OwLore(active=1, mode="norm")
    method.attach(model, context(model))
    wanted = [torch.cat([p.flatten() for n, p in model.network.named_parameters() if f"layers.{i}." in n and "proj" in n]).norm().item() for i in range(3)]
    np.testing.assert_allclose(method.probabilities, np.array(wanted) / sum(wanted), rtol=1e-4)
    other = OwLore(active=1, mode="norm")
    other.load_state_dict(method.state_dict())
    np.testing.assert_array_equal(other.probabilities, method.probabilities)


def test_bad_values():
    for bad in ({"active": 0}, {"every": 0}, {"mode": "random"}, {"pool": "row"}, {"state": "forget"}, {"threshold": 0.0}):
        with pytest.raises(RecipeError, match=next(iter(bad))):
            OwLore(**bad)
    with pytest.raises(RecipeError, match="2 layers"):
        OwLore(active=5).attach(llama(), context())
    with pytest.raises(RecipeError, match="calibration"):
        OwLore(active=1).attach(llama())
