"""Prefix tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.adapt._shared import Prompted
from luthier.catalog import register

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("prefix-tuning", paper=(74, 99), wraps="peft.PrefixTuningConfig")
@dataclass
class PrefixTuning(Prompted):
    """Learned keys and values before those of the text, in every layer.

    Attention sees [P_k; K], [P_v; V]. `hidden` makes them from smaller embeddings by a two-layer network that is thrown away after
    training (the paper's reparametrisation, which trains more steadily)."""

    hidden: int | None = None
    """Width of the reparametrising network; default: none."""
    zero_start: bool = False
    """Start the values at zero."""

    positive = ("tokens", "hidden")

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft import PrefixTuningConfig

        return PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=self.tokens, prefix_projection=self.hidden is not None,
            encoder_hidden_size=self.hidden, init_weights="zero" if self.zero_start else None,  # type: ignore[arg-type]  # peft's default for the width is None too
        )  # fmt: skip
