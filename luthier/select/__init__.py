"""The axis `select`: which rows are learned from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.core.plugin import Plugin
from luthier.errors import RecipeError

if TYPE_CHECKING:
    from luthier.core.context import Context


@dataclass
class Picks:
    """What a selector chose: row indices in its order of preference, and why."""

    indices: np.ndarray
    scores: np.ndarray | None = None
    """One score for every row of the pool (NaN where a row has none)."""
    weights: np.ndarray | None = None
    """One weight for every chosen row."""
    groups: np.ndarray | None = None
    """A group (cluster, skill ...) for every row of the pool."""
    why: dict[str, Any] = field(default_factory=dict)
    """Facts for the report: how many rows could never be chosen, cluster sizes ..."""

    def __post_init__(self) -> None:
        self.indices = np.asarray(self.indices, dtype=np.int64)
        if len(np.unique(self.indices)) != len(self.indices):
            raise ValueError("A selector chose a row twice.")


class Selector(Plugin):
    """Offline: `select`. Online: `pick` (before the backward pass), `batches` (composition). A selector gives at least one.

    `rounds` > 1 makes the stage a loop: select, tune, select again with the tuned model at hand (`ctx.model("round")`)."""

    rounds: int = 1

    def select(self, rows: Any, budget: int | float | str, ctx: Context | None = None) -> Picks:
        """Choose `budget` rows of `rows` (a count, a share such as 0.25, or "25%"). The input is not changed."""
        raise NotImplementedError


def budget_of(budget: int | float | str | None, n: int) -> int:
    """How many of `n` rows a budget means: 400, 0.25 or "25%"."""
    if budget is None:
        return n
    try:
        if isinstance(budget, str):
            share = float(budget.strip().removesuffix("%")) / (100 if budget.strip().endswith("%") else 1)
            number = share * n if budget.strip().endswith("%") else share
        else:
            number = budget * n if isinstance(budget, float) and 0 < budget <= 1 else float(budget)
    except ValueError:
        number = -1.0
    if not number >= 1 and not (n == 0 and number >= 0):
        raise RecipeError(f"The budget {budget!r} of {n} rows is no rows at all; give a count (400), a share (0.25) or '25%'.")
    return min(n, round(number))


def column(rows: Any, name: str, default: Any = None) -> list[Any]:
    """One column of rows, whether they are dicts or a dict of columns."""
    if isinstance(rows, Mapping):
        return list(rows[name])
    return [row.get(name, default) for row in rows]
