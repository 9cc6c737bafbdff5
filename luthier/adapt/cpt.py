"""CPT: context-aware prompt tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.adapt._shared import Prompted, calibration_rows
from luthier.catalog import register

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("cpt", wraps="peft.CPTConfig")
@dataclass
class Cpt(Prompted):
    """In-context examples whose embeddings are tuned, but only a little: each token may move within a small ball around its word.

    The prompt is `examples` rows, tokenised; a token's offset is projected to a ball of `input_radius`; answer tokens stay. Needs
    rows: the stream `calibration`, else training rows. The published loss weighting of the examples' own labels is left out: the
    objective decides the loss."""

    examples: int = 4
    """Rows in the prompt."""
    input_radius: float = 0.1
    """Ball of the input tokens (times sqrt(width / 2048))."""
    tokens: int | None = None  # type: ignore[assignment]
    """Longest prompt in tokens; default: no limit."""

    positive = ("examples", "tokens")

    parallel = frozenset({"single", "ddp"})

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft import CPTConfig

        ids: list[int] = []
        kinds: list[int] = []
        for i, sequence in enumerate(model.collate(calibration_rows(ctx, self.examples, self.name)).sequences):
            # peft's types: 4 i + 2 an input token of example i, 4 i + 4 an answer token.
            ids += sequence.ids.tolist()
            kinds += [4 * i + (4 if answer else 2) for answer in sequence.mask]
        ids, kinds = ids[: self.tokens], kinds[: self.tokens]
        return CPTConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=len(ids), cpt_token_ids=ids, cpt_mask=[1] * len(ids), cpt_tokens_type_mask=kinds,
            opt_projection_epsilon=self.input_radius,
        )  # fmt: skip
