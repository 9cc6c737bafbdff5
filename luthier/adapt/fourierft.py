"""FourierFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.adapt._shared import Targeted
from luthier.catalog import register

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("fourierft", wraps="peft.FourierFTConfig")
@dataclass
class FourierFt(Targeted):
    """Learn a few coefficients of the update's two-dimensional spectrum; the inverse Fourier transform makes the update.

    W' = W + scale * real(ifft2(F)), F zero but at n random frequencies. By default the spectrum starts random, so the model is
    changed a little at the start, as in the paper's release."""

    frequencies: int = 1000
    """Coefficients a layer (at most its entries)."""
    scaling: float = 150.0
    """Scale of the update."""
    seed: int = 777
    """Seed of the frequencies' places."""
    zero_start: bool = False
    """Start with no update."""

    positive = ("frequencies", "scaling",)

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft import FourierFTConfig

        number = min([self.frequencies, *(out * into for out, into in self.sizes(model))])
        return FourierFTConfig(
            n_frequency=number, scaling=self.scaling, random_loc_seed=self.seed, init_weights=self.zero_start,
            **self.common(model),
        )
