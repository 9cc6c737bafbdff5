"""BOFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.adapt._shared import Targeted
from luthier.catalog import register

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("boft", wraps="peft.BOFTConfig")
@dataclass
class Boft(Targeted):
    """Orthogonal fine-tuning whose rotation is a product of butterfly factors, so that few parameters reach all inputs.

    W' = R_m ... R_1 W with block-diagonal orthogonal factors between fixed permutations (orthogonal butterfly)."""

    block_size: int = 4
    """Side of a block (the largest divisor of every input width up to this)."""
    factors: int = 1
    """Butterfly factors; 1 is plain OFT."""
    dropout: float = 0.0
    """Dropout on the update's input."""

    positive = ("block_size", "factors",)
    shares = ("dropout",)

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft import BOFTConfig

        return BOFTConfig(
            boft_block_size=self.block(model, self.block_size, "in"), boft_n_butterfly_factor=self.factors, boft_dropout=self.dropout,
            **self.common(model),
        )
