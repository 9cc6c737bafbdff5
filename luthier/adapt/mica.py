"""MiCA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.adapt._shared import LoraLike
from luthier.catalog import register

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("mica", wraps="peft.LoraConfig")
@dataclass
class Mica(LoraLike):
    """Train only inside the directions that the pretrained weight uses least: B holds the minor left singular vectors and stays fixed.

    W = U S V^T; B = the last r columns of U, frozen; A starts at 0 and trains (minor component adaptation)."""


    def config(self, model: Family, ctx: Context | None = None) -> Any:
        return self.lora(model, init_lora_weights="mica")
