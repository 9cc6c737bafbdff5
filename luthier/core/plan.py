"""What a training loop is given, and what it reports."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from luthier.core.plugin import Plugin

if TYPE_CHECKING:
    from luthier.core.families import Family
    from luthier.recipe import Train


@dataclass
class Plan:
    """What one stage trains with. `objectives` carry their weights; the order of `plugins` is the order of axes."""

    model: Family
    rows: Any
    objectives: list[tuple[Any, float]]
    optimizer: Any
    adapters: list[Any] = field(default_factory=list)
    selector: Any = None
    others: list[Any] = field(default_factory=list)
    """Compressors and measures that take part in the life cycle."""
    measures: list[Any] = field(default_factory=list)
    """Measures with `every` > 0."""

    @property
    def plugins(self) -> list[Plugin]:
        """In the order in which hooks are called: select, adapt, objective, optimize, then the rest."""
        first = [self.selector] if self.selector is not None else []
        return [*first, *self.adapters, *(o for o, _ in self.objectives), self.optimizer, *self.others]


@dataclass
class Outcome:
    """What a finished loop reports."""

    steps: int
    seconds: float
    tokens: int
    reason: str
    losses: dict[str, float] = field(default_factory=dict)
    peak_memory: int = 0
    trained: int = 0
    """Trained parameters."""


def rate(train: Train, step: int, steps: int) -> float:
    """The learning rate's share of its peak: linear warm-up, then the schedule. A function of the step alone."""
    warm = train.warmup if train.warmup >= 1 else math.ceil(train.warmup * steps)
    if step < warm:
        return (step + 1) / warm
    t = (step - warm) / max(1, steps - warm)
    return {"constant": 1.0, "linear": 1 - t, "cosine": (1 + math.cos(math.pi * t)) / 2}[train.schedule]
