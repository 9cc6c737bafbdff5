"""Masked-thought fine-tuning: hide random tokens of the solution in the input, keep all labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from luthier.catalog import register
from luthier.core.context import Ramp
from luthier.errors import ModelError, RecipeError
from luthier.objective import Supervised

if TYPE_CHECKING:
    from luthier.core.batch import Batch, Sequence
    from luthier.core.context import Context
    from luthier.core.families import Family


def masked_thought(
    ids: Any,
    response: Any,
    rate: float,
    vocabulary: int,
    generator: torch.Generator | None = None,
    mask_id: int | None = None,
) -> np.ndarray:
    """New input ids: each position of `response` is replaced with probability `rate`, by `mask_id` or, where that is None, by an id
    drawn evenly from the `vocabulary` real ids. The given ids are not changed."""
    ids = np.array(ids, dtype=np.int64, copy=True)
    hide = torch.rand(len(ids), generator=generator).numpy() < rate
    other = np.full(len(ids), mask_id) if mask_id is not None else torch.randint(vocabulary, (len(ids),), generator=generator).numpy()
    hide &= np.asarray(response, dtype=bool)
    ids[hide] = other[hide]
    return ids


@register("masked-thought", paper=36)
@dataclass
class MaskedThought(Supervised):
    """Hide random tokens of a worked solution in the input while every label stays, so that the question and distant steps must be used.

    Each input position of the answer is replaced, anew at every visit, with probability p(s) = rate * min(1, s / (warmup * S)) at step s
    of S, by a random id of the real vocabulary (the published GSM8K launcher) or by a mask token (the MetaMathQA one: rate 0.2). All
    answer tokens stay labels, also where the input is hidden. Prompt and end tokens are never touched. It only prepares the batch,
    so it composes with any supervised loss in the list (`objective: [masked-thought, asft]`); alone it trains with plain likelihood.
    It needs longer training than SFT and hurts a model that cannot do the task at all yet.
    The mask token is the tokenizer's if it has `mask_token`, else it is added, its input and output embedding at the mean of all others;
    it is put on the generation configuration's suppressed tokens, which is saved with the model, and must never be generated. Under a
    frozen embedding (LoRA) it stays at that mean. The release's `drop` variant, which hides masked positions from attention, is left
    out: batches share tokens through a packed attention mask that has no holes."""

    rate: float = 0.4
    """Largest share of hidden input tokens (p_max)."""
    mode: Literal["random", "mask"] = "random"
    """random: replace by random ids; mask: by the mask token."""
    schedule: Literal["linear", "constant", "uniform"] = "linear"
    """linear: from 0 over the warm-up; constant: the full rate always; uniform: a rate drawn from [0, rate] for every batch."""
    warmup: float = 0.66
    """Share of the training over which the rate grows."""
    mask_token: str = "<mask>"
    """The token used by mode mask."""

    def __post_init__(self) -> None:
        for name in ("rate", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1.")
        if self.mode not in ("random", "mask"):
            raise RecipeError(f"mode is '{self.mode}'; it must be 'random' or 'mask'.")
        if self.schedule not in ("linear", "constant", "uniform"):
            raise RecipeError(f"schedule is '{self.schedule}'; it must be 'linear', 'constant' or 'uniform'.")
        if not self.mask_token:
            raise RecipeError("mask_token is empty; name a token such as '<mask>'.")

    def attach(self, model: Family, ctx: Context) -> None:
        if self.mode != "mask":
            return
        _ban(model, add_mask_token(model, self.mask_token))
        for name, held in list(ctx.models.items()):  # references read the corrupted inputs too
            ctx.models[name] = self._extended(held, model) if hasattr(held, "network") else partial(self._loaded, held, model)

    def _loaded(self, loader: Callable[[], Family], model: Family) -> Family:
        return self._extended(loader(), model)

    def _extended(self, frozen: Family, model: Family) -> Family:
        """A frozen model of the same tokenizer learns the token as well; any other one stays as it is."""
        names = [set(f.processor.get_vocab()) - {self.mask_token} if hasattr(f.processor, "get_vocab") else None for f in (frozen, model)]
        if names[0] is not None and names[0] == names[1]:
            add_mask_token(frozen, self.mask_token)
        return frozen

    def prepare(self, batch: Batch, ctx: Context | None) -> Batch:
        """The batch with corrupted copies of its sequences. Without a context: the full rate, torch's own random numbers."""
        generator = ctx.rng("masked-thought") if ctx is not None else None
        rate = self.rate_at(ctx, generator)
        if rate == 0:
            return batch
        family = ctx.current if ctx is not None else None
        vocabulary = vocabulary_of(family, batch)
        mask_id = self._mask_id(family) if self.mode == "mask" else None
        ends = family.end_ids() if hasattr(family, "end_ids") else []  # type: ignore[union-attr]

        def corrupt(s: Sequence) -> Sequence:
            response = s.mask & ~np.isin(s.ids, ends)
            return replace(s, ids=masked_thought(s.ids, response, rate, vocabulary, generator, mask_id), targets=s.labels.copy())

        return replace(batch, sequences=[corrupt(s) for s in batch.sequences], touched=True)

    def rate_at(self, ctx: Context | None, generator: torch.Generator | None = None) -> float:
        """The share of hidden tokens now."""
        if self.schedule == "uniform":
            return self.rate * float(torch.rand((), generator=generator))
        if self.schedule == "constant" or ctx is None:
            return self.rate
        return Ramp(0.0, self.rate, until=self.warmup).at(ctx.clock.fraction)

    def _mask_id(self, family: Any) -> int:
        found = None if family is None else family.processor.convert_tokens_to_ids(self.mask_token)
        if found is None or found == family.processor.unk_token_id:
            raise ModelError(f"The tokenizer has no '{self.mask_token}'; call attach(model, ctx) first, or use mode 'random'.")
        return int(found)


def vocabulary_of(family: Any, batch: Batch) -> int:
    """How many ids are real: the tokenizer's, not the padded rows of the embedding."""
    processor: Any = getattr(family, "processor", None)
    rows = getattr(getattr(family, "config", None), "vocab_size", None)
    known = ([len(processor)] if hasattr(processor, "__len__") else []) + ([int(rows)] if rows else [])
    return min(known) if known else 1 + max((int(s.ids.max()) for s in batch.sequences if len(s)), default=0)


def add_mask_token(family: Family, token: str) -> int:
    """The id of `token`, which is added to tokenizer and network where it is new, at the mean embedding.

    The weights grow in place: the parameters stay the same objects, so groups that already name them still train them."""
    tokenizer: Any = family.processor
    network: Any = family.base_network
    into, out = network.get_input_embeddings(), network.get_output_embeddings()
    new = token not in tokenizer.get_vocab()
    if new:
        tokenizer.add_special_tokens({"additional_special_tokens": [token]}, replace_extra_special_tokens=False)
    index = int(tokenizer.convert_tokens_to_ids(token))
    if not new and index < into.weight.shape[0]:
        return index
    for module in (into, out):
        if type(module) not in (torch.nn.Embedding, torch.nn.Linear):
            raise ModelError("An adapter sits on the embedding or output head, so no mask token can be added; use mode 'random'.")
    seen: set[int] = set()
    for weight in (into.weight, out.weight, getattr(out, "bias", None)):
        if weight is not None and id(weight) not in seen:
            seen.add(id(weight))
            _grow(weight, index)
    into.num_embeddings = out.out_features = network.config.get_text_config().vocab_size = into.weight.shape[0]
    return index


def _ban(family: Family, index: int) -> None:
    """The token is never generated, here or by whoever loads the saved model."""
    generation = getattr(family.base_network, "generation_config", None)
    if generation is not None:
        generation.suppress_tokens = sorted({*(generation.suppress_tokens or []), index})


@torch.no_grad()
def _grow(weight: torch.nn.Parameter, index: int) -> None:
    """Row `index` becomes the mean of the rows before it; it is appended if the matrix is not padded that far."""
    mean = weight.data[:index].float().mean(0).to(weight.dtype)
    if index < weight.shape[0]:
        weight.data[index] = mean
    else:
        weight.data = torch.cat([weight.data, mean[None]])
        weight.grad = None
