"""VeLoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from luthier.adapt._shared import LoraLike
from luthier.catalog import register

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("velora", wraps="peft.LoraConfig")
@dataclass
class Velora(LoraLike):
    """LoRA that keeps a rank-one sketch of its input for the backward pass instead of the input itself, to save activation memory.

    The input of A is cut into groups, each projected on one vector; the backward pass uses the reconstruction, so the gradient of A
    is approximate while the forward pass is LoRA's."""

    sub_tokens: int = 64
    """Sub-tokens that the input is cut into (the largest divisor of its width up to this)."""
    start: Literal["batch_average", "batch_average_once", "random"] = "batch_average"
    """Where the projection comes from."""
    reconstruction: float = 1.0
    """Scale of the reconstructed activations."""

    positive = ("rank", "alpha", "sub_tokens", "reconstruction",)

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft.tuners.lora import VeloraConfig

        number = self.block(model, self.sub_tokens, "in")
        return self.lora(model, velora_config=VeloraConfig(num_groups=number, scale=self.reconstruction, init_type=self.start))
