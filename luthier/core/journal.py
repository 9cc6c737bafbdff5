"""What a run tells while it works: metrics.jsonl, trackers, and a live progress line."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from luthier.errors import RecipeError

TRACKERS = ("tensorboard", "wandb", "trackio")


class Journal:
    """Numbers by step. `path` is metrics.jsonl; `show` turns the live line on."""

    def __init__(self, path: Path | None, show: bool = False, trackers: tuple[str, ...] = (), config: dict[str, Any] | None = None, label: str = "tuning") -> None:
        self.path, self.show, self.label = path, show, label
        self._progress: Any = None
        self._task: Any = None
        self._trackers = _start_trackers(trackers, path, config or {})
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, line: dict[str, Any], every: int = 1) -> None:
        """Append one step's numbers; numbers that are not finite become null, so that the file stays json."""
        step = int(line["step"])
        self._advance(line)
        if step % max(1, every):
            return
        clean = {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in line.items()}
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(clean) + "\n")
        for tracker in self._trackers:
            tracker.log({k: v for k, v in clean.items() if isinstance(v, (int, float))}, step=step)

    def position(self) -> int:
        """How long the file is, synced to disk."""
        if self.path is None or not self.path.exists():
            return 0
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())
        return self.path.stat().st_size

    def cut(self, position: int) -> None:
        """Back to a checkpoint: what was written after it never happened."""
        if self.path is not None and self.path.exists() and self.path.stat().st_size > position:
            os.truncate(self.path, position)

    def finish(self) -> None:
        for tracker in self._trackers:
            tracker.finish()

    @contextmanager
    def progress(self, steps: int, done: int = 0) -> Iterator[None]:
        """A live line while the loop runs; a plain line now and then where there is no terminal."""
        if not self.show:
            yield
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"),
                   TextColumn("{task.fields[speed]} tok/s"), TimeRemainingColumn())  # fmt: skip
        self._steps, self._told = steps, -1
        if not sys.stdout.isatty():
            yield
            return
        with Progress(*columns, transient=False) as self._progress:
            self._task = self._progress.add_task(self.label, total=steps, completed=done, loss="-", speed="-")
            try:
                yield
            finally:
                self._progress = None

    def _advance(self, line: dict[str, Any]) -> None:
        if not self.show:
            return
        loss, speed = f"{line.get('loss', float('nan')):.4f}", f"{line.get('tokens_per_second', 0):.0f}"
        if self._progress is not None:
            self._progress.update(self._task, completed=line["step"], loss=loss, speed=speed)
            return
        tenth = 10 * line["step"] // max(1, self._steps)
        if tenth != self._told:
            self._told = tenth
            print(f"{self.label}: step {line['step']} of {self._steps}, loss {loss}, {speed} tokens/s", flush=True)


def check_trackers(names: Iterable[str]) -> None:
    """Refuse trackers that are not installed, before anything is computed."""
    if not names:
        return
    from accelerate.tracking import get_available_trackers

    available = {str(getattr(t, "value", t)) for t in get_available_trackers()}
    for name in names:
        if name not in available:
            raise RecipeError(f"The tracker '{name}' is not installed: pip install {name}. Or leave train.tracker empty; metrics.jsonl is always written.")


def _start_trackers(names: tuple[str, ...], path: Path | None, config: dict[str, Any]) -> list[Any]:
    """Accelerate's trackers, by name."""
    check_trackers(names)
    if not names:
        return []
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    started = []
    for name in names:
        kind = LOGGER_TYPE_TO_CLASS[name]
        folder = path.parent if path is not None else Path()
        tracker = kind("luthier", logging_dir=folder) if kind.requires_logging_directory else kind("luthier")
        if hasattr(tracker, "start"):
            tracker.start()
        flat = {k: v for k, v in config.items() if isinstance(v, (int, float, str, bool))}
        tracker.store_init_configuration(flat)
        started.append(tracker)
    return started
