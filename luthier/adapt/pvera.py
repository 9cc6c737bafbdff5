"""PVeRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.adapt._shared import Targeted
from luthier.catalog import register

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("pvera", wraps="peft.PveraConfig")
@dataclass
class Pvera(Targeted):
    """VeRA with a distribution instead of a point: the scaling vectors' effect is sampled in training, its mean is used afterwards.

    Shared frozen A, B as in VeRA; the inner activation has a learned mean and spread per layer (probabilistic VeRA)."""

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
        from peft import PveraConfig

        return PveraConfig(
            r=self.rank, pvera_dropout=self.dropout, d_initial=self.start, projection_prng_key=self.seed,
            **self.common(model),
        )
