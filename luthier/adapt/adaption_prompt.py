"""LLaMA-Adapter's gated prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.adapt._shared import Prompted
from luthier.catalog import register

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("adaption-prompt", wraps="peft.AdaptionPromptConfig")
@dataclass
class AdaptionPrompt(Prompted):
    """Let the upper layers attend to learned prompts through a gate that starts closed (LLaMA-Adapter).

    Attention over the prompt's keys and values is computed apart and added with weight tanh-like gate g, g = 0 at the start, so
    training starts at the pretrained function. For the architectures peft knows (Llama, Mistral, GPT-2)."""

    tokens: int = 10
    """Prompt vectors a layer."""
    layers: int | None = None
    """How many layers, from the top; default: all but the two lowest, as published."""

    positive = ("tokens", "layers")

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft import AdaptionPromptConfig

        number = model.config.num_hidden_layers
        layers = max(1, number - 2) if self.layers is None else min(self.layers, number)
        return AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=self.tokens, adapter_layers=layers)
