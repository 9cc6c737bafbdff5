"""OLoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from luthier.adapt._shared import MovedBase, target_layers
from luthier.catalog import register
from luthier.errors import ModelError

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("olora", wraps="peft.LoraConfig")
@dataclass
class Olora(MovedBase):
    """Start LoRA from an orthonormal basis of the weight's columns, taken out of the base by a QR decomposition.

    W = Q R; B = Q_r, A = R_r, base <- W - B A (orthonormal LoRA)."""


    def config(self, model: Family, ctx: Context | None = None) -> Any:
        transposed = [n for n, m in target_layers(model.network, self.targets, self.whole(model)).items() if not isinstance(m, nn.Linear)]
        if transposed:
            raise ModelError(f"peft's OLoRA cannot start on transposed layers such as '{transposed[0]}'; use 'pissa' for this architecture.")
        return self.lora(model, init_lora_weights="olora")
