"""Synergy by hand, against scipy's paired interval, and on models."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ttest_rel

from luthier.core.context import Context
from luthier.errors import RecipeError
from luthier.measure.synergy import Synergy, synergy
from luthier.testing.toys import rows
from tests.helpers import tiny_llama

ROWS = rows(frozenset({"prompt", "completion"}), 5)


def test_by_hand():
    """Each parent knows half; the merge knows three quarters: more than their mean and than the better one."""
    told = synergy([1, 1, 1, 0], [[1, 1, 0, 0], [0, 0, 1, 0]])
    assert (told["merged"], told["expected"], told["best_parent"]) == (0.75, 0.375, 0.5)
    assert told["weak"] == 0.375 and told["strict"] == 0.25


def test_better_than_the_mean_is_not_better_than_both():
    told = synergy([1, 1, 0, 0], [[1, 1, 1, 0], [0, 0, 0, 0]])
    assert told["weak"] > 0 > told["strict"]


def test_intervals_are_the_paired_ones():
    rng = np.random.default_rng(0)
    merged, parents = rng.random(30), rng.random((2, 30))
    told = synergy(merged, parents)
    best = parents[parents.mean(1).argmax()]
    for name, other in (("weak", parents.mean(0)), ("strict", best)):
        wanted = ttest_rel(merged, other).confidence_interval(0.95)
        assert (told[f"{name}_low"], told[f"{name}_high"]) == pytest.approx((wanted.low, wanted.high))
    assert synergy([1.0], [[0.0], [1.0]])["weak_low"] is None


def test_a_model_merged_of_itself_has_none():
    family = tiny_llama()
    ctx = Context(family, streams={"general": ROWS[:2]}, models={"general": family.frozen_copy(), "domain": family.frozen_copy()})  # type: ignore[dict-item]
    out = Synergy(max_new_tokens=3).measure(family, ROWS, ctx)
    assert out.numbers["weak"] == out.numbers["strict"] == out.numbers["general_weak"] == 0
    assert out.numbers["general"] == out.numbers["domain"] == out.numbers["merged"]


def test_bad_input():
    assert "models" in Synergy().measure(tiny_llama(), ROWS, Context()).notes[0]
    with pytest.raises(RecipeError, match="parents"):
        Synergy(parents=["a", "a"])
    with pytest.raises(RecipeError, match="limit"):
        Synergy(limit=0)
    with pytest.raises(RecipeError, match="verifier"):
        Synergy(verify="nonsense")
    assert Synergy(parents=["base", "mine"]).needs == {"generation", "base", "model:mine"}
