"""LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from luthier.adapt._shared import LoraLike
from luthier.catalog import register
from luthier.core.plugin import Group

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("lora", wraps="peft.LoraConfig")
@dataclass
class Lora(LoraLike):
    """Freeze the network and train a low-rank update beside every linear layer.

    y = W x + (alpha / r) B A x, A [r, in] random, B [out, r] = 0, so training starts at the pretrained function. Exactly that
    function is back when the adapter is switched off. Defaults: rank 16, alpha 32 on all linear layers (the field's custom).
    `b_lr_scale` above 1 is LoRA+: B learns faster than A (its paper: 16)."""

    init: Literal["default", "gaussian", "orthogonal"] = "default"
    """How the factors start; `orthogonal`: both non-zero, with B A = 0 (even ranks only)."""
    b_lr_scale: float = 1.0
    """Learning rate of B, relative to A's."""

    positive = ("rank", "alpha", "b_lr_scale")

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        return self.lora(model, init_lora_weights=True if self.init == "default" else self.init)

    def groups(self, model: Family) -> list[Group]:
        made = super().groups(model)
        if self.b_lr_scale == 1.0:
            return made
        params = made[0].params
        fast = {n: p for n, p in params.items() if "lora_B" in n}
        slow = {n: p for n, p in params.items() if n not in fast}
        return [Group(self.role, slow), Group(self.role, fast, lr_scale=self.b_lr_scale), *made[1:]]
