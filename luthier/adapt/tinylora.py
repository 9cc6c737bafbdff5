"""TinyLoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.adapt._shared import Targeted
from luthier.catalog import register

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("tinylora", wraps="peft.TinyLoraConfig")
@dataclass
class TinyLora(Targeted):
    """Train a handful of numbers a layer: a tiny vector, spread by a frozen random projection inside the weight's leading SVD directions.

    W' = W + U_r S_r (sum_i v_i P_i) V_r^T with frozen P_i; `tying` lets layers share v."""

    rank: int = 2
    """Rank of the frozen SVD."""
    length: int = 64
    """Trained numbers a group of layers."""
    tying: float = 0.0
    """0: a vector a layer; 1: one for all."""
    dropout: float = 0.0
    """Dropout on the update's input."""
    seed: int = 42
    """Seed of the projections."""

    positive = ("rank", "length",)
    shares = ("dropout",)

    parallel = frozenset({"single", "ddp"})

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft import TinyLoraConfig

        return TinyLoraConfig(
            r=self.rank, u=self.length, weight_tying=self.tying, tinylora_dropout=self.dropout, projection_seed=self.seed,
            **self.common(model),
        )
