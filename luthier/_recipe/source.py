"""YAML to plain values with the place of every one, and `key.sub=value` overrides on top of them."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from luthier.catalog import AXES
from luthier.errors import RecipeError

Place = tuple[str | int, ...]
Marks = dict[Place, str]
"""Where a value stands, by its way from the top: ("adapt", "rank") -> "recipe.yaml:12"."""

LIMIT = 20_000
"""Values a recipe may hold, with every use of an anchor counted: a few lines of nested anchors can mean billions."""
RESERVED = {"select": ("budget",), "objective": ("weight",), "merge": ("of",)}
"""What the recipe itself may say about a choice of an axis, next to the method's own fields."""


class _Loader(yaml.SafeLoader):
    """The safe loader, which also reads 2e-4 as a number (YAML 1.1 takes it for a text)."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


@dataclass
class _Reader:
    loader: _Loader
    name: str
    marks: Marks = field(default_factory=dict)
    read: int = 0

    def value(self, node: yaml.Node, place: Place, above: frozenset[int] = frozenset()) -> Any:
        line = f"{self.name}:{node.start_mark.line + 1}"
        self.marks.setdefault(place, line)
        self.read += 1
        if self.read > LIMIT or id(node) in above:
            raise RecipeError(f"{line}: the anchors of this file repeat themselves without end.")
        above = above | {id(node)}
        if isinstance(node, yaml.CollectionNode) and node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
            raise RecipeError(f"{line}: could not determine a constructor for the tag '{node.tag}'.")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, place, above)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(child, (*place, i), above) for i, child in enumerate(node.value)]
        try:
            return self.loader.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            raise RecipeError(f"{line}: {getattr(error, 'problem', None) or error}.") from error

    def _mapping(self, node: yaml.MappingNode, place: Place, above: frozenset[int]) -> dict[Any, Any]:
        made: dict[Any, Any] = {}
        inherited: dict[Any, Any] = {}
        for key_node, child in node.value:
            line = f"{self.name}:{key_node.start_mark.line + 1}"
            if key_node.tag == "tag:yaml.org,2002:merge":
                inherited |= self._inherited(child, place, above, line)
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError(f"{line}: a key must be a plain word.")
            key = self.loader.construct_object(key_node)
            # A key called on, off, yes or no is a word, whatever YAML 1.1 says.
            key = key_node.value if isinstance(key, bool) else key
            if key in made:
                raise RecipeError(f"{line}: the key '{key}' is given twice; the first is at {self.marks[(*place, key)]}.")
            self.marks[(*place, key)] = line
            made[key] = self.value(child, (*place, key), above)
        return {**inherited, **made}

    def _inherited(self, node: yaml.Node, place: Place, above: frozenset[int], line: str) -> dict[Any, Any]:
        """What `<<: *anchor` brings in."""
        found: dict[Any, Any] = {}
        for part in reversed(node.value) if isinstance(node, yaml.SequenceNode) else [node]:
            if not isinstance(part, yaml.MappingNode):
                raise RecipeError(f"{line}: '<<' takes an anchor of keys with values.")
            found |= self._mapping(part, place, above)
        return found


def parse(text: str, name: str) -> tuple[Any, Marks]:
    """The value of a YAML text and where each part of it stands."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return {}, {}
        reader = _Reader(loader, name)
        return reader.value(node, ()), reader.marks
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise RecipeError(f"{name}{line}: this is no valid YAML: {error.problem or error.context}.") from error
    except (yaml.YAMLError, RecursionError) as error:
        reason = getattr(error, "reason", None) or str(error).splitlines()[0]
        raise RecipeError(f"{name}: this is no valid YAML: {reason}.") from error
    finally:
        if loader is not None:
            loader.dispose()


def read(path: Path, name: str) -> tuple[Any, Marks]:
    """The value of a YAML file."""
    try:
        return parse(path.read_text(encoding="utf-8"), name)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{name} is no UTF-8 text.") from error
    except OSError as error:
        raise RecipeError(f"{name} cannot be read: {error.strerror or error}.") from error


# -- overrides -----------------------------------------------------------------------------------------------------------


def override(raw: dict[str, Any], marks: Marks, text: str, defaults: Mapping[str, Any]) -> None:
    """Put `key.sub=value` into a recipe's raw values, in place."""
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise RecipeError(f"'{text}' is no override; write key=value, e.g. adapt.rank=8 or objective.method=sft.")
    key = key.strip()
    put(raw, marks, key, _typed(key, value.strip()), text, defaults)


def _typed(key: str, text: str) -> Any:
    value, _ = parse(text, key)
    head = key.split(".")[0]
    if isinstance(value, str) and "," in text and text[0] not in "\"'" and (head in AXES or head in ("train", "stages")):
        return [parse(part.strip(), key)[0] for part in text.split(",")]
    return None if value == {} and not text.startswith("{") else value


def put(raw: dict[str, Any], marks: Marks, key: str, value: Any, mark: str, defaults: Mapping[str, Any]) -> None:
    """Set one value by its dotted key, in place. What stood there as a bare name becomes a mapping where the key goes deeper.

    An axis with one entry needs no number; with several the key names one by number or method: objective.sft.weight."""
    here, place, last = _way(raw, key.split("."), key, defaults)
    if last == "method" and isinstance(here, dict) and here.get("method", value) != value:
        # Another method: the fields of the former one mean nothing to it.
        axis = next((p for p in reversed(place) if p in AXES), "")
        for name in [k for k in here if k not in RESERVED.get(str(axis), ())]:
            del here[name]
    here[last] = value
    for known in [m for m in marks if m[: len(place) + 1] == (*place, last)]:
        del marks[known]
    marks[(*place, last)] = mark
    for end in range(1, len(place) + 1):
        marks.setdefault(place[:end], mark)


def _way(here: Any, parts: list[str], key: str, defaults: Mapping[str, Any]) -> tuple[Any, Place, str | int]:
    """The list or mapping that holds a key's last part, its place, and that part."""
    place: Place = ()
    i = 0
    while i < len(parts) - 1:
        step: Any = _index(here, parts[i], key) if isinstance(here, list) else parts[i]
        child = here[step] if isinstance(here, list) else here.get(step)
        if child is None and not place:
            child = copy.deepcopy(defaults.get(parts[i]))
        if isinstance(child, list) and step in AXES:
            found, named = _which(child, parts[i + 1], key)
            here[step] = child
            here, place, step = child, (*place, step), found
            if named and i + 2 == len(parts):
                return here, place, step
            child, i = child[found], i + named
        if not isinstance(child, (dict, list)):
            # A bare value becomes the mapping it stands for.
            child = {} if child is None else {{"data": "train", "model": "id"}.get(str(step), "method"): child}
            here[step] = child
        here, place, i = child, (*place, step), i + 1
    return here, place, _index(here, parts[-1], key) if isinstance(here, list) else parts[-1]


def _which(entries: list[Any], part: str, key: str) -> tuple[int, bool]:
    """Which entry of an axis a key means, and whether the part was used up to say so."""
    names = [e.get("method") if isinstance(e, dict) else e for e in entries]
    if names.count(part) == 1:
        return names.index(part), True
    if part.isdigit():
        return _index(entries, part, key), True
    if len(entries) != 1:
        raise RecipeError(f"{key}: this axis has {len(entries)} entries; name one by its number or method, e.g. {key.split('.')[0]}.0.")
    return 0, False


def _index(items: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise RecipeError(f"{key}: '{part}' is no entry of a list of {len(items)}; the first is 0.")
    return int(part)
