"""Values against type annotations: a method's typed fields are its part of the recipe's schema."""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import math
import sys
import types
import typing
from typing import Any, Literal, get_args, get_origin

from luthier.errors import nearest

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "nothing (null)"}
_LISTS: dict[Any, Any] = {
    list: list, set: set, frozenset: frozenset, collections.abc.Sequence: list, collections.abc.Iterable: list, collections.abc.Collection: list,
}  # fmt: skip


class Misfit(Exception):
    """A value that is not of its type; the text says what is wanted."""


def fit(value: Any, hint: Any, lenient: bool = True) -> Any:
    """The value as the type wants it, or Misfit. `lenient` allows 1 for 1.0, "2e-4" for 0.0002 and one value for a list of one."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any or isinstance(hint, (typing.TypeVar, str)):
        return value
    if origin is typing.Annotated:
        return fit(value, args[0], lenient)
    if origin is Literal:
        return _choice(value, args)
    if origin in (typing.Union, types.UnionType):
        return _union(value, args, lenient)
    if hint is None or hint in _WORDS:
        return _plain(value, type(None) if hint is None else hint, lenient)
    kind = origin or hint
    if kind is tuple:
        return _tuple(value, args, lenient)
    if kind in _LISTS:
        return _LISTS[kind](_items(value, args[0] if args else Any, lenient))
    if kind in (dict, collections.abc.Mapping):
        return _mapping(value, args, lenient)
    if isinstance(kind, type) and kind is not collections.abc.Callable and not isinstance(value, kind):
        raise Misfit(f"a {kind.__name__}")
    return value


def _plain(value: Any, hint: Any, lenient: bool) -> Any:
    value = value.item() if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0 else value
    if type(value) is hint:
        good = hint is not float or not math.isnan(value)
    elif isinstance(value, bool) or not lenient:
        good = False
    elif hint is float and isinstance(value, (int, str)):
        value, good = _number(value)
    elif hint is int and isinstance(value, float):
        good = value.is_integer()
        value = int(value) if good else value
    else:
        good = isinstance(value, hint)
    if not good:
        quotes = " (write it in quotes)" if hint is str and isinstance(value, (int, float)) else ""
        raise Misfit(_WORDS[hint] + quotes)
    return value


def _number(value: int | str) -> tuple[Any, bool]:
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return value, False
    return number, not math.isnan(number)


def _choice(value: Any, choices: tuple[Any, ...]) -> Any:
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return choice
    if isinstance(value, bool):
        # YAML 1.1 takes the words on, yes, off and no for true and false.
        for word in ("on", "yes") if value else ("off", "no"):
            if word in choices:
                return word
    near = nearest(str(value), [str(c) for c in choices])
    raise Misfit("one of " + ", ".join(map(str, choices)) + (f".{near}" if near else ""))


def _union(value: Any, hints: tuple[Any, ...], lenient: bool) -> Any:
    """The first alternative that fits exactly, else the first that fits at all."""
    for strict in (False, True) if lenient else (False,):
        for hint in hints:
            try:
                return fit(value, hint, strict)
            except Misfit:
                continue
    raise Misfit(describe(typing.Union[hints]))  # noqa: UP007 - built from a tuple


def _items(value: Any, hint: Any, lenient: bool) -> list[Any]:
    if not isinstance(value, (list, tuple, set, frozenset)):
        if not lenient or isinstance(value, collections.abc.Mapping) or value is None:
            raise Misfit(f"a list, each entry {describe(hint)}")
        value = [value]
    try:
        return [fit(v, hint, lenient) for v in value]
    except Misfit as misfit:
        raise Misfit(f"a list, each entry {misfit}") from misfit


def _tuple(value: Any, args: tuple[Any, ...], lenient: bool) -> tuple[Any, ...]:
    if not args or (len(args) == 2 and args[1] is Ellipsis):
        return tuple(_items(value, args[0] if args else Any, lenient))
    if not isinstance(value, (list, tuple)) or len(value) != len(args):
        raise Misfit(f"a list of {len(args)}")
    return tuple(fit(v, h, lenient) for v, h in zip(value, args))


def _mapping(value: Any, args: tuple[Any, ...], lenient: bool) -> dict[Any, Any]:
    if not isinstance(value, collections.abc.Mapping):
        raise Misfit("keys with values ({key: value})")
    key, item = args or (Any, Any)
    try:
        return {fit(k, key, lenient): fit(v, item, lenient) for k, v in value.items()}
    except Misfit as misfit:
        raise Misfit(f"keys with values, each {misfit}") from misfit


def describe(hint: Any) -> str:
    """A type in words."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is None:
        return _WORDS[type(None)]
    if hint in _WORDS:
        return _WORDS[hint]
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(a) for a in args)
    if (origin or hint) in (list, tuple, set, frozenset):
        return "a list"
    return "keys with values" if (origin or hint) is dict else typename(hint)


def typename(hint: Any) -> str:
    """A type as written in source: `float | None`, `Literal['a', 'b']`."""
    if hint is type(None):
        return "None"
    if isinstance(hint, type) and not get_args(hint):
        return hint.__name__
    if get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join(typename(a) for a in get_args(hint))
    return str(hint).replace("typing.", "").replace("collections.abc.", "")


def types_of(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields. One that only a type checker can see counts as Any.

    Each is resolved where it was written, so that imports for type checkers elsewhere in the class do no harm."""
    found: dict[str, Any] = {}
    for item in dataclasses.fields(cls):
        owner = next(base for base in cls.__mro__ if item.name in inspect.get_annotations(base))
        holder = types.SimpleNamespace(__annotations__={item.name: inspect.get_annotations(owner)[item.name]})
        names = vars(sys.modules.get(owner.__module__, typing))
        try:
            found[item.name] = typing.get_type_hints(holder, globalns=dict(names), include_extras=True)[item.name]
        except (NameError, AttributeError, TypeError):
            found[item.name] = Any
    return found


def shown(value: Any) -> str:
    """A value as a message quotes it: short."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
