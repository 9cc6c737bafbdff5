"""A trial: what an arm works with. It hands out seeds and shared beginnings, runs recipes, and keeps the account of what was spent."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.core import memory


@dataclass
class Shared:
    """What the arms of one seed have in common: made once, by whoever asks first."""

    made: dict[Any, Any] = field(default_factory=dict)

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]


@dataclass
class Trial:
    """One arm at one seed."""

    seed: int
    arm: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What the arm's grid chose: trial["lr"]."""
    quick: bool = False
    shared: Shared = field(default_factory=Shared)
    spent: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="luthier-claim-")))
    runs: int = 0

    def __getitem__(self, key: str) -> Any:
        return self.settings[key]

    def scaled(self, n: int) -> int:
        """A number of steps or rows; a third of it in a quick run."""
        return max(1, n // 3) if self.quick else n

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What every arm of this seed shares; what it costs is nobody's."""
        if key in self.shared.made:
            return self.shared.made[key]
        spent, self.spent = self.spent, {}
        try:
            return self.shared.get(key, make)
        finally:
            self.spent = spent
            memory.settle()

    def spend(self, **amounts: float) -> None:
        """Add to the arm's account: rows and tokens learned from, steps, passes ..."""
        for key, amount in amounts.items():
            self.spent[key] = self.spent.get(key, 0.0) + float(amount)

    # -- recipes -----------------------------------------------------------------------------------------------------------
    def tune(self, model: Any, rows: Sequence[Mapping[str, Any]] | Any, steps: int, batch: int = 32, lr: float | None = None, **recipe: Any) -> Any:
        """Run a recipe and give the tuned model; what it took is put on the arm's account. `steps` are scaled in a quick run.

        A model in memory stays as it is, so that arms can share a start."""
        import luthier

        self.runs += 1
        folder = self.folder / f"{self.runs:03d}"
        setting = {"steps": self.scaled(steps), "batch": batch, "seed": self.seed, "schedule": "cosine", "warmup": 0.05, "save_every": 0, "log_every": 25, **recipe.pop("train", {})}
        streams = {"train": list(rows), **recipe.pop("data", {})}
        recipe.setdefault("adapt", "full")
        if lr is not None:
            recipe["optimize"] = {"method": "adamw", "lr": lr, **recipe.get("optimize", {})}
        done = luthier.tune({"model": _apart(model), "data": streams, "train": setting, "measure": [], **recipe}, run=folder, report=False)
        self.account(folder, setting["batch"])
        tuned = _tuned(done, model)
        shutil.rmtree(folder, ignore_errors=True)
        return tuned

    def account(self, folder: Path, batch: int) -> None:
        """Put a run's costs on the arm's account; `rows` are those of the steps, `batch` each."""
        import json

        for stage in json.loads((folder / "report.json").read_text(encoding="utf-8"))["stages"]:
            found = stage.get("outcome")
            if found:
                self.spend(steps=found["steps"], rows=found["steps"] * batch, tokens=found["tokens"], train_seconds=found["seconds"])
                self.spent["trained"] = float(found.get("trained", 0))

    # -- judging -----------------------------------------------------------------------------------------------------------
    def right(self, model: Any, rows: Sequence[Mapping[str, Any]], verify: Callable[[Any, str], Any], max_new: int = 24) -> float:
        """The share of greedy answers that the task's own program accepts."""
        answers = self.answers(model, rows, max_new)
        return sum(_score(verify(row, answer)) for row, answer in zip(rows, answers)) / max(1, len(rows))

    def answers(self, model: Any, rows: Sequence[Mapping[str, Any]], max_new: int = 24) -> list[str]:
        """Greedy answers of a lab model."""
        from luthier.lab.decode import greedy

        return greedy(getattr(model, "network", model), [str(row["prompt"]) for row in rows], max_new)

    def general(self, model: Any, limit: int | None = None) -> float:
        """The share of the general probe that is answered rightly: what the shipped model could do when it shipped."""
        from luthier.lab.general import general_probe, verify_general

        rows = general_probe()
        rows = rows[:: max(1, len(rows) // limit)] if limit else rows
        return self.right(model, rows, verify_general)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _score(found: Any) -> float:
    return float(getattr(found, "score", found) >= 1.0)


def _apart(model: Any) -> Any:
    """A copy of a model in memory, since recipes tune it in place; names and folders as they are."""
    if not hasattr(model, "network"):
        return model
    twin = copy.copy(model)
    twin.network, twin.modules = copy.deepcopy(model.network), copy.deepcopy(model.modules)
    return twin


def _tuned(done: Any, model: Any) -> Any:
    """A run's model. An adapter on a model in memory goes onto a copy of that model, which may lie in no folder any more."""
    from luthier.core.models import load

    if hasattr(model, "network") and (done.model_path / "adapter_config.json").is_file():
        return load(str(done.model_path), base=_apart(model))
    return done.model()
