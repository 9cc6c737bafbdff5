"""Super and Supra."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.adapt._shared import Targeted
from luthier.catalog import register

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("supertuning", wraps="peft.SupertuningConfig")
@dataclass
class Supertuning(Targeted):
    """Train the entries of largest magnitude, chosen once; with a rank, a LoRA besides (Supra).

    W' = W + scatter(phi at the top share of |W|) [+ (alpha / r) B A]."""

    sparsity: float = 0.99
    """Share of entries that stay frozen."""
    largest: bool = True
    """Train the largest entries (else the smallest)."""
    rank: int | None = None
    """Rank of the LoRA besides; default: none."""
    alpha: float | None = None
    """Its scale alpha / rank; default: 2 x rank."""
    dropout: float = 0.0
    """Dropout on the update's input."""

    positive = ("rank", "alpha",)
    shares = ("sparsity", "dropout",)

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft import SupertuningConfig

        return SupertuningConfig(
            sparsity=self.sparsity, select_top=self.largest, r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout,
            **self.common(model),
        )
