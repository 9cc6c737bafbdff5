"""A recipe: one value for every decision, from YAML, a dict or the command line; checked before anything is loaded.

    recipe = Recipe.load("recipe.yaml", ["adapt.rank=8"])
    recipe = Recipe.from_dict({"model": "smollm2-135m", "data": "train.jsonl", "objective": {"method": "asft", "kl": 0.05}})
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier import catalog
from luthier._recipe import layers, settings, source, write
from luthier._recipe.check import check
from luthier._recipe.choice import Choice, Frame, choices
from luthier._recipe.fit import shown
from luthier._recipe.settings import Data, Train
from luthier.catalog import AXES
from luthier.errors import RecipeError, nearest

__all__ = ["Choice", "Data", "Recipe", "StageEntry", "Train", "check"]

KEYS = ("name", "model", "models", "helpers", "data", *AXES, "train", "space", "stages", "run")
LISTS = ("curate", "synthesize", "adapt", "objective", "compress", "measure")
"""Axes that take several methods at once."""
DEFAULTS: dict[str, Any] = {"adapt": "lora", "optimize": "adamw", "measure": ["task", "forgetting", "calibration", "weights"]}
"""What an absent key means. An absent objective is chosen by the rows and the model; other absent axes do nothing."""
STAGE_KEYS = ("name", "start", "helpers", "data", *(a for a in AXES if a != "search"), "train")
LOOP_KEYS = ("stages", "times", "until", "start")
PRESETS = catalog.PACKAGE / "presets"
CONDITION = re.compile(r"\s*[\w./-]+\s*(>=|<=|>|<)\s*[-+.\deE]+\s*")


@dataclass
class StageEntry:
    """One element of `stages`: a stage with its whole recipe, or a loop over some."""

    recipe: Recipe | None = None
    name: str | None = None
    start: str = "previous"
    """What it starts from: "previous" (the stage or round before) or "base" (a stage: the run's model; a loop: where the loop began)."""
    loop: bool = False
    recipes: list[Recipe] = field(default_factory=list)
    """A loop's stages."""
    times: int = 1
    until: str | None = None


@dataclass
class Recipe:
    """What to run. Every axis is a list of `Choice`; `model` and `data` have no defaults."""

    name: str | None = None
    model: Any = None
    models: dict[str, Any] = field(default_factory=dict)
    helpers: dict[str, Any] = field(default_factory=dict)
    data: Data = field(default_factory=Data)
    select: list[Choice] = field(default_factory=list)
    curate: list[Choice] = field(default_factory=list)
    synthesize: list[Choice] = field(default_factory=list)
    adapt: list[Choice] = field(default_factory=list)
    objective: list[Choice] = field(default_factory=list)
    optimize: list[Choice] = field(default_factory=list)
    merge: list[Choice] = field(default_factory=list)
    compress: list[Choice] = field(default_factory=list)
    decode: list[Choice] = field(default_factory=list)
    measure: list[Choice] = field(default_factory=list)
    search: list[Choice] = field(default_factory=list)
    train: Train = field(default_factory=Train)
    space: dict[str, list[Any]] = field(default_factory=dict)
    stages: list[StageEntry] = field(default_factory=list)
    run: str | None = None
    raw: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """The recipe as written, overrides included."""
    frame: Frame = field(default_factory=lambda: Frame(Path()), repr=False, compare=False)

    # -- making ----------------------------------------------------------------------------------------------------------
    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
        """Read a YAML file (or a preset by its name) and put `key.sub=value` overrides over it."""
        file = Path(path)
        base = file.parent
        if not file.is_file():
            file, base = _preset(str(path)), Path()
        raw, marks = source.read(file, str(path))
        if not isinstance(raw, dict):
            raise RecipeError(f"{path}: a recipe is keys with values, such as `model: smollm2-135m`.")
        return cls._made(raw, Frame(base, marks), overrides)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], base: str | Path | None = None, overrides: Iterable[str] = ()) -> Recipe:
        """A recipe from plain values; models and rows may also be objects in memory. `base`: where relative paths start."""
        return cls._made(layers.tree(dict(values)), Frame(Path(base or ".")), overrides)

    @classmethod
    def _made(cls, raw: dict[str, Any], frame: Frame, overrides: Iterable[str]) -> Recipe:
        for text in [overrides] if isinstance(overrides, str) else overrides:
            source.override(raw, frame.marks, text, DEFAULTS)
        return cls._read(raw, frame)

    @classmethod
    def _read(cls, raw: dict[str, Any], frame: Frame) -> Recipe:
        """Everything that can be checked without importing a method."""
        _known(raw, KEYS, frame, ())
        made = cls(raw=raw, frame=frame, name=_text(raw, "name", frame), run=_text(raw, "run", frame))
        made.model = settings.model(raw.get("model"), frame, ("model",))
        made.models = {k: settings.model(v, frame, ("models", k)) for k, v in _mapping(raw, "models", frame).items() if v is not None}
        made.helpers = {k: _helper(v, frame, k) for k, v in _mapping(raw, "helpers", frame).items()}
        made.data = settings.data(raw.get("data"), frame)
        made.train = settings.train(raw.get("train"), frame)
        for axis in AXES:
            value = raw[axis] if axis in raw else DEFAULTS.get(axis)
            setattr(made, axis, choices(axis, value, frame, axis in LISTS, DEFAULTS.get(axis)))
        made.space = _space(raw, frame)
        made.stages = [_entry(s, raw, frame, ("stages", i)) for i, s in enumerate(_stages(raw, frame))]
        for choice in made.choices():
            choice.precheck()
        return made

    # -- asking ----------------------------------------------------------------------------------------------------------
    @property
    def base(self) -> Path:
        """The folder that relative paths start from."""
        return self.frame.base

    @property
    def budget(self) -> int | float | str | None:
        """How many rows `select` keeps; None: all."""
        return self.select[0].extras.get("budget") if self.select else None

    @property
    def merge_of(self) -> list[str] | None:
        """What `merge` combines: folders as absolute paths, other names as they are."""
        named = self.merge[0].extras.get("of") if self.merge else None
        return None if named is None else [write.model_id(n, self.frame) for n in named]

    def choices(self) -> list[Choice]:
        """All methods of this recipe, in the order of the axes."""
        return [c for axis in AXES for c in getattr(self, axis)]

    def stage_list(self) -> list[StageEntry]:
        """The stages; a recipe without any is one stage."""
        return self.stages or [StageEntry(recipe=self)]

    def stage_recipes(self) -> list[Recipe]:
        """The recipe of every stage, loops opened."""
        return [r for e in self.stage_list() for r in (e.recipes if e.loop else [e.recipe]) if r is not None]

    def model_spec(self, name: str | None = None) -> Any:
        """What `core.models.load` takes: a name, a folder, a mapping of options, or a model in memory. `name`: one of `models`."""
        spec = self.model if name is None else self.models[name]
        if spec is None:
            raise RecipeError("The recipe names no model; add `model:` (an embedded name, a hub id or a folder).")
        if hasattr(spec, "network"):
            return spec
        found = {**spec, "id": write.model_id(spec["id"], self.frame)}
        for key in {"tokenizer", "template"} & found.keys():
            beside = self.frame.path(found[key]) if "\n" not in found[key] else None
            found[key] = str(beside.resolve()) if beside is not None and beside.exists() else found[key]
        return found["id"] if len(found) == 1 else found

    def build_helpers(self) -> dict[str, Any]:
        """The helpers' functions by role. A class is called with the options beside its `call`, a function gets them at every call."""
        return {role: _built(spec, self.frame, role) for role, spec in self.helpers.items()}

    def objective_for(self, family: str, kind: str) -> list[Choice]:
        """The objectives; where the recipe has none, the plain one for a family of models and a kind of rows."""
        if self.objective:
            return self.objective
        plain = {"preference": "dpo", "pairs": "info-nce", "image-text": "info-nce", "prompt": "grpo"}
        name = plain.get(kind, "classify" if kind.endswith("-label") else "sft")
        return choices("objective", name, self.frame, True)

    # -- changing --------------------------------------------------------------------------------------------------------
    def with_values(self, point: Mapping[str, Any]) -> Recipe:
        """The same recipe with other values under dotted keys: {"adapt.rank": 8}."""
        raw, marks = layers.tree(self.raw), dict(self.frame.marks)
        for key, value in point.items():
            source.put(raw, marks, key, value, f"{key}={value}", DEFAULTS)
        return self._read(raw, Frame(self.frame.base, marks, self.frame.label))

    def without(self, *keys: str) -> Recipe:
        """The same recipe without some of its keys."""
        raw = {k: v for k, v in layers.tree(self.raw).items() if k not in keys}
        return self._read(raw, self.frame)

    # -- writing ---------------------------------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        """The recipe as written, with its overrides: `from_dict` of it (with the same `base`) gives it back."""
        return layers.tree(self.raw)

    def to_yaml(self) -> str:
        """The whole recipe with defaults stated and paths made absolute, so that it means the same anywhere."""
        return write.to_yaml(self)


# -- parts ---------------------------------------------------------------------------------------------------------------


def _preset(name: str) -> Path:
    file = PRESETS / f"{name.replace('-', '_')}.yaml"
    if re.fullmatch(r"[\w-]+", name) and file.is_file():
        return file
    if Path(name).is_dir():
        raise RecipeError(f"{name} is a folder, not a recipe.")
    known = sorted(p.stem.replace("_", "-") for p in PRESETS.glob("*.yaml"))
    raise RecipeError(f"There is no recipe file {name}.{nearest(name, known)}")


def _known(values: Any, known: tuple[str, ...], frame: Frame, place: source.Place) -> None:
    for key in values:
        if key not in known:
            where = f"{frame.key(place)}.{key}" if place else f"{frame.label}{key}"
            axis = next((f" It is a method; write `{e.axis}: {e.name}`." for e in catalog.entries() if e.name == key), "")
            raise frame.error((*place, key), f"{where} is no key of a recipe.{axis or nearest(key, known) or ' The keys are: ' + ', '.join(known) + '.'}")


def _text(raw: Mapping[str, Any], key: str, frame: Frame) -> str | None:
    value = raw.get(key)
    return str(value) if isinstance(value, Path) else frame.fit((key,), value, str | None)


def _mapping(raw: Mapping[str, Any], key: str, frame: Frame) -> Mapping[str, Any]:
    value = raw.get(key) or {}
    if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
        raise frame.error((key,), f"{frame.label}{key} is {shown(value)}; it must be names with values ({{name: value}}).")
    return value


def _helper(value: Any, frame: Frame, role: str) -> Any:
    call = value.get("call") if isinstance(value, Mapping) else value
    if callable(call):
        return value
    if not isinstance(call, str) or not re.search(r"\.py:\w+$", call):
        raise frame.error(("helpers", role), f"helpers.{role} is {shown(value)}; it must be './FILE.py:FUNCTION' or {{call: ./FILE.py:FUNCTION, option: value}}.")
    if not frame.path(call.rpartition(":")[0]).is_file():
        raise frame.error(("helpers", role), f"helpers.{role}: the file {frame.path(call.rpartition(':')[0])} does not exist.")
    return value


def _built(value: Any, frame: Frame, role: str) -> Any:
    options = {k: v for k, v in value.items() if k != "call"} if isinstance(value, Mapping) else {}
    call = value["call"] if isinstance(value, Mapping) else value
    try:
        found = call if callable(call) else catalog.user_object(write.spec_of(call, frame))
        if isinstance(found, type):
            return found(**options)
    except (RecipeError, TypeError, ValueError) as error:
        raise frame.error(("helpers", role), f"helpers.{role}: {error}") from error
    return functools.partial(found, **options) if options else found


def _space(raw: Mapping[str, Any], frame: Frame) -> dict[str, list[Any]]:
    space = dict(_mapping(raw, "space", frame))
    for key, values in space.items():
        if not isinstance(values, (list, tuple)) or not values:
            raise frame.error(("space", key), f"space.{key} is {shown(values)}; it must be a list of choices.")
        if key.split(".")[0] not in KEYS:
            raise frame.error(("space", key), f"space: '{key}' is no key of a recipe.{nearest(key.split('.')[0], KEYS)}")
    return space


def _stages(raw: Mapping[str, Any], frame: Frame) -> list[Any]:
    stages = raw.get("stages")
    if stages is None:
        return []
    if not isinstance(stages, list) or not stages:
        raise frame.error(("stages",), f"{frame.label}stages must be a list of recipes, each with what differs from the top.")
    return stages


def _entry(stage: Any, top: dict[str, Any], frame: Frame, place: source.Place) -> StageEntry:
    key = frame.key(place)
    if not isinstance(stage, dict):
        raise frame.error(place, f"{key} is {shown(stage)}; it must be a recipe's keys with what differs from the top.")
    if "loop" in stage:
        _known(stage, ("loop", "name"), frame, place)
        return _loop(stage, top, frame, place)
    for name in ("model", "models", "search", "space", "stages", "run"):
        if name in stage:
            raise frame.error((*place, name), f"{key} cannot have '{name}'; it belongs at the top. A stage starts from the previous one's model, or with `start: base` from the run's.")
    _known(stage, STAGE_KEYS, frame, place)
    own = {k: v for k, v in stage.items() if k != "start"}
    raw, within = layers.overlay(top, own, frame, place, DEFAULTS)
    return StageEntry(Recipe._read(raw, within), _text(own, "name", within), _start(stage, frame, place))


def _loop(stage: dict[str, Any], top: dict[str, Any], frame: Frame, place: source.Place) -> StageEntry:
    loop, at = stage["loop"], (*place, "loop")
    key = frame.key(at)
    if not isinstance(loop, dict) or not isinstance(loop.get("stages"), list) or not loop["stages"]:
        raise frame.error(at, f"{key} must have `stages:`, a list, and `times:`.")
    _known(loop, LOOP_KEYS, frame, at)
    inner = [_entry(s, top, frame, (*at, "stages", i)) for i, s in enumerate(loop["stages"])]
    if any(e.loop or e.start != "previous" for e in inner):
        raise frame.error(at, f"{key}: a loop's stages follow each other; they can neither loop nor say `start`. The loop itself may say `start`.")
    times, until = frame.fit((*at, "times"), loop.get("times", 1), int), frame.fit((*at, "until"), loop.get("until"), str | None)
    if times < 1:
        raise frame.error((*at, "times"), f"{key}.times is {times}; it must be at least 1.")
    if until is not None and not CONDITION.fullmatch(until):
        raise frame.error((*at, "until"), f"{key}.until is {shown(until)}; write a measure's number and a bound, e.g. 'task/exact_match >= 0.9'.")
    return StageEntry(None, frame.fit((*place, "name"), stage.get("name"), str | None), _start(loop, frame, at), True, [e.recipe for e in inner if e.recipe], times, until)


def _start(values: Mapping[str, Any], frame: Frame, place: source.Place) -> str:
    start = values.get("start", "previous")
    if start not in ("base", "previous"):
        raise frame.error((*place, "start"), f"{frame.key((*place, 'start'))} is {shown(start)}; it must be 'base' or 'previous'.")
    return str(start)
