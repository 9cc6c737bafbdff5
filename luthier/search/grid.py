"""Try every point of a small space."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.catalog import register
from luthier.errors import RecipeError, nearest
from luthier.search import Searcher
from luthier.search._shared import Point, Space, once

if TYPE_CHECKING:
    from luthier.core.context import Context


USUAL = ("task/nll", "task/accuracy", "task/recall_at_1", "task/pair_accuracy", "task/score")
"""What tells how well a task is done: a loss, else a score."""


def grid(space: Mapping[str, list[Any]]) -> list[Point]:
    """All points of a space, in order."""
    return Space(space).all()


@register("grid")
@dataclass
class Grid(Searcher):
    """Try every combination and return them by their metric, the best first.

    For spaces of a few dozen points; larger ones are refused. Score on validation rows, never on test rows."""

    metric: str | None = None
    """What is compared; empty: the task's loss a token, else its score."""
    lower_is_better: bool = True
    """Whether small values of a `metric` that is given are good."""
    limit: int = 64
    """A larger space is refused."""

    def search(self, space: Mapping[str, list[Any]], trial: Callable[[Point], Mapping[str, float]], ctx: Context | None = None) -> list[Point]:
        where, ask = Space(space), once(trial)
        if where.size > self.limit:
            raise RecipeError(f"A grid of {where.size} points is more than search.limit {self.limit}; take fewer choices or another search, e.g. autopeft.")
        found = []
        for point in where.all():
            metrics = ask(point)
            metric, sign = self._compared(metrics)
            found.append({**point, "metrics": dict(metrics)})
        return sorted(found, key=lambda p: p["metrics"][metric] * sign)

    def _compared(self, metrics: Mapping[str, float]) -> tuple[str, int]:
        """What trials are compared by, and 1 if less of it is better."""
        known = ", ".join(sorted(metrics))
        if self.metric is None:
            for name in USUAL:
                if name in metrics:
                    return name, 1 if name == USUAL[0] else -1
            raise RecipeError(f"The trials measure neither the task's loss nor its score; set search.metric to one of: {known}.")
        if self.metric not in metrics:
            raise RecipeError(f"The trials do not measure '{self.metric}'.{nearest(self.metric, metrics)} They measure: {known}.")
        return self.metric, 1 if self.lower_is_better else -1
