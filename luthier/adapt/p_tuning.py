"""P-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from luthier.adapt._shared import Prompted
from luthier.catalog import register

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("p-tuning", wraps="peft.PromptEncoderConfig")
@dataclass
class PTuning(Prompted):
    """Learned vectors before the input, made by a small network that ties them together.

    A prompt encoder (MLP or LSTM) maps learned embeddings to the vectors; only it trains."""

    encoder: Literal["mlp", "lstm"] = "mlp"
    """The prompt encoder."""
    hidden: int = 128
    """Its width."""
    layers: int = 2
    """Its depth (LSTM)."""
    dropout: float = 0.0
    """Its dropout (LSTM)."""

    positive = ("tokens", "hidden", "layers")
    shares = ("dropout",)

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft import PromptEncoderConfig

        return PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=self.tokens, encoder_reparameterization_type=self.encoder.upper(),
            encoder_hidden_size=self.hidden, encoder_num_layers=self.layers, encoder_dropout=self.dropout,
        )  # fmt: skip
