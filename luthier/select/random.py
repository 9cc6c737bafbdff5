"""Rows drawn by chance: what every selector is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.catalog import register
from luthier.errors import DataError
from luthier.select import Picks, Selector, budget_of, column
from luthier.select._shared import count, generator, spread

if TYPE_CHECKING:
    from luthier.core.context import Context


def random(n: int, budget: int, rng: np.random.Generator, groups: Any = None) -> np.ndarray:
    """`budget` of `n` indices without replacement; with `groups`, as many of each as its share says (largest remainders)."""
    if groups is None:
        return rng.permutation(n)[:budget]
    names, number = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    take = spread(budget, np.bincount(number, minlength=len(names)))
    chosen = [rng.permutation(np.flatnonzero(number == g))[: take[g]] for g in range(len(names))]
    return rng.permutation(np.concatenate(chosen).astype(np.int64)) if chosen else np.zeros(0, np.int64)


@register("random")
@dataclass
class Random(Selector):
    """Draw rows by chance, the same ones for the same seed; optionally the same share of every group.

    The baseline of all selection: a selector that does not beat it at equal budget is not worth its cost."""

    by: str | None = None
    """Column whose values are drawn from in proportion; empty: from all rows alike."""

    def select(self, rows: Any, budget: int | float | str, ctx: Context | None = None) -> Picks:
        n = count(rows)
        groups = None
        if self.by is not None:
            groups = column(rows, self.by) if not isinstance(rows, dict) or self.by in rows else [None]
            if any(g is None for g in groups):
                raise DataError(f"random.by names the column '{self.by}', which row {groups.index(None)} lacks.")
        rng = generator(ctx, "random")
        picked = random(n, budget_of(budget, n), rng, groups)
        return Picks(picked, groups=None if groups is None else np.asarray(groups, dtype=str), why={"drawn from": n})
