"""References made from the code: the command line from its parser, the recipe from its dataclasses, rows from the conventions."""

from __future__ import annotations

import argparse
from typing import Any

from luthier._cli.explain import fields
from luthier.catalog import AXES
from luthier.report.atlas import code, fenced, plain, table
from luthier.report.atlas_methods import decides

WIDE = 92
"""Columns of a usage line, so that it does not depend on whose terminal builds the site."""
SECTIONS = {"name": "names", "run": "names", "model": "models", "helpers": "models", "space": "search"}
"""Where the page on recipes speaks of a key, if not under its own name."""


def commands() -> str:
    """Every command with its usage and arguments."""
    from luthier.cli import _parser

    parser = _parser()
    lines = []
    for name, one in _subparsers(parser).items():
        one.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=WIDE)
        lines += [f"## luthier {name} {{ #{name} }}", "", _sentence(one.description), "", fenced(one.format_usage().removeprefix("usage: ").rstrip(), "console"), ""]
        rows = [_argument(a) for a in one._actions if not isinstance(a, argparse._HelpAction)]
        lines += [table(("argument", "what it does", "default"), rows), ""] if rows else []
    return "\n".join(lines)


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return {name: one for a in parser._actions if isinstance(a, argparse._SubParsersAction) for name, one in a.choices.items()}


def _argument(action: argparse.Action) -> list[str]:
    value = action.metavar or (action.dest.upper() if action.option_strings and action.nargs != 0 else action.dest)
    names = ", ".join(action.option_strings) or str(value)
    shown = f"{names} {value}" if action.option_strings and action.nargs != 0 else names
    choices = f" One of {', '.join(code(c) for c in action.choices)}." if action.choices else ""
    default = "" if action.default in (None, False, [], argparse.SUPPRESS) or action.nargs == 0 else code(action.default)
    return [code(shown), _sentence(action.help) + choices, default]


def _sentence(text: str | None) -> str:
    """Help text as a sentence."""
    words = plain(text or "").strip()
    return words and words[:1].upper() + words[1:] + ("" if words.endswith((".", "?")) else ".")


# -- the recipe ----------------------------------------------------------------------------------------------------------


def recipe_keys() -> str:
    """The keys of a recipe, from its dataclass."""
    from luthier.recipe import KEYS, Recipe

    known = {f["name"]: f for f in fields(Recipe)}
    return table(("key", "type", "what it says"), [[_key(k), _type(k, known[k]), _about(k, known[k])] for k in KEYS])


def _key(key: str) -> str:
    if key in ("train", "data"):
        return f"[`{key}`](#{key})"
    return f"[`{key}`](axes.md#{key})" if key in AXES else f"`{key}`"


TYPES = {
    "str | None": "text", "Any": "text or mapping", "Data": "source or mapping", "Train": "mapping", "dict[str, Any]": "mapping", "dict[str, list[Any]]": "mapping of lists",
    "list[luthier.recipe.StageEntry]": "list of recipes",
}  # fmt: skip
"""Types of the dataclass as a recipe's writer sees them."""


def _type(key: str, field: dict[str, Any]) -> str:
    from luthier.recipe import LISTS

    if key in AXES:
        return "method or list" if key in LISTS else "method"
    return TYPES.get(field["type"], field["type"])


def _about(key: str, field: dict[str, Any]) -> str:
    """What an axis decides, what the field says of itself, else where the page speaks of it."""
    if key in AXES:
        return decides(key)
    section = SECTIONS.get(key, key)
    return plain(field["doc"]) or f"see [{section}](#{section})"


def settings(which: str) -> str:
    """The keys under `train` or `data`, from their dataclasses."""
    from luthier.recipe import Data, Train

    rows = []
    for f in fields({"train": Train, "data": Data}[which]):
        if f["name"] != "streams":
            rows.append([code(f["name"]), code(f["type"]), code("null" if f["default"] is None else f["default"]), plain(f["doc"])])
    return table((f"{which}.", "type", "default", "what it does"), rows)


def streams() -> str:
    """The row streams that methods commonly ask for."""
    from luthier._recipe.settings import STREAMS

    return ", ".join(code(s) for s in STREAMS)


def kinds_of_rows() -> str:
    """What columns make what kind of rows, and the other names that are understood."""
    from luthier.core.columns import ALIASES, REQUIRED

    kinds = table(("kind", "columns"), [[plain(kind), " + ".join(code(c) for c in columns)] for kind, columns in REQUIRED.items()])
    names = table(("column", "also read from"), [[code(column), ", ".join(code(a) for a in others)] for column, others in ALIASES.items()])
    return f"{kinds}\n\nOther names that are read as these, and you are told:\n\n{names}"
