"""C3A."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from luthier.adapt._shared import Targeted
from luthier.catalog import register

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("c3a", wraps="peft.C3AConfig")
@dataclass
class C3a(Targeted):
    """The update is a block matrix of circulant blocks, multiplied by FFT: high rank with few parameters.

    W' = W + blocks of circ(w_ij), each of side b (circular convolution adaptation). Starts random by default."""

    block_size: int = 256
    """Side of a block (the largest divisor of every side up to this)."""
    start: Literal["xavier_uniform", "kaiming_uniform", "gaussian", "zero"] = "xavier_uniform"
    """How the blocks start."""

    positive = ("block_size",)

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft import C3AConfig

        return C3AConfig(
            block_size=self.block(model, self.block_size), init_weights=True if self.start == "zero" else self.start,
            **self.common(model),
        )
