"""The axis `decode`: how answers are made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from luthier.core.plugin import Plugin

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


class Decoder(Plugin):
    """`wrap` gives a family like the one it wraps, with verbs overridden."""

    def wrap(self, models: Mapping[str, Family] | Family, ctx: Context | None = None) -> Family:
        """`models`: the tuned model as "model", and whatever others the method names."""
        raise NotImplementedError
