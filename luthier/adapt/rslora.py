"""Rank-stabilised LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.adapt._shared import LoraLike
from luthier.catalog import register

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("rslora", wraps="peft.LoraConfig")
@dataclass
class RsLora(LoraLike):
    """LoRA scaled by alpha / sqrt(rank) instead of alpha / rank, so that high ranks learn as fast as low ones.

    y = W x + alpha / sqrt(r) B A x (rank-stabilised LoRA)."""


    def config(self, model: Family, ctx: Context | None = None) -> Any:
        return self.lora(model, use_rslora=True)
