"""Every pair of methods on two axes, run at toy size."""

from __future__ import annotations

import functools
import gc
import itertools
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from luthier.catalog import AXES, entries, method
from luthier.errors import UserError


def matrix(axes: tuple[str, ...] = (), tell: Callable[[dict[str, Any]], None] | None = None, cores: int = 1) -> list[dict[str, Any]]:
    """One entry a pair: {"a", "b", "outcome": runs | refused | crashed, "why", "seconds"}. `axes` limits it to pairs between these."""
    chosen = [a for a in AXES if not axes or a in axes]
    pairs = [(f"{x}/{a.name}", f"{y}/{b.name}") for x, y in itertools.combinations(chosen, 2) for a, b in itertools.product(entries(x), entries(y))]
    found = []
    with ExitStack() as stack:
        if cores > 1:
            pool = stack.enter_context(ProcessPoolExecutor(cores, multiprocessing.get_context("spawn"), _start))
            made: Iterable[dict[str, Any]] = pool.map(_named, pairs, chunksize=16)
        else:
            stack.enter_context(settled())
            made = map(_named, pairs)
        for entry in made:
            found.append(entry)
            if tell is not None:
                tell(entry)
    return found


def _named(names: tuple[str, str]) -> dict[str, Any]:
    """The entry of two methods, "axis/name" each."""
    a, b = names
    entry = {"a": a, "b": b, **pair({name.split("/")[0]: method(*name.split("/")) for name in names})}
    _settle()
    return entry


@functools.cache
def _settle() -> None:
    """What the first run of this process has imported stays as well; without this, half of every run's time is looking through it for garbage."""
    gc.collect()
    gc.freeze()


def _start() -> None:
    """A process that shares the cores with others and runs many pairs."""
    import torch

    torch.set_num_threads(1)
    settled().__enter__()


@contextmanager
def settled() -> Iterator[None]:
    """Every run collects garbage; what the libraries hold, a million objects, is left out of that while many small runs are made."""
    import peft  # noqa: F401

    import luthier.core.stage  # noqa: F401

    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def pair(choices: dict[str, type]) -> dict[str, Any]:
    """Run one recipe with these methods. A refusal is one sentence; anything else that goes wrong is a crash."""
    from luthier.recipe import Recipe
    from luthier.run import tune
    from luthier.testing.toys import FAMILIES, recipe, shared_family

    started = time.monotonic()
    family = shared_family(list(choices.values()))
    if family is None:
        served = "; ".join(f"{axis} '{c.name}' serves {', '.join(f for f in FAMILIES if f in c.families)}" for axis, c in choices.items())  # type: ignore[attr-defined]
        return {"outcome": "refused", "why": f"No family of models serves both: {served}.", "seconds": 0.0}
    folder = Path(tempfile.mkdtemp(prefix="luthier-pair-"))
    try:
        tune(Recipe.from_dict(recipe(choices, family, folder / "run")))
        outcome, why = "runs", family
    except UserError as refusal:
        outcome, why = "refused", str(refusal)
    except Exception as crash:  # the table must be finished; a crash is a finding, not a reason to stop
        outcome, why = "crashed", f"{type(crash).__name__}: {crash}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {"outcome": outcome, "why": why, "seconds": round(time.monotonic() - started, 2)}
