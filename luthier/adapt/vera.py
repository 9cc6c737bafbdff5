"""VeRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.adapt._shared import Targeted
from luthier.catalog import register

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("vera", wraps="peft.VeraConfig")
@dataclass
class Vera(Targeted):
    """All layers share one pair of frozen random matrices; each layer trains only two scaling vectors.

    W' = W + diag(b) B diag(d) A with frozen shared A, B; d starts at `start`, b at 0 (vector-based random matrix adaptation). Wants a
    learning rate about ten times LoRA's."""

    rank: int = 256
    """Rank of the shared matrices."""
    dropout: float = 0.0
    """Dropout on the update's input."""
    start: float = 0.1
    """First value of the vectors d."""
    seed: int = 0
    """Seed of the shared matrices."""

    positive = ("rank",)
    shares = ("dropout",)

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft import VeraConfig

        return VeraConfig(
            r=self.rank, vera_dropout=self.dropout, d_initial=self.start, projection_prng_key=self.seed,
            **self.common(model),
        )
