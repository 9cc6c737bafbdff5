"""The axis `compress`: what the model weighs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from luthier.core.plugin import Plugin

if TYPE_CHECKING:
    from luthier.core.context import Context


class Compressor(Plugin):
    """A model (or a state dict, or an update) in, a lighter one out. May `attach` and train first."""

    report: dict[str, Any]
    tunes: ClassVar[bool] = False
    """It compresses while the model is tuned, so it cannot be applied to a finished one."""

    def compress(self, model: Any, ctx: Context | None = None) -> Any:
        raise NotImplementedError
