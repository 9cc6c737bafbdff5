"""Factorial experiments: every combination of some choices, and what each choice is worth (papers 7, 19 and 21)."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.catalog import register
from luthier.errors import RecipeError, nearest
from luthier.search import Searcher
from luthier.search._shared import Point, Space, once
from luthier.search.grid import USUAL

if TYPE_CHECKING:
    from luthier.core.context import Context


def factorial(choices: Mapping[str, SequenceOf[Any]], values: Any, order: int = 2) -> list[dict[str, Any]]:
    """Main effects and interactions of a full factorial. `values` [replicates, cells] has the cells in the order of the choices' product.

    The effect of a level is the mean of its cells minus the mean of all; that of a combination of levels of two factors is what their
    mean differs from the sum of the grand mean and both main effects. `share` is the factor's part of the cells' sum of squares.
    `low`, `high`: a 95 % t-interval over replicates (each holds all cells, so that what they share cancels); None for a single one."""
    sizes = [len(v) for v in choices.values()]
    grid = np.asarray(values, float).reshape(-1, *sizes)
    total = float(((grid.mean(0) - grid.mean()) ** 2).sum())
    effects: dict[tuple[int, ...], np.ndarray] = {}
    out: list[dict[str, Any]] = []
    names = list(choices)
    factors = [f for f in range(len(sizes)) if sizes[f] > 1]
    for held in (c for k in range(order + 1) for c in itertools.combinations(factors, k)):
        away = tuple(1 + f for f in range(len(sizes)) if f not in held)
        effect = grid.mean(axis=away, keepdims=True)
        for part in itertools.chain.from_iterable(itertools.combinations(held, k) for k in range(len(held))):
            effect = effect - effects[part]
        effects[held] = effect
        if not held:
            continue
        repeats = grid[0].size // effect[0].size
        share = float((effect.mean(0) ** 2).sum()) * repeats / total if total > 0 else 0.0
        for cell in itertools.product(*(range(sizes[f]) for f in held)):
            at = dict(zip(held, cell))
            one = effect[(slice(None), *(at.get(f, 0) for f in range(len(sizes))))]
            low, high = interval(one)
            out.append({"level": {names[f]: list(choices[names[f]])[i] for f, i in at.items()}, "effect": float(one.mean()), "low": low, "high": high, "share": share})
    return out


def interval(values: np.ndarray) -> tuple[float | None, float | None]:
    """The 95 % t-interval of a mean; None for a single value."""
    from scipy.stats import t

    if len(values) < 2:
        return None, None
    half = float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)
    return float(values.mean()) - half, float(values.mean()) + half


def weighted_score(metrics: Mapping[str, float], weights: Mapping[str, float] | None) -> float:
    """The weighted sum that trials are compared by, more is better; without weights the task's loss a token, else its score."""
    known = ", ".join(sorted(metrics))
    if weights is None:
        usual = next((n for n in USUAL if n in metrics), None)
        if usual is None:
            raise RecipeError(f"The trials measure neither the task's loss nor its score; set search.score to metrics with weights out of: {known}.")
        weights = {usual: -1.0 if usual == USUAL[0] else 1.0}
    for name in weights:
        if metrics.get(name) is None:
            raise RecipeError(f"The trials do not measure '{name}'.{nearest(name, metrics)} They measure: {known}.")
    return float(sum(w * metrics[n] for n, w in weights.items()))


@register("factorial", paper=(7, 19, 21))
@dataclass
class Factorial(Searcher):
    """Try every combination, with several seeds, and say what each choice is worth: main effects and interactions, with intervals.

    For studies of a few switches, e.g. where in a network edits go and in what order, or batch by rate by schedule. Every cell runs with every seed
    of `seeds`. Points come back best first by the mean over seeds; the first carries `effects`, which are also written to
    factorial.json in the run's folder. Without several seeds there are no intervals, and an effect may be chance. What is compared is a weighted sum of metrics:
    LocFT-BF chooses a location by how well edits hold, how they carry over to rephrased prompts, and what else is kept (equal weights are ours)."""

    score: dict[str, float] | None = None
    """Metrics with their weights, negative where less is better; default: the task's loss a token, else its score."""
    seeds: list[int] = field(default_factory=list)
    """Values of train.seed that every cell runs with; empty: the recipe's own."""
    order: int = 2
    """1: main effects; 2: interactions of two choices as well; and so on."""
    limit: int = 64
    """More trials are refused."""

    def __post_init__(self) -> None:
        if self.order < 1:
            raise RecipeError(f"order is {self.order}; it must be at least 1, for main effects.")
        if len(set(self.seeds)) != len(self.seeds):
            raise RecipeError(f"seeds lists one seed twice: {self.seeds}.")
        if self.score is not None and not self.score:
            raise RecipeError("score names no metric; leave it out, or give metrics with weights such as {task/exact_match: 1}.")

    def search(self, space: Mapping[str, list[Any]], trial: Callable[[Point], Mapping[str, float]], ctx: Context | None = None) -> list[Point]:
        where, ask = Space(space), once(trial)
        if self.seeds and "train.seed" in space:
            raise RecipeError("The space lists train.seed, which search.seeds sets; keep one of the two.")
        number = where.size * max(1, len(self.seeds))
        if number > self.limit:
            raise RecipeError(f"{number} trials are more than search.limit {self.limit}; take fewer choices or seeds, or raise the limit.")
        runs: list[Point] = [{"train.seed": s} for s in self.seeds] or [{}]
        cells = where.all()
        metrics = [[ask({**cell, **run}) for cell in cells] for run in runs]
        values = np.array([[weighted_score(m, self.score) for m in line] for line in metrics])
        mean = values.mean(0)
        means = [{k: float(np.mean([line[i][k] for line in metrics])) for k in metrics[0][i] if all(line[i].get(k) is not None for line in metrics)} for i in range(len(cells))]
        best = sorted(range(len(cells)), key=lambda i: -mean[i])
        found: list[Point] = [{**cells[i], "metrics": {**means[i], "factorial/score": float(mean[i])}} for i in best]
        found[0]["effects"] = factorial(where.choices, values, self.order)
        if ctx is not None and ctx.folder is not None:
            table = {"score": self.score, "seeds": self.seeds, "cells": [{**cells[i], "values": values[:, i].tolist()} for i in best], "effects": found[0]["effects"]}
            (ctx.folder / "factorial.json").write_text(json.dumps(table, indent=1, default=str))
        return found
