"""Uni-LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.adapt._shared import Targeted
from luthier.catalog import register

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("unilora", wraps="peft.UniLoraConfig")
@dataclass
class UniLora(Targeted):
    """One short vector holds every LoRA parameter of every layer; a fixed random projection spreads it over them.

    All entries of all A and B = P theta, theta of `length` numbers, P a frozen isometric one-hot projection."""

    rank: int = 4
    """Rank of the update."""
    length: int = 256
    """Length of the one trained vector."""
    dropout: float = 0.0
    """Dropout on the update's input."""
    seed: int = 42
    """Seed of the projection."""

    positive = ("rank", "length",)
    shares = ("dropout",)

    parallel = frozenset({"single", "ddp"})

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft import UniLoraConfig

        return UniLoraConfig(
            r=self.rank, theta_d_length=self.length, unilora_dropout=self.dropout, proj_seed=self.seed,
            **self.common(model),
        )
