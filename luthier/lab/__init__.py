"""The lab: tiny models, tasks with exact verifiers, and the builds that make the models.

`make("lab:traces?skills=sort&n=800&seed=3")` gives the rows; `model_path("lm-s")` the folder of a shipped model.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from luthier.errors import DataError, ModelError, nearest
from luthier.lab.splits import Splits, Verdict

__all__ = ["Splits", "Verdict", "make", "model_path", "models", "task", "tasks"]

TASKS = ("traces", "facts", "sounds", "grammar", "corpus", "rewards", "scenes", "digits")
WEIGHTS = Path(__file__).with_name("weights")


def task(name: str) -> Callable[..., Splits]:
    """The generator of a task: a pure function of (seed, n, **knobs)."""
    if name not in TASKS:
        raise DataError(f"The lab has no task '{name}'.{nearest(name, TASKS)} It has {', '.join(TASKS)}.")
    return getattr(importlib.import_module(f"luthier.lab.{name}"), name)


def make(spec: str, **knobs: Any) -> Splits:
    """The splits of `lab:NAME?knob=value&knob=value` (the prefix may be left out); keyword knobs win."""
    name, _, query = spec.removeprefix("lab:").partition("?")
    function = task(name)
    defaults = {key: p.default for key, p in inspect.signature(function).parameters.items()}
    given: dict[str, Any] = {**dict(parse_qsl(query, keep_blank_values=True)), **knobs}
    for knob in given:
        if knob not in defaults:
            raise DataError(f"lab:{name} has no knob '{knob}'.{nearest(knob, defaults)} It has {', '.join(defaults)}.")
    return function(**{knob: _typed(name, knob, value, defaults[knob]) for knob, value in given.items()})


def _typed(name: str, knob: str, value: Any, default: Any) -> Any:
    """A text value as the type of the knob's default."""
    kind = type(default)
    try:
        if kind is bool:
            return value if isinstance(value, bool) else {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[str(value).lower()]
        if kind is str:
            return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        return kind(value)
    except (KeyError, TypeError, ValueError):
        raise DataError(f"lab:{name}: {knob}={value!r} is not a {kind.__name__}; its default is {default!r}.") from None


def tasks() -> dict[str, dict[str, Any]]:
    """name -> {about, knobs}: one line and the defaults of every knob."""
    found = {}
    for name in TASKS:
        function = task(name)
        knobs = {key: p.default for key, p in inspect.signature(function).parameters.items()}
        found[name] = {"about": inspect.getdoc(function).split("\n")[0], "knobs": knobs}
    return found


def models() -> list[str]:
    """The shipped models."""
    return sorted(path.parent.name for path in WEIGHTS.glob("*/model.safetensors") if not path.parent.name.startswith("."))


def model_path(name: str) -> Path:
    """The folder of a shipped model: config.json, model.safetensors in half precision, tokenizer and card.json."""
    if name not in models():
        known = models()
        raise ModelError(f"The lab ships no model '{name}'.{nearest(name, known)} It ships {', '.join(known) or 'none yet'}.")
    return WEIGHTS / name
