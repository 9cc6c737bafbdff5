"""HRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.adapt._shared import Targeted
from luthier.catalog import register

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("hra", wraps="peft.HRAConfig")
@dataclass
class Hra(Targeted):
    """Multiply the weight by a chain of learned Householder reflections: orthogonal and low-rank at once.

    W' = W prod_i (I - 2 u_i u_i^T / ||u_i||^2), i = 1..r (Householder reflection adaptation); starts as the identity."""

    rank: int = 8
    """Reflections (an even number starts as the identity)."""
    gram_schmidt: bool = False
    """Keep the reflections orthogonal to each other."""

    positive = ("rank",)

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft import HRAConfig

        return HRAConfig(r=self.rank, apply_GS=self.gram_schmidt, **self.common(model))
