"""Ordinary decoding: greedy or by chance."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from luthier.catalog import register
from luthier.decode import Decoder
from luthier.decode._shared import Answer, Decode, Wrapped, main_model
from luthier.errors import RecipeError

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import CausalLM, Family


def sample(logits: Tensor, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """The distribution that answers are drawn from: softmax(logits / temperature) on the `top_k` likeliest tokens and among them on
    the smallest set that holds `top_p` of the mass, renormalised. Temperature 0 puts all on the likeliest token."""
    logits = logits.float()
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    logits = logits / temperature
    if top_k:
        lowest = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    p, order = logits.softmax(-1).sort(descending=True, stable=True)
    outside = p.cumsum(-1) - p >= top_p
    kept = torch.zeros_like(p).scatter(-1, order, p.masked_fill(outside, 0))
    return kept / kept.sum(-1, keepdim=True)


class Sampling(Wrapped):
    """Gives greedy calls the settings of the recipe."""

    def __init__(self, family: CausalLM, settings: Sample) -> None:
        super().__init__(family)
        self.settings = settings

    def generate(self, prompts: SequenceOf[Any], decode: Decode | None = None, n: int = 1, batch: int = 32) -> list[list[Answer]]:
        decode, s = decode or Decode(), self.settings
        if decode.temperature == 0:
            decode = replace(decode, temperature=s.temperature, top_p=s.top_p, top_k=s.top_k)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(s.seed)
            return self.inner.generate(prompts, decode, n, batch)


@register("sample")
@dataclass
class Sample(Decoder):
    """Draw answers by chance instead of taking the likeliest token: temperature, nucleus and top-k sampling, seeded.

    p = softmax(logits / temperature), cut to the `top_k` likeliest tokens and to the smallest set of mass `top_p`. The same prompts get the same
    answers for the same seed."""

    temperature: float = 0.7
    """Above 0; lower is nearer to greedy."""
    top_p: float = 1.0
    """Mass of the nucleus."""
    top_k: int = 0
    """Tokens considered; 0: all."""
    seed: int = 0
    """Of the draws."""

    families = frozenset({"causal-lm"})

    def __post_init__(self) -> None:
        if self.temperature <= 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise RecipeError(f"sample needs temperature > 0, 0 < top_p <= 1 and top_k >= 0; got {self.temperature}, {self.top_p} and {self.top_k}.")

    def wrap(self, models: Mapping[str, Family] | Family, ctx: Context | None = None) -> Family:
        return Sampling(main_model(models, "sample"), self)
