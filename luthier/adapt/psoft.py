"""PSOFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.adapt._shared import Targeted
from luthier.catalog import register

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("psoft", wraps="peft.PsoftConfig")
@dataclass
class Psoft(Targeted):
    """Orthogonal fine-tuning inside the principal subspace of the weight: only an r x r rotation trains.

    W = A B + residual from the top-r SVD; W' = residual + (alpha / r) B diag(b) R diag(a) A with R orthogonal."""

    rank: int = 32
    """Size of the principal subspace (at most the smallest side)."""
    alpha: float | None = None
    """Scale alpha / rank; default: alpha = rank."""
    dropout: float = 0.0
    """Dropout on the update's input."""
    orthogonal: bool = True
    """Keep R orthogonal."""
    magnitudes: bool = True
    """Learn the two diagonals."""

    positive = ("rank", "alpha",)
    shares = ("dropout",)

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft import PsoftConfig

        rank = min([self.rank, *(min(size) for size in self.sizes(model))])
        return PsoftConfig(
            r=rank, psoft_alpha=rank if self.alpha is None else self.alpha, psoft_dropout=self.dropout, psoft_orth=self.orthogonal, psoft_mag_a=self.magnitudes, psoft_mag_b=self.magnitudes,  # type: ignore[arg-type]  # peft says int and takes any number
            **self.common(model),
        )
