"""(IA)^3."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from luthier.adapt._shared import Targeted
from luthier.catalog import register

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("ia3", wraps="peft.IA3Config")
@dataclass
class Ia3(Targeted):
    """Rescale keys, values and the feed-forward's inner units by learned vectors: a few thousand parameters in all.

    k' = l_k * k, v' = l_v * v, and l_ff * h before the feed-forward's output layer; all start at 1. Empty `targets` use the layers
    that peft knows for the architecture; else name them, and those of the feed-forward again in `feedforward`, where the *input*
    is scaled. Wants a learning rate near 3e-3."""

    targets: list[str] = field(default_factory=list)
    """Layers to rescale; default: peft's table for the architecture."""
    feedforward: list[str] = field(default_factory=list)
    """Which of them are feed-forward outputs."""

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft import IA3Config

        if not self.targets:
            return IA3Config(task_type=self.task(model), modules_to_save=self.whole(model) or None)
        return IA3Config(feedforward_modules=self.feedforward, **self.common(model))
