"""MiSS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from luthier.adapt._shared import Targeted
from luthier.catalog import register

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("miss", wraps="peft.MissConfig")
@dataclass
class Miss(Targeted):
    """One small matrix is repeated over the weight's rows as an update: no second factor, less memory, faster than LoRA.

    W' = W + expand(D), D [r, out], the input summed over in / r shards (matrix shard sharing; `start: bat` is Bone's weight-guided
    form, which peft now ships under this name)."""

    rank: int = 64
    """Shards (the largest divisor of every side up to this)."""
    dropout: float = 0.0
    """Dropout on the update's input."""
    start: Literal["balance", "bat", "mini"] = "balance"
    """The variant: MiSS, Bone's Bat, or the smaller one of `mini_rank`."""
    mini_rank: int = 1
    """Rank of the variant `mini`."""

    positive = ("rank", "mini_rank",)
    shares = ("dropout",)

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft import MissConfig

        return MissConfig(
            r=self.block(model, self.rank), miss_dropout=self.dropout, mini_r=self.mini_rank, init_weights=True if self.start == "balance" else self.start,
            **self.common(model),
        )
