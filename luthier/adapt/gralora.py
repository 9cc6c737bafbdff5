"""GraLoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.adapt._shared import Targeted
from luthier.catalog import register

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("gralora", wraps="peft.GraloraConfig")
@dataclass
class GraLora(Targeted):
    """Cut every weight into k x k blocks with a small LoRA each: the parameters of one LoRA, k times its effective rank.

    Block (i, j) gets B_ij A_ij of rank r / k; `hybrid` ranks go to a plain LoRA besides (granular LoRA)."""

    rank: int = 32
    """Rank as LoRA counts it."""
    alpha: float = 64.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout on the update's input."""
    blocks: int = 2
    """k: blocks a side; rank must be divisible by it."""
    hybrid: int = 0
    """Rank of the plain LoRA besides."""

    positive = ("rank", "alpha", "blocks",)
    shares = ("dropout",)

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft import GraloraConfig

        return GraloraConfig(
            r=self.rank, alpha=self.alpha, gralora_dropout=self.dropout, gralora_k=self.blocks, hybrid_r=self.hybrid,  # type: ignore[arg-type]  # peft says int and takes any number
            **self.common(model),
        )
