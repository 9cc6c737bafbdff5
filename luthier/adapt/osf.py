"""OSF."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.adapt._shared import Targeted
from luthier.catalog import register

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("osf", wraps="peft.OSFConfig")
@dataclass
class Osf(Targeted):
    """Freeze the weight's leading singular directions and train the whole rest, with gradients kept orthogonal to what is frozen.

    W = U_hi S_hi V_hi^T (frozen) + U_lo S_lo V_lo^T (trained) (orthogonal subspace fine-tuning, for continual learning). Stores three
    factors a weight."""

    keep: float = 0.5
    """Share of singular directions that is frozen."""

    shares = ("keep",)

    parallel = frozenset({"single", "ddp"})

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft import OSFConfig

        return OSFConfig(effective_rank=self.keep, **self.common(model))
