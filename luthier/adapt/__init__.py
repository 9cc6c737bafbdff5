"""The axis `adapt`: which weights move."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.plugin import Parts, Plugin

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


class Adapter(Plugin):
    """`attach` decides what trains, `folded` gives the model as it will be used, `export` writes it."""

    switchable: bool = False
    """Whether `disabled(model)` gives back exactly the model as it was before `attach`."""

    def attach(self, model: Family, ctx: Context | None = None) -> Parts:
        raise NotImplementedError

    def disabled(self, model: Family) -> AbstractContextManager[Any]:
        """The model without this adapter, exactly; only where `switchable`."""
        return nullcontext()

    def export(self, model: Family, directory: Path) -> None:
        """Write what plain transformers or peft loads (default: the folded network, whole)."""
        from luthier.core.models import save_network

        with self.folded(model) as merged:
            save_network(merged, directory)
