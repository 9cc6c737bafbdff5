"""DoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.adapt._shared import LoraLike
from luthier.catalog import register

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("dora", wraps="peft.LoraConfig")
@dataclass
class Dora(LoraLike):
    """Split every weight into a direction, which LoRA changes, and a length per output, which is learned directly.

    W' = m (W + s B A) / ||W + s B A||_row, with m started at ||W||_row (weight-decomposed low-rank adaptation). Slower a step than
    LoRA; helps most at small ranks."""


    def config(self, model: Family, ctx: Context | None = None) -> Any:
        return self.lora(model, use_dora=True)
