"""WaveFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.adapt._shared import Targeted
from luthier.catalog import register

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("waveft", wraps="peft.WaveFTConfig")
@dataclass
class WaveFt(Targeted):
    """Learn a few coefficients of the update's wavelet transform; the inverse transform makes the update.

    W' = W + scale * IDWT(C), C zero but at n random places (wavelet fine-tuning)."""

    coefficients: int = 2592
    """Coefficients a layer (at most its entries)."""
    scaling: float = 25.0
    """Scale of the update."""
    wavelet: str = "db1"
    """Wavelet family, by PyWavelets' names."""
    seed: int = 777
    """Seed of the coefficients' places."""

    positive = ("coefficients", "scaling",)

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft import WaveFTConfig

        number = min([self.coefficients, *(out * into for out, into in self.sizes(model))])
        return WaveFTConfig(
            n_frequency=number, scaling=self.scaling, wavelet_family=self.wavelet, random_loc_seed=self.seed,
            **self.common(model),
        )
