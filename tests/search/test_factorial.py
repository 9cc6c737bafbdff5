"""Effects of a full factorial against least squares, and what the search returns."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from scipy.stats import t as student

from luthier.core.context import Context
from luthier.errors import RecipeError
from luthier.search.factorial import Factorial, factorial

CHOICES = {"a": [0, 1], "b": ["x", "y", "z"], "c": [False, True]}


def table(values, order=2):
    return {tuple(e["level"].items()): e for e in factorial(CHOICES, values, order)}


def test_effects_are_least_squares_with_effect_coding():
    y = np.random.default_rng(0).normal(size=12)
    cells = list(itertools.product(range(2), range(3), range(2)))

    def code(i, n):  # sum-to-zero coding: the last level is minus the others
        return np.eye(n)[i, : n - 1] if i < n - 1 else -np.ones(n - 1)

    columns = [np.concatenate([[1.0], code(i, 2), code(j, 3), code(k, 2), np.outer(code(i, 2), code(j, 3)).ravel(), np.outer(code(i, 2), code(k, 2)).ravel(), np.outer(code(j, 3), code(k, 2)).ravel()]) for i, j, k in cells]
    fit = np.linalg.lstsq(np.array(columns), y, rcond=None)[0]
    found = table(y[None])
    assert found[("a", 0),]["effect"] == pytest.approx(fit[1])
    assert found[("b", "x"),]["effect"] == pytest.approx(fit[2]) and found[("b", "y"),]["effect"] == pytest.approx(fit[3])
    assert found[("b", "z"),]["effect"] == pytest.approx(-fit[2] - fit[3])
    assert found[("a", 0), ("b", "y")]["effect"] == pytest.approx(fit[6])
    assert found[("b", "x"), ("c", False)]["effect"] == pytest.approx(fit[8])
    assert found[("a", 0),]["low"] is None


def test_all_orders_explain_everything():
    y = np.random.default_rng(1).normal(size=12)
    shares = {tuple(e["level"]): e["share"] for e in factorial(CHOICES, y[None], order=3)}
    assert len(shares) == 7 and sum(shares.values()) == pytest.approx(1.0)
    assert not any(e["share"] for e in factorial(CHOICES, np.ones((2, 12))))


def test_intervals_are_over_replicates_and_what_these_share_cancels():
    rng = np.random.default_rng(2)
    y = rng.normal(size=(4, 12))
    own = np.array([row.reshape(2, 3, 2)[1].mean() - row.mean() for row in y])
    wanted = student.interval(0.95, 3, own.mean(), own.std(ddof=1) / 2)
    found = table(y)[("a", 1),]
    assert (found["low"], found["high"]) == pytest.approx(wanted)
    shifted = table(y + 100 * rng.normal(size=(4, 1)))[("a", 1),]
    assert shifted["low"] == pytest.approx(found["low"])


def trial(point):
    value = 2.0 * point["a"] + {"x": 0, "y": 1, "z": 0}[point["b"]] + 0.1 * point.get("train.seed", 0) * point["a"]
    return {"good": value, "lost": float(point["c"]), "task/nll": -value}


def test_the_search_tries_every_cell_with_every_seed_and_tells_what_matters(tmp_path):
    asked = []

    def counted(point):
        asked.append(tuple(point.values()))
        return trial(point)

    found = Factorial(score={"good": 1, "lost": -0.5}, seeds=[1, 2, 3]).search(CHOICES, counted, Context(folder=tmp_path))
    assert len(asked) == len(set(asked)) == 36 and len(found) == 12
    best = found[0]
    assert (best["a"], best["b"], best["c"]) == (1, "y", False) and "train.seed" not in best
    assert best["metrics"]["good"] == pytest.approx(3.2) == best["metrics"]["factorial/score"]
    scores = [p["metrics"]["factorial/score"] for p in found]
    assert scores == sorted(scores, reverse=True)
    effects = {tuple(e["level"].items()): e for e in best["effects"]}
    assert effects[("a", 1),]["effect"] == pytest.approx(1.1) and effects[("a", 1),]["low"] > 0
    assert effects[("c", True),]["effect"] == pytest.approx(-0.25)
    assert json.loads((tmp_path / "factorial.json").read_text())["effects"] == best["effects"]
    assert Factorial().search(CHOICES, trial)[0]["a"] == 1, "by the task's loss where nothing else is said"


def test_bad_input():
    with pytest.raises(RecipeError, match="Did you mean 'good'"):
        Factorial(score={"god": 1}).search(CHOICES, trial)
    with pytest.raises(RecipeError, match="more than search.limit"):
        Factorial(limit=11).search(CHOICES, trial)
    with pytest.raises(RecipeError, match=r"train\.seed"):
        Factorial(seeds=[1]).search({"train.seed": [1, 2]}, trial)
    with pytest.raises(RecipeError, match="twice"):
        Factorial(seeds=[1, 1])
    with pytest.raises(RecipeError, match="neither"):
        Factorial().search({"x": [1]}, lambda p: {"other": 1.0})
    for bad in ({"order": 0}, {"score": {}}):
        with pytest.raises(RecipeError, match=next(iter(bad))):
            Factorial(**bad)
