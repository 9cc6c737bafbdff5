import numpy as np
import pytest
import torch

from luthier.errors import RecipeError
from luthier.search._shared import Space, knee, pareto
from luthier.search.autopeft import AutoPEFT, autopeft, copula
from luthier.search.grid import Grid, grid

SPACE = {"rank": [0, 1, 2, 4, 8], "prefix": [0, 2, 4], **{f"layer{i}": [False, True] for i in range(3)}}


def trial(point):
    layers = sum(point[f"layer{i}"] for i in range(3))
    size = (point["rank"] * 10 + point["prefix"]) * layers
    score = 1 - np.exp(-size / 40) + 0.2 * point["layer2"] * (size > 0)
    return {"score": float(score), "parameters": float(size)}


def test_pareto_agrees_with_botorch():
    from botorch.utils.multi_objective.pareto import is_non_dominated

    values = np.random.default_rng(0).integers(0, 6, size=(60, 2)).astype(float)
    wanted = is_non_dominated(torch.tensor(values), deduplicate=False).numpy()
    assert np.array_equal(pareto(values), wanted)


def test_the_front_is_of_what_was_tried_and_nothing_is_tried_twice():
    seen = []

    def counted(point):
        seen.append(tuple(point.values()))
        return trial(point)

    found = AutoPEFT(trials=14, initial=8, batch=3).search(SPACE, counted)
    assert len(seen) == len(set(seen)) == 14
    values = np.array([[p["metrics"]["score"], -p["metrics"]["parameters"]] for p in found])
    assert pareto(values).all()
    every = np.array([[trial(dict(zip(SPACE, p)))[n] * s for n, s in (("score", 1), ("parameters", -1))] for p in seen])
    assert pareto(every).sum() >= len({tuple(v) for v in values})


def test_bayesian_choices_beat_the_random_ones_on_an_easy_function():
    levels = [np.linspace(0, 1, 11)] * 3
    codes = np.random.default_rng(0).integers(0, 11, (12, 3)) / 10
    values = -((codes - 0.7) ** 2).sum(1, keepdims=True)
    for _ in range(3):
        new = autopeft(codes, values, levels, q=4)
        codes = np.vstack([codes, new])
        values = np.vstack([values, -((new - 0.7) ** 2).sum(1, keepdims=True)])
    assert values[12:].max() > values[:12].max()


def test_copula_keeps_the_order_and_the_reference_goes_through_it():
    v = np.random.default_rng(0).normal(size=(20, 2)) ** 3
    assert np.array_equal(np.argsort(copula(v), axis=0), np.argsort(v, axis=0)) and np.isfinite(copula(v)).all()


def test_budget_and_best():
    found = AutoPEFT(trials=20, initial=20, budget=40.0, recommend="best").search(SPACE, trial)
    assert all(p["metrics"]["parameters"] <= 40 for p in found)
    assert found[0]["metrics"]["score"] == max(p["metrics"]["score"] for p in found)


def test_absence_is_a_level_of_its_own_and_codes_come_back():
    space = Space({"size": [0, 1, 64], "on": [False, True], "kind": ["a", "b"]})
    for point in space.all():
        assert space.decode(space.encode(point)) == point
    assert space.encode({"size": 0, "on": False, "kind": "a"}).tolist() == [0, 0, 0]


def test_knee_is_on_the_front():
    v = np.array([[1.0, 0.0], [0.9, 0.9], [0.0, 1.0], [0.1, 0.1]])
    assert knee(v) == 1


def test_bad_input():
    with pytest.raises(RecipeError, match="Did you mean 'score'"):
        AutoPEFT(trials=2, initial=2, maximise=["scor"]).search(SPACE, trial)
    with pytest.raises(RecipeError, match="no choices"):
        Space({"x": []})
    with pytest.raises(RecipeError, match="more than search.limit"):
        Grid(metric="score", limit=3).search(SPACE, trial)


def test_grid_tries_all_and_sorts():
    found = Grid(metric="score", lower_is_better=False).search({"rank": [1, 4], "prefix": [0], "layer0": [True], "layer1": [True], "layer2": [False, True]}, trial)
    assert len(found) == 4 == len(grid({"a": [1, 2], "b": [3, 4]}))
    assert [p["metrics"]["score"] for p in found] == sorted((p["metrics"]["score"] for p in found), reverse=True)
