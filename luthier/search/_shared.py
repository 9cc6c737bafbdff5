"""What searches share: spaces of choices, their codes, Pareto sets."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np

from luthier.errors import RecipeError

Point = dict[str, Any]


class Space:
    """Recipe keys with their choices. A point is coded as one number a key in [0, 1]: the place of its choice in the list, so that
    absence (0, null, false) is a level of its own rather than a rounded size."""

    def __init__(self, choices: Mapping[str, SequenceOf[Any]]) -> None:
        self.choices = {k: list(v) for k, v in choices.items()}
        for key, values in self.choices.items():
            if not values:
                raise RecipeError(f"The search space's '{key}' has no choices.")
            if len({json.dumps(v, sort_keys=True) for v in values}) != len(values):
                raise RecipeError(f"The search space's '{key}' lists a choice twice.")

    @property
    def size(self) -> int:
        return int(np.prod([float(len(v)) for v in self.choices.values()]))

    def levels(self) -> list[np.ndarray]:
        """For each key the codes of its choices."""
        return [np.linspace(0, 1, len(v)) if len(v) > 1 else np.zeros(1) for v in self.choices.values()]

    def encode(self, point: Mapping[str, Any]) -> np.ndarray:
        return np.array([level[values.index(point[key])] for (key, values), level in zip(self.choices.items(), self.levels())])

    def decode(self, code: SequenceOf[float]) -> Point:
        return {key: values[int(np.abs(level - c).argmin())] for (key, values), level, c in zip(self.choices.items(), self.levels(), code)}

    def draw(self, rng: np.random.Generator) -> Point:
        return {k: v[int(rng.integers(len(v)))] for k, v in self.choices.items()}

    def all(self) -> list[Point]:
        return [dict(zip(self.choices, values)) for values in itertools.product(*self.choices.values())]


def once(trial: Callable[[Point], Mapping[str, float]]) -> Callable[[Point], Mapping[str, float]]:
    """The trial, never run twice for one point."""
    known: dict[str, Mapping[str, float]] = {}

    def cached(point: Point) -> Mapping[str, float]:
        key = json.dumps(point, sort_keys=True, default=str)
        if key not in known:
            known[key] = trial(dict(point))
        return known[key]

    return cached


def pareto(values: np.ndarray) -> np.ndarray:
    """Bool: no other row is at least as high in every column and higher in one."""
    v = np.asarray(values, float)
    at_least: Any = (v[None] >= v[:, None]).all(-1)
    higher: Any = (v[None] > v[:, None]).any(-1)
    return ~(at_least & higher).any(1)


def knee(values: np.ndarray) -> int:
    """The Pareto row nearest to the best of every column, columns scaled to [0, 1]."""
    v = np.asarray(values, float)
    span = np.where(np.ptp(v, axis=0) > 0, np.ptp(v, axis=0), 1)
    scaled = (v - v.min(0)) / span
    distance = np.linalg.norm(1 - scaled, axis=1)
    distance[~pareto(v)] = np.inf
    return int(distance.argmin())
