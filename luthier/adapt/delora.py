"""DeLoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.adapt._shared import Targeted
from luthier.catalog import register

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("delora", wraps="peft.DeloraConfig")
@dataclass
class Delora(Targeted):
    """LoRA with a normalised update of learned, bounded length: direction and strength are decoupled, which keeps training robust.

    W' = W + lambda ||W|| / r * B diag(1 / (||b_i|| ||a_i||)) A (decoupled low-rank adaptation)."""

    rank: int = 8
    """Rank of the update."""
    strength: float = 15.0
    """First bound of the update's norm."""
    module_dropout: float = 0.0
    """Dropout of whole layers' updates."""

    positive = ("rank", "strength",)
    shares = ("module_dropout",)

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft import DeloraConfig

        return DeloraConfig(r=self.rank, delora_lambda=self.strength, module_dropout=self.module_dropout, **self.common(model))  # type: ignore[arg-type]  # peft says int and takes any number
