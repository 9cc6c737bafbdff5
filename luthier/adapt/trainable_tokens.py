"""Tuning of single rows of the embedding."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from luthier.adapt._shared import PeftAdapter
from luthier.catalog import register
from luthier.errors import RecipeError

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("trainable-tokens", wraps="peft.TrainableTokensConfig")
@dataclass
class TrainableTokens(PeftAdapter):
    """Train the embeddings of a few named tokens, for new or re-purposed words; all other rows stay as they are.

    Tied output rows follow. `tokens` names them as text; each must be one token of the tokenizer."""

    tokens: list[str] = field(default_factory=list)
    """The tokens, as text."""
    ids: list[int] = field(default_factory=list)
    """The tokens, as ids."""

    families = frozenset({"causal-lm", "text-encoder"})
    toy = {"ids": [20, 21]}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tokens and not self.ids:
            raise RecipeError("'trainable-tokens' trains nothing; name tokens (`tokens: [yes, no]`) or `ids`.")

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft import TrainableTokensConfig

        embedding = model.base_network.get_input_embeddings()
        name = next(n for n, m in model.network.named_modules() if m is embedding)
        return TrainableTokensConfig(task_type=self.task(model), target_modules=[name], token_indices=self.indices(model))

    def indices(self, model: Family) -> list[int]:
        """The rows of the embedding that train."""
        found = list(self.ids)
        for token in self.tokens:
            ids = model.processor(token, add_special_tokens=False)["input_ids"]
            unknown = getattr(model.processor, "unk_token_id", None)
            if len(ids) != 1 or ids[0] == unknown:
                raise RecipeError(f"{token!r} is {len(ids)} tokens of this tokenizer, not one; add it to the vocabulary or name other tokens.")
            found += ids
        size = model.base_network.get_input_embeddings().weight.shape[0]
        wrong = [i for i in found if not 0 <= i < size]
        if wrong:
            raise RecipeError(f"The token id {wrong[0]} is outside the vocabulary of {size}.")
        return sorted(set(found))
