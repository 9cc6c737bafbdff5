"""The axis `synthesize`: which rows are made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from luthier.core.plugin import Plugin

if TYPE_CHECKING:
    from luthier.core.context import Context


class Synthesizer(Plugin):
    """Rows in, rows out: the given ones with what was made of them, or only what was made. The input is not changed."""

    report: dict[str, Any]

    def synthesize(self, rows: Any, ctx: Context | None = None) -> Any:
        raise NotImplementedError
