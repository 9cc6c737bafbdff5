"""One row of the table: the work, who does it on both sides, the goal, and what it cannot cost less than."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from bench.flops import Shape
from bench.worker import Job

ROOT = Path(__file__).parent.parent
WORK = ROOT / "bench" / ".work"
"""Jobs, checkpoints and caches of a run; nothing is written anywhere else but the results."""


@dataclass(frozen=True)
class Bench:
    """What all rows are run with."""

    model: Path
    """The causal language model."""
    encoder: Path
    threads: int = 2
    quick: bool = False
    """Every row at a small size, to see that it runs: its figures say nothing."""

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model)

    @cached_property
    def words(self) -> list[str]:
        from bench.texts import words_of

        return words_of(self.tokenizer)

    @cached_property
    def shape(self) -> Shape:
        return Shape.of(json.loads((self.model / "config.json").read_text(encoding="utf-8")))

    @cached_property
    def encoder_shape(self) -> Shape:
        return Shape.of(json.loads((self.encoder / "config.json").read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Goal:
    """What the measurement should show."""

    speed: float | None = None
    """The peer's seconds over ours, at least."""
    memory: float | None = None
    """Our extra memory over the peer's, at most."""
    seconds: float | None = None
    """Our seconds, at most."""
    bytes: float | None = None
    """Our extra memory, at most."""


@dataclass(frozen=True)
class Case:
    """One row."""

    name: str
    work: str
    ours: str
    """The module of our side, below `bench`."""
    job: Callable[[Bench], Job]
    """Everything that the workers need."""
    goal: Goal
    rest: str
    """What the time beyond the bound goes into."""
    peer: str = ""
    """Whom it is measured against; empty: nobody."""
    theirs: str = ""
    """The module of the peer's side."""
    settings: str = ""
    """What the peer runs with, and what it saves by itself."""
    flops: Callable[[Bench, Job], float] | None = None
    """Operations that a mean step cannot do without; None: the bound is the `floor_seconds` of our worker."""
    floor: str = ""
    """What that floor is."""
    tolerance: float = 1e-3
    """How far losses, gradients or results of both sides may lie apart, relatively."""
    unit: str = "step"


@dataclass
class Row:
    """What was measured."""

    name: str
    work: str
    peer: str
    seconds: float
    unit: str
    command: str
    extra_bytes: int
    peer_seconds: float | None = None
    peer_extra_bytes: int | None = None
    cpu_ratio: float | None = None
    """The same ratio in seconds of the processor's cores."""
    bound_seconds: float | None = None
    bound: str = ""
    difference: float | None = None
    """The largest relative difference of what both sides computed."""
    values: int = 0
    """How many numbers were compared."""
    repeats: int = 1
    whole_seconds: float | None = None
    goal: dict[str, float | None] = field(default_factory=dict)
    settings: str = ""
    rest: str = ""
    parts: dict[str, float] = field(default_factory=dict)
    """Where the time of one step of ours goes, see `bench.parts`."""
    about: str = ""
    failed: str = ""
    """Why there is no measurement."""

    @property
    def ratio(self) -> float | None:
        return None if self.peer_seconds is None else self.peer_seconds / self.seconds

    @property
    def memory_ratio(self) -> float | None:
        return None if not self.peer_extra_bytes else self.extra_bytes / self.peer_extra_bytes

    @property
    def share(self) -> float | None:
        """How much of the bound is reached."""
        return None if self.bound_seconds is None else self.bound_seconds / self.seconds

    def missed(self) -> list[str]:
        """The goals that this measurement does not reach."""
        if self.failed:
            return []
        whole = self.seconds if self.whole_seconds is None else self.whole_seconds
        reached = {
            "speed": lambda goal: self.ratio is not None and self.ratio >= goal, "memory": lambda goal: self.memory_ratio is not None and self.memory_ratio <= goal,
            "seconds": lambda goal: whole <= goal, "bytes": lambda goal: self.extra_bytes <= goal,
        }  # fmt: skip
        return [name for name, goal in self.goal.items() if goal is not None and not reached[name](goal)]
