"""FRoD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.adapt._shared import Targeted
from luthier.catalog import register

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("frod", wraps="peft.FrodConfig")
@dataclass
class Frod(Targeted):
    """A full-rank rotation of each weight in a basis shared by the layers of a kind, with a sparse trainable part.

    Weights of one category get a joint decomposition; a diagonal and a sparse random `rate` of off-diagonal entries train."""

    rate: float = 0.01
    """Share of off-diagonal entries that train."""
    regularisation: float = 1e-3
    """Added when the shared basis is computed."""
    dropout: float = 0.0
    """Dropout on the update's input."""
    seed: int = 0
    """Seed of the sparse structure."""

    positive = ("regularisation",)
    shares = ("rate", "dropout",)

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft import FrodConfig

        return FrodConfig(
            sparse_rate=self.rate, regularization_alpha=self.regularisation, frod_dropout=self.dropout, projection_prng_key=self.seed, progressbar=False,
            **self.common(model),
        )
