"""Every pair of methods on two axes, run at toy size."""

from __future__ import annotations

import gc
import itertools
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from luthier.catalog import AXES, entries
from luthier.errors import UserError


def matrix(axes: tuple[str, ...] = (), tell: Callable[[dict[str, Any]], None] | None = None) -> list[dict[str, Any]]:
    """One entry a pair: {"a", "b", "outcome": runs | refused | crashed, "why", "seconds"}. `axes` limits it to pairs between these."""
    chosen = [a for a in AXES if not axes or a in axes]
    found = []
    with settled():
        for first, second in itertools.combinations(chosen, 2):
            for a, b in itertools.product(entries(first), entries(second)):
                entry = pair({first: a.load(), second: b.load()})
                found.append({"a": f"{first}/{a.name}", "b": f"{second}/{b.name}", **entry})
                if tell is not None:
                    tell(found[-1])
    return found


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
