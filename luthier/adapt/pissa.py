"""PiSSA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.adapt._shared import MovedBase
from luthier.catalog import register

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("pissa", wraps="peft.LoraConfig")
@dataclass
class Pissa(MovedBase):
    """Start LoRA from the largest singular components of the weight and freeze the rest: the adapter moves what matters most at once.

    W = U S V^T; B = U_r sqrt(S_r), A = sqrt(S_r) V_r^T, base <- W - B A (principal singular values and vectors adaptation)."""

    iterations: int | None = None
    """Use a fast randomised SVD with this many iterations; default: the exact SVD."""

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        return self.lora(model, init_lora_weights="pissa" if self.iterations is None else f"pissa_niter_{self.iterations}")
