"""Words of a command line that set an option of a method: `density=0.3`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def split_options(words: Iterable[str]) -> tuple[list[str], dict[str, Any]]:
    """What is named, and what is set; values are read as in a recipe."""
    import yaml

    words = list(words)
    options = {k: yaml.safe_load(v) for k, _, v in (w.partition("=") for w in words if is_option(w))}
    return [w for w in words if not is_option(w)], options


def is_option(word: str) -> bool:
    name, sign, _ = word.partition("=")
    return bool(sign) and name.isidentifier()
