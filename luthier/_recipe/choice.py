"""One value of an axis: a method's name with its options, and where in the recipe they stand."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier import catalog
from luthier._recipe.fit import Misfit, fit, shown, types_of
from luthier._recipe.schema import sole_method, static_types
from luthier._recipe.source import RESERVED, Marks, Place
from luthier.errors import RecipeError, UserError, nearest

ROOT: Place = ()


@dataclass
class Frame:
    """Where a recipe's values come from, for messages and for relative paths."""

    base: Path
    """The folder that relative paths start from."""
    marks: Marks = field(default_factory=dict)
    label: str = ""
    """What stands before every key in a message: "stages[0]." in a stage."""

    def error(self, place: Place, sentence: str) -> RecipeError:
        """The sentence, with the file and line of the nearest known place before it."""
        for end in range(len(place), -1, -1):
            if place[:end] in self.marks:
                return RecipeError(f"{self.marks[place[:end]]}: {sentence}")
        return RecipeError(sentence)

    def line(self, place: Place) -> int | None:
        """The line of a value in its file, if it came from one."""
        found = re.search(r":(\d+)$", self.marks.get(place, ""))
        return int(found[1]) if found else None

    def key(self, place: Place) -> str:
        """A place as the user writes it: objective[1].kl."""
        text = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in place)
        return self.label + text.lstrip(".")

    def fit(self, place: Place, value: Any, hint: Any) -> Any:
        """The value as the type wants it."""
        try:
            return fit(value, hint)
        except Misfit as misfit:
            end = "" if str(misfit).endswith("?") else "."
            raise self.error(place, f"{self.key(place)} is {shown(value)}; it must be {misfit}{end}") from misfit

    def path(self, text: str) -> Path:
        """A path as the recipe writes it, from its folder."""
        path = Path(text).expanduser()
        return path if path.is_absolute() else self.base / path


@dataclass
class Choice:
    """A method with the options that the recipe gives it. `build` makes it."""

    axis: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    line: int | None = field(default=None, compare=False)
    extras: dict[str, Any] = field(default_factory=dict)
    """What the recipe itself says about the choice: weight, budget, of. A method's own field of that name receives it instead."""
    frame: Frame = field(default_factory=lambda: Frame(Path()), repr=False, compare=False)
    place: Place = field(default=ROOT, repr=False, compare=False)

    @property
    def spec(self) -> str:
        """The method's name, or its file as an absolute path."""
        if ".py" not in self.method:
            return self.method
        file, sign, name = self.method.partition(":")
        return f"{self.frame.path(file).resolve()}{sign}{name}"

    @property
    def weight(self) -> float:
        """What an objective's loss is multiplied by."""
        return 1.0 if "weight" in self._own() else float(self.extras.get("weight", 1.0))

    def _own(self) -> set[str]:
        """Reserved words that the method has as fields."""
        return {f.name for f in catalog.fields_of(self.load())} & set(self.extras) if self.extras else set()

    def load(self) -> type:
        """The method's class."""
        try:
            return catalog.method(self.axis, self.spec)
        except RecipeError as error:
            raise self.frame.error((*self.place, "method"), f"{self.frame.key(self.place)}: {error}") from error

    def build(self) -> Any:
        """The method with these options, every one checked against its field."""
        cls = self.load()
        fields = {f.name: f for f in catalog.fields_of(cls)}
        given = self.options | {k: self.extras[k] for k in self._own()}
        values = self._fitted(given, self._types(cls))
        for name, item in fields.items():
            required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
            if required and name not in values:
                raise self._error(None, f"{self.frame.key(self.place)}: '{self.method}' needs a value for '{name}'.")
        try:
            return cls(**values)
        except (UserError, ValueError, TypeError) as error:
            at = next((k for k in given if re.search(rf"\b{re.escape(k)}\b", str(error))), None)
            raise self._error(at, f"{self.frame.key(self.place)} '{self.method}': {error}") from error

    def precheck(self) -> None:
        """The options against the fields, read from the source: nothing is imported."""
        if ".py" in self.method:
            file, _, name = self.spec.partition(":")
            path, class_name = Path(file), name or sole_method(Path(file))
        elif catalog.is_registered(self.axis, self.method):
            self._fitted(self.options, self._types(self.load()))
            return
        else:
            entry = catalog.find(self.axis, self.method)
            path, class_name = entry.path, entry.class_name
        types = static_types(path, class_name) if class_name else None
        if types is not None:
            self._fitted(self.options, types)

    @staticmethod
    def _types(cls: type) -> dict[str, Any]:
        fields = catalog.fields_of(cls)
        types = types_of(cls) if fields else {}
        return {f.name: types[f.name] for f in fields}

    def _fitted(self, given: dict[str, Any], types: dict[str, Any]) -> dict[str, Any]:
        """The given values as their types want them."""
        for name in given:
            if name not in types:
                raise self._error(name, f"{self.frame.key((*self.place, name))} is no field of '{self.method}'.{_known(name, list(types))}")
        return {k: self.frame.fit((*self.place, k), v, types[k]) for k, v in given.items()}

    def _error(self, name: str | None, sentence: str) -> RecipeError:
        return self.frame.error(self.place if name is None else (*self.place, name), sentence)

    def to_dict(self) -> dict[str, Any]:
        """As the recipe has it, with a method file's whole path."""
        return {"method": self.spec, **self.extras, **self.options}


def _known(name: str, fields: list[str]) -> str:
    return nearest(name, fields) or (f" Its fields are: {', '.join(fields)}." if fields else " It has no fields.")


def choices(axis: str, value: Any, frame: Frame, many: bool, default: Any = None) -> list[Choice]:
    """What a recipe says on an axis: a name, a mapping, or a list of them."""
    if value is None or value == "none" or value == []:
        if axis in ("adapt", "optimize") and value is not default:
            raise frame.error((axis,), f"{frame.key((axis,))} cannot be empty; leave the key out for the default '{default}'.")
        return []
    if not isinstance(value, (list, tuple)):
        return [_choice(axis, value, frame, (axis,), default)]
    if not many and len(value) > 1:
        raise frame.error((axis, 1), f"{frame.key((axis,))} takes one method, not {len(value)}; use stages for several in turn.")
    return [_choice(axis, item, frame, (axis, i), default) for i, item in enumerate(value)]


def _choice(axis: str, value: Any, frame: Frame, place: Place, default: Any) -> Choice:
    key = frame.key(place)
    if isinstance(value, str):
        value = {"method": value}
    if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
        raise frame.error(place, f"{key} is {shown(value)}; it must be a method's name, or {{method: NAME, field: value}}.")
    method = value.get("method", default if isinstance(default, str) else None)
    if not isinstance(method, str) or not method:
        raise frame.error(place, f"{key} names no method; add `method:`. `luthier methods {axis}` lists them.")
    extras = {k: v for k, v in value.items() if k in RESERVED.get(axis, ())}
    _check_extras(extras, frame, place)
    options = {k: v for k, v in value.items() if k != "method" and k not in extras}
    named = _named(axis, method, frame, place)
    line = frame.line((*place, "method")) or frame.line(place)
    return Choice(axis, named, options, line, extras, frame, place)


def _named(axis: str, method: str, frame: Frame, place: Place) -> str:
    """The method's name as the catalogue has it; nothing is imported."""
    at = (*place, "method")
    if ".py" in method:
        file = frame.path(method.partition(":")[0])
        if not file.is_file():
            raise frame.error(at, f"{frame.key(place)}: the method file {file} does not exist.")
        return method
    if catalog.is_registered(axis, method):
        return method
    try:
        return catalog.find(axis, method).name
    except RecipeError as error:
        raise frame.error(at, str(error)) from error


def _check_extras(extras: dict[str, Any], frame: Frame, place: Place) -> None:
    for name, value in extras.items():
        at = (*place, name)
        if name == "weight":
            extras[name] = frame.fit(at, value, float)
        elif name == "of":
            extras[name] = frame.fit(at, value, list[str])
        elif not _is_budget(value):
            raise frame.error(at, f"{frame.key(at)} is {shown(value)}; it must be a count (400), a share (0.25) or '25%'.")


def _is_budget(value: Any) -> bool:
    if isinstance(value, str):
        text = value.strip().removesuffix("%")
        try:
            number = float(text)
        except ValueError:
            return False
        return 0 < number <= 100 if value.strip().endswith("%") else number >= 1
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf"))
