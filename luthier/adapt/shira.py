"""SHiRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.adapt._shared import Targeted
from luthier.catalog import register

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("shira", wraps="peft.ShiraConfig")
@dataclass
class Shira(Targeted):
    """Train a fixed random one or two per cent of the entries of every matrix, as many as a LoRA of the rank would have.

    W' = W + scatter(phi at a random support of r (in + out) entries) (sparse high-rank adapters). SpIEL moves such a support while it
    trains."""

    rank: int = 32
    """The support has rank x (in + out) entries."""
    seed: int = 0
    """Seed of the support."""

    positive = ("rank",)

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft import ShiraConfig

        rank = min([self.rank, *(out * into // (out + into) for out, into in self.sizes(model))])
        return ShiraConfig(r=rank, random_seed=self.seed, **self.common(model))
