"""What a training loop is given, and what it reports."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from luthier.core.plugin import Plugin

if TYPE_CHECKING:
    from luthier.core.batch import Batch
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


class Micro(NamedTuple):
    """What passes through the model at once."""

    objectives: list[tuple[Any, float]]
    batch: Batch
    number: int
    """Which of the step's batches it is part of."""


@dataclass
class Learned:
    """How much a step learns from: the denominators of its losses, and what the journal tells."""

    passes: int = 0
    """The most micro-batches that any process has."""
    rows: int = 0
    tokens: int = 0
    totals: dict[int, dict[str, float]] = field(default_factory=dict)
    """For each of the step's batches its counts: tokens, rows and what objectives count besides."""

    def add(self, number: int, counts: Iterable[Mapping[str, float]]) -> None:
        mine = self.totals.setdefault(number, {})
        for part in counts:
            for name, value in part.items():
                mine[name] = mine.get(name, 0.0) + float(value)

    def counts(self, micro: Micro) -> dict[str, float]:
        """The denominators for one micro-batch: those of the whole batch it is part of; "batch" is its share in per-batch terms."""
        whole = self.totals.get(micro.number, {"row": 0.0})
        return {**whole, "batch": whole["row"] / max(micro.batch.counts()["row"], 1e-12)}

    @staticmethod
    def together(parts: list[Learned]) -> Learned:
        if len(parts) == 1:
            return parts[0]
        whole = Learned(max(p.passes for p in parts), sum(p.rows for p in parts), sum(p.tokens for p in parts))
        for part in parts:
            for number, counts in part.totals.items():
                whole.add(number, [counts])
        return whole


def rate(train: Train, step: int, steps: int) -> float:
    """The learning rate's share of its peak: linear warm-up, then the schedule. A function of the step alone."""
    warm = train.warmup if train.warmup >= 1 else math.ceil(train.warmup * steps)
    if step < warm:
        return (step + 1) / warm
    t = (step - warm) / max(1, steps - warm)
    return {"constant": 1.0, "linear": 1 - t, "cosine": (1 + math.cos(math.pi * t)) / 2}[train.schedule]
