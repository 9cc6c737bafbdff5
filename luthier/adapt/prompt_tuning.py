"""Prompt tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from luthier.adapt._shared import Prompted, text_ids
from luthier.catalog import register

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("prompt-tuning", paper=51, wraps="peft.PromptTuningConfig")
@dataclass
class PromptTuning(Prompted):
    """Put learned vectors before the input embeddings and train nothing else.

    The prompt starts from a text's word embeddings (`text`, repeated or cut to length), from random words of the vocabulary or at
    random. Wants a large learning rate (3e-2 to 3e-1)."""

    start: Literal["random", "words"] = "words"
    """Where the vectors start if no text is given."""
    text: str | None = None
    """A text whose embeddings they start from."""

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft import PromptTuningConfig

        how = "SAMPLE_VOCAB" if self.start == "words" else "RANDOM"
        return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=self.tokens, prompt_tuning_init=how)

    @torch.no_grad()
    def after(self, model: Family, ctx: Context | None) -> None:
        if self.text is not None:
            network: Any = model.network
            embedding = network.get_input_embeddings()
            ids = text_ids(model, self.text, self.tokens).to(model.device)
            network.prompt_encoder["default"].embedding.weight.copy_(embedding(ids))
