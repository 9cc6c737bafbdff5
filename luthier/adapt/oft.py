"""OFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.adapt._shared import Targeted
from luthier.catalog import register

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("oft", wraps="peft.OFTConfig")
@dataclass
class Oft(Targeted):
    """Rotate the weight's input by small learned rotations in blocks: angles between neurons, hence what was learned, are kept.

    W' = W R, R block-diagonal orthogonal by Cayley's transform of skew-symmetric blocks (orthogonal fine-tuning)."""

    block_size: int = 32
    """Side of a block (the largest divisor of every input width up to this)."""
    neumann: bool = True
    """Approximate the Cayley transform by five terms of a Neumann series."""
    share: bool = False
    """One rotation for all blocks of a layer."""
    constrained: bool = False
    """Bound the rotation's size by `eps` (COFT)."""
    eps: float = 6e-5
    """The bound."""
    module_dropout: float = 0.0
    """Dropout of blocks' rotations."""

    positive = ("block_size", "eps",)
    shares = ("module_dropout",)

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft import OFTConfig

        return OFTConfig(
            oft_block_size=self.block(model, self.block_size, "in"), use_cayley_neumann=self.neumann, block_share=self.share, coft=self.constrained, eps=self.eps, module_dropout=self.module_dropout,
            **self.common(model),
        )
