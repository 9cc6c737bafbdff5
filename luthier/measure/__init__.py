"""The axis `measure`: what is known about the result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from luthier.core.plugin import Plugin

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@dataclass
class Measures:
    """Numbers with names, and what the report draws from."""

    numbers: dict[str, float | None] = field(default_factory=dict)
    """Missing is None, never 0."""
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    plots: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """Sentences for a reader."""
    better: dict[str, str] = field(default_factory=dict)
    """For a number: "higher" or "lower"."""


@dataclass(kw_only=True)
class Measure(Plugin):
    """`measure` a model on rows; `every` k steps as well, if it is positive."""

    every: int = 0
    """Measure also during training, every so many steps; 0: only before and after."""
    compares: ClassVar[bool] = False
    """It compares the tuned model with the one before (`ctx.model("base")`), so it is not run on the base itself."""

    def measure(self, model: Family, rows: Any, ctx: Context | None = None) -> Measures:
        """`rows` are the test rows; others come from `ctx.rows(name)`."""
        raise NotImplementedError
