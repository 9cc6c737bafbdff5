"""Tuning of the normalisation layers alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from luthier.adapt._shared import Targeted
from luthier.catalog import register
from luthier.errors import ModelError

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("layer-norm", wraps="peft.LNTuningConfig")
@dataclass
class LayerNorm(Targeted):
    """Train the scales (and shifts) of the normalisation layers, nothing else.

    Default targets: every LayerNorm, RMSNorm or GroupNorm of the network."""

    targets: list[str] = field(default_factory=list)
    """Norm layers by the end of their name; default: all."""

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft import LNTuningConfig

        return LNTuningConfig(**self.common(model))

    def layers(self, model: Family) -> list[str]:
        if self.targets:
            return list(self.targets)
        skip = tuple(self.whole(model))
        found = [n for n, m in model.network.named_modules() if _is_norm(m) and not n.startswith(skip or ("\0",))]
        if not found:
            raise ModelError(f"{type(model.network).__name__} has no normalisation layer with weights; name the layers in `targets`.")
        return found


def _is_norm(module: nn.Module) -> bool:
    named = isinstance(module, (nn.LayerNorm, nn.GroupNorm)) or type(module).__name__.endswith(("RMSNorm", "LayerNorm"))
    return named and getattr(module, "weight", None) is not None
