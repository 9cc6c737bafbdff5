"""LoKr."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.adapt._shared import Targeted
from luthier.catalog import register

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("lokr", wraps="peft.LoKrConfig")
@dataclass
class Lokr(Targeted):
    """The update is a Kronecker product of a small matrix and a low-rank one: few parameters, high rank.

    W' = W + (alpha / r) C kron (B A) (low-rank Kronecker product)."""

    rank: int = 8
    """Rank of the update."""
    alpha: float = 8.0
    """The update is scaled by alpha / rank."""
    factor: int = -1
    """Size of the small factor; -1: as square as possible."""
    decompose_both: bool = False
    """Decompose the small factor as well."""
    rank_dropout: float = 0.0
    """Dropout over rank dimensions."""
    module_dropout: float = 0.0
    """Dropout of whole layers' updates."""

    positive = ("rank", "alpha",)
    shares = ("rank_dropout", "module_dropout",)

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft import LoKrConfig

        return LoKrConfig(
            r=self.rank, alpha=self.alpha, decompose_factor=self.factor, decompose_both=self.decompose_both, rank_dropout=self.rank_dropout, module_dropout=self.module_dropout,  # type: ignore[arg-type]  # peft says int and takes any number
            **self.common(model),
        )
