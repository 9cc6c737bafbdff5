"""One run of a comparison: in a process of its own, so that its time and memory are its own and its end is not everybody's.

The process stops by itself, with a checkpoint, when the one that started it is gone: it listens to a pipe that ends with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from luthier.claims.evidence import finite
from luthier.errors import Stopped, UserError
from luthier.recipe import Recipe
from luthier.report import cost

COMMAND = (sys.executable, "-m", "luthier._compare.work")
MARK = "\x1eluthier-compare "
"""What a line of the process begins with that is meant for the one that started it."""


def run(recipe: Recipe, folder: Path, tune: Callable[..., Any] | None = None) -> dict[str, Any]:
    """A run's record. A finished run is read, an interrupted one continued; one that fails leaves its sentence under "error"."""
    known = record(folder)
    if known is not None:
        return known
    try:
        request = json.dumps({"recipe": recipe.to_dict(), "base": str(recipe.base), "run": str(folder)}, default=_path)
    except TypeError:  # rows or helpers that exist in memory only
        request = None
    if tune is None and request is not None:
        error = _apart(request)
    else:
        error = _here(recipe, folder, tune)
    found = record(folder)
    if error is None and found is None:
        error = "The run left no report."
    if error is not None or found is None:
        return {"error": error}
    if tune is None and request is None:
        found["cost"]["peak_memory"] = None  # this process has done other things before
    return found


def record(folder: Path) -> dict[str, Any] | None:
    """What a finished run came to: its numbers before and after, which way they are better, and what it took. None: it did not finish."""
    try:
        facts = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        file = folder / "measures.json"
        measures = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError):
        return None
    if facts["status"] != "finished":
        return None
    numbers = {when: {f"{m}/{k}": finite(v) for m, got in found.items() for k, v in got["numbers"].items()} for when, found in measures.items()}
    better = {f"{m}/{k}": v for m, got in measures.get("after", {}).items() for k, v in got.get("better", {}).items()}
    outcomes = [s["outcome"] for s in facts["stages"] if s.get("outcome")]
    rows = [s["rows"][-1]["rows"] for s in facts["stages"] if s.get("rows")]
    spent: dict[str, Any] = {**cost(facts["stages"]), "seconds": facts["seconds"], "rows": sum(rows) if rows else None}
    spent["peak_memory"] = max((o["peak_memory"] for o in outcomes), default=0) or None
    return {"error": None, "numbers": numbers, "better": better, "cost": {k: finite(v) for k, v in spent.items()}, "run": str(folder)}


def _here(recipe: Recipe, folder: Path, tune: Callable[..., Any] | None) -> str | None:
    """Run in this process; the sentence of what went wrong, if anything did."""
    from luthier.run import tune as run_here

    try:
        (tune or run_here)(recipe, run=folder, resume=True, quiet=True)
    except Stopped:  # the user's wish, and not the arm's failure
        raise
    except Exception as error:  # the other arms can still tell something
        return said(error)
    return None


def _apart(request: str) -> str | None:
    """Run in a process of its own; the sentence of what went wrong, if anything did."""
    process = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    assert process.stdin is not None and process.stdout is not None
    lines: list[str] = []
    try:
        with contextlib.suppress(BrokenPipeError):  # it ended before it heard what to do; its last words say why
            process.stdin.write(request + "\n")
            process.stdin.flush()
        for line in process.stdout:
            if line.startswith(MARK):
                error: str | None = json.loads(line[len(MARK) :])
                return error
            lines = [*lines[-20:], line]
    finally:
        _let_go(process)
    if process.returncode == -signal.SIGKILL:
        return "The process was killed, most likely for want of memory; lower train.tokens_per_micro_batch or set train.gradient_checkpointing."
    why = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    return f"The process ended early with code {process.returncode}: {why}"


def _let_go(process: subprocess.Popen[str]) -> None:
    """Close the pipe, which makes a process that still runs write its checkpoint and stop, and wait for that."""
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()  # type: ignore[union-attr]  # it is a pipe
    process.wait()
    process.stdout.close()  # type: ignore[union-attr]


def said(error: Exception) -> str:
    """An error as one sentence; what is no user's error is named by its kind."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _path(value: Any) -> str:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError


# -- in the process ------------------------------------------------------------------------------------------------------------


def _worker() -> None:
    request: Mapping[str, Any] = json.loads(sys.stdin.readline())
    threading.Thread(target=_until_alone, daemon=True).start()
    error = _here(Recipe.from_dict(request["recipe"], request["base"]), Path(request["run"]), None)
    print(MARK + json.dumps(error), flush=True)
    os._exit(0)  # the listening thread holds the pipe, and an orderly end would wait for it


def _until_alone() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    _worker()
