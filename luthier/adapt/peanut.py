"""PEANuT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.adapt._shared import Targeted
from luthier.catalog import register

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("peanut", wraps="peft.PeanutConfig")
@dataclass
class Peanut(Targeted):
    """The update is a small non-linear network applied to the frozen weight, so that it can depend on what the weight already holds.

    W' = W + scale * f(W), f a bottleneck of width r with `depth` hidden layers on either side."""

    rank: int = 32
    """Width of the bottleneck."""
    depth: int = 0
    """Hidden layers on either side."""
    activation: str = "relu"
    """Activation, by transformers' names."""
    scaling: float = 1.0
    """Scale of the update."""

    positive = ("rank", "scaling",)

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft import PeanutConfig

        return PeanutConfig(r=self.rank, depth=self.depth, act_fn=self.activation, scaling=self.scaling, **self.common(model))
