"""HiRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.adapt._shared import Targeted
from luthier.catalog import register

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("hira", wraps="peft.HiraConfig")
@dataclass
class Hira(Targeted):
    """Multiply the frozen weight element-wise by a low-rank matrix: the update inherits the weight's rank.

    W' = W + W * (B A) (Hadamard high-rank adaptation)."""

    rank: int = 32
    """Rank of the update."""
    dropout: float = 0.0
    """Dropout on the update's input."""

    positive = ("rank",)
    shares = ("dropout",)

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft import HiraConfig

        return HiraConfig(r=self.rank, hira_dropout=self.dropout, **self.common(model))
