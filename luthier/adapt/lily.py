"""Lily."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.adapt._shared import Targeted
from luthier.catalog import register

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("lily", wraps="peft.LilyConfig")
@dataclass
class Lily(Targeted):
    """Layers share low-rank factors: neighbours one A, the whole model a few B mixed by a learned router.

    W' x = W x + scale * A_l(x) sum_e p_e(x) B_e (low-rank interconnected adaptation across layers)."""

    rank: int = 32
    """Rank of the update."""
    stride: int = 1
    """Neighbouring layers that share one A."""
    experts: int = 2
    """Shared B factors."""
    scaling: float = 1.0
    """Scale of the update."""

    positive = ("rank", "stride", "experts", "scaling",)

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft import LilyConfig

        return LilyConfig(r=self.rank, stride_A=self.stride, num_B=self.experts, scaling=self.scaling, **self.common(model))
