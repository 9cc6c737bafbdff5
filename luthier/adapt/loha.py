"""LoHa."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.adapt._shared import Targeted
from luthier.catalog import register

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("loha", wraps="peft.LoHaConfig")
@dataclass
class Loha(Targeted):
    """The update is an element-wise product of two low-rank products, which reaches rank r^2 with the parameters of rank 2r.

    W' = W + (alpha / r) (B1 A1) * (B2 A2) (low-rank Hadamard product)."""

    rank: int = 8
    """Rank of the update."""
    alpha: float = 8.0
    """The update is scaled by alpha / rank."""
    rank_dropout: float = 0.0
    """Dropout over rank dimensions."""
    module_dropout: float = 0.0
    """Dropout of whole layers' updates."""

    positive = ("rank", "alpha",)
    shares = ("rank_dropout", "module_dropout",)

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft import LoHaConfig

        return LoHaConfig(
            r=self.rank, alpha=self.alpha, rank_dropout=self.rank_dropout, module_dropout=self.module_dropout,  # type: ignore[arg-type]  # peft says int and takes any number
            **self.common(model),
        )
