"""The axis `curate`: which rows are dropped, fixed or reweighted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from luthier.core.plugin import Plugin

if TYPE_CHECKING:
    from luthier.core.context import Context


class Curator(Plugin):
    """Rows in, rows out; the input is not changed. `report` says what happened to how many and why."""

    report: dict[str, Any]

    def curate(self, rows: Any, ctx: Context | None = None) -> Any:
        """The rows to learn from. A row's weight goes into its column `weight`."""
        raise NotImplementedError
