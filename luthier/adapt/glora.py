"""GLoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from luthier.adapt._shared import Targeted
from luthier.catalog import register

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("glora", wraps="peft.GloraConfig")
@dataclass
class Glora(Targeted):
    """One general form around a layer: learned scale and shift of the weight and of the bias, each as rich as asked.

    W' = W + W * A + B; b' = b + b * D + E + W C (generalised LoRA)."""

    rank: int = 8
    """Rank of the update."""
    weight_form: Literal["lora", "vector", "constant", "none"] = "lora"
    """Form of A and B."""
    coupling_form: Literal["lora", "vector", "none"] = "lora"
    """Form of C."""
    bias_form: Literal["vector", "constant", "none"] = "constant"
    """Form of D and E."""

    positive = ("rank",)

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft import GloraConfig

        return GloraConfig(
            r=self.rank, config_A_B=self.weight_form, config_C=self.coupling_form, config_D_E=self.bias_form,
            **self.common(model),
        )
