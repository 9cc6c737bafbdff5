"""RandLoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from luthier.adapt._shared import Targeted
from luthier.catalog import register

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("randlora", wraps="peft.RandLoraConfig")
@dataclass
class RandLora(Targeted):
    """Sum many frozen random low-rank products with learned diagonal weights: a full-rank update from few parameters.

    W' = W + (alpha / r) sum_j B_j diag(l_j) A diag(g_j), frozen shared A and B_j."""

    rank: int = 32
    """Rank of each product."""
    alpha: float = 640.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout on the update's input."""
    sparse: Literal["no", "sparse", "very_sparse"] = "no"
    """Whether the random matrices have mostly zero entries."""
    seed: int = 0
    """Seed of the random matrices."""

    positive = ("rank", "alpha",)
    shares = ("dropout",)

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft import RandLoraConfig

        return RandLoraConfig(
            r=self.rank, randlora_alpha=self.alpha, randlora_dropout=self.dropout, projection_prng_key=self.seed, sparse=self.sparse == "sparse", very_sparse=self.sparse == "very_sparse",  # type: ignore[arg-type]  # peft says int and takes any number
            **self.common(model),
        )
