"""Context: what a method may ask for. Made lazily, cached, and checkpointed where a resumed run needs it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from luthier.core.store import Queue, RowTable, Store
from luthier.errors import RecipeError, UserError, nearest

if TYPE_CHECKING:
    from luthier.core.families import Decode, Family
    from luthier.core.rows import Rows


@dataclass
class Clock:
    """Where a run is. All schedules read this."""

    step: int = 0
    steps: int = 1
    """Planned optimiser steps."""
    epoch: int = 0
    epochs: float = 1.0
    samples: int = 0

    @property
    def fraction(self) -> float:
        """How much of the run is done, in [0, 1]."""
        return min(1.0, self.step / max(1, self.steps))


@dataclass(frozen=True)
class Ramp:
    """A value that moves from `start` to `end` over the first `until` of the run."""

    start: float
    end: float
    until: float = 1.0
    shape: Literal["linear", "cosine"] = "linear"

    def at(self, fraction: float) -> float:
        if self.until <= 0 or fraction >= self.until:
            return self.end
        t = fraction / self.until
        t = t if self.shape == "linear" else (1 - math.cos(math.pi * t)) / 2
        return self.start + (self.end - self.start) * t


def seed_of(*parts: Any) -> int:
    """A 63-bit seed from anything printable; the same on every machine."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big") >> 1


@dataclass
class Context:
    """One stage of a run, as methods see it. Outside a run: `Context(model)` with plain rows."""

    current: Family | None = None
    """The model being worked on."""
    seed: int = 0
    streams: dict[str, Rows] = field(default_factory=dict)
    """Row streams by name: train, test, val, general, ood, gold, unlabelled, calibration ..."""
    models: dict[str, Any] = field(default_factory=dict)
    """Other models by name, or functions that load them."""
    helpers: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    clock: Clock = field(default_factory=Clock)
    store: Store = field(default_factory=Store)
    round: int = 0
    """Which turn of a loop this is."""
    train_on: str = "completion"
    batch_size: int = 16
    workers: int = 0
    """Workers of a Ray cluster that compute signals of rows; 0: this process does."""
    logged: dict[str, float] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    switch: Callable[[], Any] | None = None
    """Turns the adapters off exactly, where they can be; set by the engine."""
    tell: Callable[[str], None] | None = None
    runner: Callable[..., Any] | None = None
    """Runs a recipe within this run; set by luthier.run."""
    fitter: Callable[..., Any] | None = None
    evaluator: Callable[[Any], float] | None = None
    answers: dict[str, Any] = field(default_factory=dict)
    """Generated answers by (model state, stream), so that measures share them."""
    _generators: dict[str, torch.Generator] = field(default_factory=dict)
    _numpy: dict[str, np.random.Generator] = field(default_factory=dict)

    # rows ---------------------------------------------------------------------------------------------------------------
    def rows(self, name: str = "train") -> Rows:
        """A row stream that the recipe's `data` names."""
        if name not in self.streams:
            raise RecipeError(f"The recipe's data has no '{name}' rows; add `data: {{{name}: FILE}}`.{nearest(name, self.streams)}")
        return self.streams[name]

    def has_rows(self, name: str) -> bool:
        return name in self.streams and len(self.streams[name]) > 0

    def draw(self, name: str, n: int) -> list[Mapping[str, Any]]:
        """`n` rows of a side stream, shuffled anew at every pass, reproducibly."""
        rows = self.rows(name)
        state = self.store.setdefault(f"draw/{name}", {"at": 0})
        picked: list[Mapping[str, Any]] = []
        for _ in range(n):
            lap, place = divmod(state["at"], len(rows))
            order = np.random.default_rng(seed_of(self.seed, "draw", name, lap)).permutation(len(rows))
            picked.append(rows[int(order[place])])
            state["at"] += 1
        return picked

    # chance -------------------------------------------------------------------------------------------------------------
    def rng(self, stream: str) -> torch.Generator:
        """A named CPU generator, seeded from the run's seed, saved in checkpoints."""
        if stream not in self._generators:
            self._generators[stream] = torch.Generator().manual_seed(seed_of(self.seed, "torch", stream))
        return self._generators[stream]

    def numpy(self, stream: str) -> np.random.Generator:
        """A named numpy generator, seeded from the run's seed, saved in checkpoints."""
        if stream not in self._numpy:
            self._numpy[stream] = np.random.default_rng(seed_of(self.seed, "numpy", stream))
        return self._numpy[stream]

    # models -------------------------------------------------------------------------------------------------------------
    def model(self, name: str = "base") -> Family:
        """A frozen model: "base" (before any training of this run), "stage", "round", "previous", or one of `models:`."""
        if name not in self.models:
            raise RecipeError(f"No model '{name}' is at hand; name it under `models:`.{nearest(name, self.models)}")
        found = self.models[name]
        if callable(found) and not hasattr(found, "network"):
            found = self.models[name] = found()
        return found

    def has_model(self, name: str) -> bool:
        return name in self.models

    @contextmanager
    def reference(self, name: str = "stage") -> Iterator[Family]:
        """A reference model to score with: the network itself with its adapters switched off where that is exact, else a copy.

        Always in eval mode and without gradient."""
        if name == "stage" and self.switch is not None and self.current is not None:
            with self.current.evaluating(), self.switch():
                self.current.referring = True
                try:
                    yield self.current
                finally:
                    self.current.referring = False
        else:
            frozen = self.model(name)
            with frozen.evaluating():
                yield frozen

    def helper(self, role: str) -> Callable[..., Any]:
        """A callable that the recipe's `helpers:` names (judge, nli, reward, embedder ...)."""
        if role not in self.helpers:
            raise RecipeError(f"This needs a helper '{role}'; name one under `helpers:`, e.g. `{role}: ./mine.py:{role}`.")
        return self.helpers[role]

    def has_helper(self, role: str) -> bool:
        return role in self.helpers

    def generate(self, prompts: SequenceOf[Any], decode: Decode | None = None, n: int = 1, model: str | None = None) -> list[list[Any]]:
        """Answers of the current model (or a named one). Sampling is seeded from the run's stream "generate"."""
        family = self.current if model is None else self.model(model)
        if family is None:
            raise UserError("There is no model to generate with.")
        seed = int(torch.randint(2**62, (1,), generator=self.rng("generate")))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return family.generate(prompts, decode, n)

    def signal(self, name: str, rows: Any, model: str = "stage", **options: Any) -> np.ndarray:
        """A per-row signal (embedding, loss, perplexity, gradient ...), computed once and cached on disk."""
        from luthier.core.signals import signal

        return signal(name, rows, self, model, **options)

    def score(self, source: Any) -> float:
        """The validation score of a model given as a state dict or TensorSource; higher is better. For mergers and searches."""
        if self.evaluator is None:
            raise RecipeError("This needs validation rows to score candidates with; add `data: {val: FILE}`.")
        return self.evaluator(source)

    def fit(self, **what: Any) -> Any:
        """Train parameters with a loss in this run's loop; see `luthier.core.fit`."""
        if self.fitter is not None:
            return self.fitter(**what)
        from luthier.core.fit import fit

        return fit(**what, ctx=self)

    def run(self, recipe: Any) -> Any:
        """Run another recipe inside this run's folder."""
        if self.runner is None:
            raise UserError("A recipe can only be run inside a run.")
        return self.runner(recipe)

    # memory -------------------------------------------------------------------------------------------------------------
    def queue(self, name: str, size: int) -> Queue:
        """A first-in-first-out memory of features with row ids, in the checkpoint."""
        return self.store.setdefault(f"queue/{name}", Queue(size))

    def memory(self, name: str, shape: tuple[int, ...]) -> RowTable:
        """A table with one entry a row, in the checkpoint."""
        return self.store.setdefault(f"memory/{name}", RowTable(shape))

    # reporting ----------------------------------------------------------------------------------------------------------
    def log(self, **values: Any) -> None:
        """Numbers for this step's line of metrics.jsonl and the trackers."""
        self.logged |= {k: float(v) for k, v in values.items()}

    def notice(self, sentence: str) -> None:
        """A sentence the user should read, once."""
        if sentence not in self.notices:
            self.notices.append(sentence)
            if self.tell is not None:
                self.tell(sentence)

    # checkpoints --------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        return {
            "torch": {k: g.get_state() for k, g in self._generators.items()},
            "numpy": {k: g.bit_generator.state for k, g in self._numpy.items()},
            "store": self.store.state_dict(),
            "clock": vars(self.clock),
            "notices": list(self.notices),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for k, value in state["torch"].items():
            self.rng(k).set_state(value)
        for k, value in state["numpy"].items():
            self.numpy(k).bit_generator.state = value
        self.store.load_state_dict(state["store"])
        self.clock = Clock(**state["clock"])
        self.notices = list(state["notices"])
