"""The axis `search`: which recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from luthier.core.plugin import Plugin

if TYPE_CHECKING:
    from luthier.core.context import Context


class Searcher(Plugin):
    """`search` asks `trial` for the values of points of `space` and returns the points worth having."""

    def search(self, space: Mapping[str, list[Any]], trial: Callable[[dict[str, Any]], Mapping[str, float]], ctx: Context | None = None) -> list[dict[str, Any]]:
        """`space`: recipe keys to their choices. `trial(point)` returns metrics; equal points are never tried twice."""
        raise NotImplementedError
