"""Recipes on top of recipes: what a stage inherits from the top."""

from __future__ import annotations

from typing import Any

from luthier._recipe.choice import Frame
from luthier._recipe.source import Marks, Place
from luthier.catalog import AXES

NOT_INHERITED = ("stages", "search", "space", "run", "name")
SHORT = {"data": "train"}


def tree(value: Any) -> Any:
    """A copy of the mappings and lists of a recipe. Rows and models in memory stay the same objects."""
    if isinstance(value, dict):
        return {k: v if k == "data" and not isinstance(v, dict) else _streams(v) if k == "data" else tree(v) for k, v in value.items()}
    return [tree(v) for v in value] if isinstance(value, list) else value


def _streams(data: dict[str, Any]) -> dict[str, Any]:
    return {k: dict(v) if isinstance(v, dict) else v for k, v in data.items()}


def overlay(top: dict[str, Any], stage: dict[str, Any], frame: Frame, place: Place, defaults: dict[str, Any]) -> tuple[dict[str, Any], Frame]:
    """The stage's recipe: the top's values, with its own over them. A mapping without `method` changes the inherited method's fields."""
    made = {k: v for k, v in tree(top).items() if k not in NOT_INHERITED}
    marks: Marks = {p: m for p, m in frame.marks.items() if p and p[0] not in NOT_INHERITED}
    for key, value in tree(stage).items():
        inherited = made.get(key, defaults.get(key))
        merged = _merged(key, inherited, value, frame, (*place, key))
        if merged is None:
            made[key] = value
            marks = {p: m for p, m in marks.items() if p[0] != key}
        else:
            made[key] = merged
    marks |= {p[len(place) :]: m for p, m in frame.marks.items() if len(p) > len(place) and p[: len(place)] == place}
    marks[()] = frame.marks.get(place, "") or frame.marks.get((), "")
    label = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in place).lstrip(".") + "."
    return made, Frame(frame.base, {p: m for p, m in marks.items() if m}, frame.label + label)


def _merged(key: str, inherited: Any, value: Any, frame: Frame, place: Place) -> Any:
    """The value joined with the inherited one, or None where it simply takes its place."""
    if key in AXES:
        if not isinstance(value, dict) or "method" in value or inherited in (None, [], "none"):
            return None
        entries = inherited if isinstance(inherited, list) else [inherited]
        if len(entries) != 1:
            raise frame.error(place, f"{frame.key(place)} names no method, and the recipe has {len(entries)} there; add `method:`.")
        return {**(entries[0] if isinstance(entries[0], dict) else {"method": entries[0]}), **value}
    if key in ("train", "data", "helpers") and inherited is not None:
        below, above = (v if isinstance(v, dict) else {SHORT[key]: v} if key in SHORT else None for v in (inherited, value))
        return None if below is None or above is None else {**below, **above}
    return None
