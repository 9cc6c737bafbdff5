"""DEFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from luthier.adapt._shared import Targeted
from luthier.catalog import register

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("deft", wraps="peft.DeftConfig")
@dataclass
class Deft(Targeted):
    """Remove a learned subspace from the weight and write new content into it.

    W' = W - P_proj W + (alpha / r) P R, with P_proj from P by `projector`; `removal_only` is PaRa (no R)."""

    rank: int = 8
    """Rank of the update."""
    projector: Literal["relu", "qr"] = "relu"
    """How the projector comes from P."""
    alpha: int | None = None
    """Scale of the injection, alpha / rank; default: 1."""
    removal_only: bool = False
    """Only remove."""
    dropout: float = 0.0
    """Dropout on the update's input."""

    positive = ("rank", "alpha",)
    shares = ("dropout",)

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft import DeftConfig

        return DeftConfig(
            r=self.rank, decomposition_method=self.projector, alpha=self.alpha, para=self.removal_only, deft_dropout=self.dropout,
            **self.common(model),
        )
