"""A recipe back to YAML, whole: every default stated, every path absolute, what is only in memory named by its content."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from luthier._recipe.choice import Frame
from luthier._recipe.family import embedded
from luthier.catalog import AXES

if TYPE_CHECKING:
    from luthier.recipe import Recipe

FEW = 8


def to_yaml(recipe: Recipe) -> str:
    """The recipe as a run keeps it."""
    out: dict[str, Any] = {"name": recipe.name} if recipe.name else {}
    if recipe.model is not None:
        out["model"] = _model(recipe.model, recipe.frame)
    if recipe.models:
        out["models"] = {k: _model(v, recipe.frame) for k, v in recipe.models.items()}
    if recipe.helpers:
        out["helpers"] = {k: _helper(v, recipe.frame) for k, v in recipe.helpers.items()}
    if recipe.data.streams:
        out["data"] = _data(recipe.data.to_dict(), recipe.frame)
    for axis in AXES:
        entries = [c.to_dict() | ({"of": recipe.merge_of} if c.extras.get("of") else {}) for c in getattr(recipe, axis)]
        if entries or axis == "measure":
            out[axis] = entries[0] if len(entries) == 1 else entries
    out["train"] = dataclasses.asdict(recipe.train)
    if recipe.space:
        out["space"] = recipe.space
    if recipe.raw.get("stages"):
        out["stages"] = _stages(recipe.raw["stages"], recipe.frame)
    if recipe.run:
        out["run"] = recipe.run
    return yaml.safe_dump(plain(out), sort_keys=False, allow_unicode=True, width=120)


def _stages(stages: list[Any], frame: Frame) -> list[Any]:
    return [_loop(s, frame) if "loop" in s else _stage(s, frame) for s in stages]


def _loop(stage: dict[str, Any], frame: Frame) -> dict[str, Any]:
    return {**stage, "loop": {**stage["loop"], "stages": _stages(stage["loop"]["stages"], frame)}}


def _stage(stage: dict[str, Any], frame: Frame) -> dict[str, Any]:
    made = dict(stage)
    for key, value in stage.items():
        if key in AXES:
            made[key] = [_entry(v, frame) for v in value] if isinstance(value, list) else _entry(value, frame)
        elif key == "data":
            made[key] = _data(value if isinstance(value, dict) else {"train": value}, frame)
        elif key == "helpers":
            made[key] = {k: _helper(v, frame) for k, v in value.items()}
    return made


def _entry(value: Any, frame: Frame) -> Any:
    if isinstance(value, str) and ".py" in value:
        return spec_of(value, frame)
    if isinstance(value, dict) and isinstance(value.get("method"), str):
        return {**value, "method": spec_of(value["method"], frame)}
    return value


def spec_of(text: str, frame: Frame) -> str:
    """A method's name, or its file as an absolute path."""
    if ".py" not in text:
        return text
    file, sign, name = text.partition(":")
    return f"{frame.path(file).resolve()}{sign}{name}"


def _helper(value: Any, frame: Frame) -> Any:
    if isinstance(value, Mapping):
        return {**value, "call": _helper(value["call"], frame)}
    return spec_of(value, frame) if isinstance(value, str) else f"<{getattr(value, '__name__', 'helper')} in memory>"


def _model(value: Any, frame: Frame) -> Any:
    if hasattr(value, "network"):
        return _model_in_memory(value)
    spec = {**value, "id": model_id(value["id"], frame)}
    return spec["id"] if len(spec) == 1 else spec


def model_id(text: str, frame: Frame) -> str:
    """A model's name; a folder beside the recipe as an absolute path, a run's folder as that of its model."""
    folder = frame.path(text)
    if not folder.is_dir() or embedded(text):
        return text
    if (folder / "recipe.yaml").is_file() and (folder / "model").is_dir():
        folder = folder / "model"
    known = any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
    return str(folder.resolve()) if known or is_path(text) else text


def is_path(text: str) -> bool:
    """Whether a text can only be a path."""
    return text.startswith(("./", "../", "/", "~", ".\\")) or text in (".", "..")


def _data(data: Mapping[str, Any], frame: Frame) -> dict[str, Any]:
    from luthier._recipe.settings import OPTIONS

    return {k: v if k in OPTIONS else _source(v, frame) for k, v in data.items()}


def _source(value: Any, frame: Frame) -> Any:
    if isinstance(value, str):
        path = frame.path(value)
        return str(path.resolve()) if not value.startswith(("lab:", "hub:")) and path.exists() else value
    if isinstance(value, list) and value and isinstance(value[0], str):
        return [_source(v, frame) for v in value]
    if isinstance(value, Mapping) and "path" in value:
        return {**value, "path": _source(value["path"], frame)}
    return _rows_in_memory(value)


def _rows_in_memory(rows: Any) -> Any:
    if isinstance(rows, list) and len(rows) <= FEW and _is_plain(rows):
        return rows
    digest = getattr(rows, "fingerprint", None) or hashlib.sha256(json.dumps(_items(rows), default=_bytes, sort_keys=True).encode()).hexdigest()
    return f"<{len(rows)} rows in memory, {str(digest)[:12]}>"


def _items(rows: Any) -> Any:
    return dict(rows) if isinstance(rows, Mapping) else list(rows)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    return all(map(_is_plain, value)) if isinstance(value, list) else value is None or type(value) in (bool, int, float, str)


def _model_in_memory(family: Any) -> str:
    """A text that changes when a weight changes, so that equal recipes mean equal runs."""
    digest = hashlib.sha256()
    for name, tensor in sorted(family.network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {float(tensor.double().sum())!r} {float(tensor.double().norm())!r}".encode())
    return f"<{getattr(family, 'source', '') or 'model'} in memory, {digest.hexdigest()[:12]}>"


def _bytes(value: Any) -> Any:
    return hashlib.sha256(value.tobytes()).hexdigest() if hasattr(value, "tobytes") else str(value)


def plain(value: Any) -> Any:
    """Only what YAML writes without tags."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return value if value is None or type(value) in (bool, int, float, str) else str(value) if isinstance(value, (Path, str)) else repr(value)
