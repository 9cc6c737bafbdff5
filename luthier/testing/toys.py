"""Toy rows, recipes and model folders for every family, so that any method can be run in a moment."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from luthier.catalog import is_registered, method

FAMILIES = ("causal-lm", "text-encoder", "image-classifier", "dual-encoder")


def _words(rng: np.random.Generator, n: int) -> str:
    return " ".join(f"w{int(i)}" for i in rng.integers(0, 40, n))


def rows(columns: frozenset[str], n: int = 12, seed: int = 0) -> list[dict[str, Any]]:
    """`n` rows with these columns, made of the tiny tokenizer's words and 12 x 12 pictures."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        prompt, answer, other = _words(rng, 4), _words(rng, 3), _words(rng, 2)
        everything = {
            "prompt": prompt, "completion": answer, "chosen": answer, "rejected": other, "text": _words(rng, 8),
            "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}],
            "responses": [answer, other, _words(rng, 3)], "scores": [1.0, 0.2, 0.5], "label": int(i % 3),
            "anchor": prompt, "positive": answer, "negative": other, "question": f"{prompt} ?", "context": f"{other} {answer} {prompt}", "answer": answer,
            "image": rng.integers(0, 256, (12, 12, 3)).astype(np.uint8), "tags": [f"t{i % 3}", f"u{i % 2}"], "quality": float(rng.uniform(0.1, 1)),
        }  # fmt: skip
        made.append({k: everything[k] for k in everything if k in columns})
    return made


@functools.cache
def model_folder(family: str) -> Path:
    """A tiny model of a family, saved once a process, for recipes that name a path."""
    from luthier.core.models import save_network
    from luthier.testing import tiny

    folder = Path(tempfile.mkdtemp(prefix=f"luthier-toy-{family}-")) / "model"
    made = {
        "causal-lm": tiny.tiny_llama, "text-encoder": lambda: tiny.tiny_bert(classes=3),
        "image-classifier": tiny.tiny_vit, "dual-encoder": tiny.tiny_clip,
    }[family]()  # fmt: skip
    save_network(made, folder)
    return folder


def columns_for(chosen: list[Any], family: str) -> frozenset[str]:
    """Columns that satisfy every chosen method: for each its first alternative that fits the family."""
    default = {
        "causal-lm": {"prompt", "completion"}, "text-encoder": {"text", "label"}, "image-classifier": {"image", "label"}, "dual-encoder": {"image", "text"},
    }[family]  # fmt: skip
    wanted: set[str] = set()
    for cls in chosen:
        options = [set(c) for c in cls.columns if ("image" in c) == (family in ("image-classifier", "dual-encoder"))] or [set(c) for c in cls.columns]
        if options and not any(c <= wanted for c in options):
            wanted |= options[0]
    return frozenset(wanted or default)


def recipe(choices: Mapping[str, type | str], family: str, folder: Path) -> dict[str, Any]:
    """A recipe with these methods at toy size and plain defaults elsewhere."""
    classes: dict[str, Any] = {axis: cls if isinstance(cls, type) else method(axis, cls) for axis, cls in choices.items()}
    made: dict[str, Any] = {
        "model": str(model_folder(family)), "adapt": {"method": "full"},
        "optimize": {"method": "adamw", "lr": 1e-3}, "measure": [],
        "train": {"steps": 2, "batch": 4, "seed": 0, "save_every": 0, "warmup": 0, "device": "cpu"},
    }  # fmt: skip
    for axis, cls in classes.items():
        made[axis] = entry(cls)
    columns = columns_for([c for a, c in classes.items() if a in ("objective", "synthesize", "select", "curate")], family)
    made["data"] = {name: rows(columns, n, seed) for seed, (name, n) in enumerate((("train", 12), ("test", 6), ("val", 6), ("general", 4)))}
    for cls in classes.values():
        made["data"] |= {name: rows(own, 6) for name, own in getattr(cls, "toy_streams", {}).items()}
    if "search" in classes:
        made["measure"] += entry(method("measure", "task")) if "measure" not in choices or classes["measure"].name != "task" else []
        made["space"] = {"optimize.lr": [1e-3, 1e-2]}
    made["models"] = {name: str(model_folder(family)) for cls in classes.values() for name in getattr(cls, "toy_models", ())}
    made["helpers"] = {}
    made["run"] = str(folder)
    return made


def entry(cls: Any, options: Mapping[str, Any] | None = None) -> Any:
    """A method with its toy fields (or others) as a recipe writes it."""
    made = {"method": spec_of(cls), **(cls.toy if options is None else options)}
    if cls.axis == "merge" and getattr(cls, "toy_models", ()):
        made["of"] = ["this", *cls.toy_models]
    return [made] if cls.axis in ("curate", "synthesize", "measure", "compress") else made


def spec_of(cls: Any) -> str:
    """How a recipe names this class: its catalogue name where it is registered under it, else its file."""
    if is_registered(cls.axis, cls.name) and method(cls.axis, cls.name) is cls:
        return cls.name  # type: ignore[attr-defined]
    import inspect

    return f"{inspect.getfile(cls)}:{cls.__name__}"


def shared_family(classes: list[type]) -> str | None:
    """The first family that all these methods serve."""
    return next((f for f in FAMILIES if all(f in c.families for c in classes)), None)  # type: ignore[attr-defined]
