"""What decoders share: a family around a family, and models that read the same tokens in lock-step."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from luthier.core.batch import Sequence
from luthier.core.families import Answer, CausalLM, Decode
from luthier.errors import ModelError

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


class Wrapped(CausalLM):
    """A causal language model with verbs overridden. It shares the network, the processor and all settings of the one it wraps.

    `companions` are further models that it asks; `evaluating` holds for them as well."""

    def __init__(self, family: CausalLM, companions: SequenceOf[CausalLM] = ()) -> None:
        self.__dict__.update(copy.copy(family.__dict__))
        self.inner, self.companions = family, list(companions)

    @contextmanager
    def evaluating(self, grad: bool = False) -> Iterator[Family]:
        with ExitStack() as stack:
            for companion in self.companions:
                stack.enter_context(companion.evaluating())
            stack.enter_context(super().evaluating(grad))
            yield self


def main_model(models: Mapping[str, Family] | Family, who: str) -> CausalLM:
    """The model a decoder wraps: the one named "model", or the only one given."""
    family: Any = models.get("model") if isinstance(models, Mapping) else models
    if family is None:
        raise ModelError(f"'{who}' wraps the model named 'model'; the mapping has {', '.join(models) or 'none'}.")  # type: ignore[arg-type]
    if family.kind != "causal-lm":
        raise ModelError(f"'{who}' decodes causal language models; this one is of the family '{family.kind}'.")
    return family


def other_model(models: Mapping[str, Family] | Family, name: str, ctx: Context | None, who: str) -> CausalLM:
    """A model by name, from the mapping or from the recipe's `models:`."""
    if isinstance(models, Mapping) and name in models:
        return models[name]  # type: ignore[return-value]
    if ctx is not None and ctx.has_model(name):
        return ctx.model(name)  # type: ignore[return-value]
    raise ModelError(f"'{who}' needs a model '{name}'; name it in the recipe: `models: {{{name}: FOLDER}}`.")


def same_vocabulary(main: CausalLM, others: Mapping[str, CausalLM], who: str) -> None:
    """Logits are added, so token numbers must mean the same to all models."""
    size = main.config.vocab_size
    for name, other in {"model": main, **others}.items():
        if other.is_prompted:
            raise ModelError(f"'{who}' runs models in lock-step, which a prompt-tuned one ('{name}') cannot; tune it with LoRA, or merge it first.")
        if other.config.vocab_size != size:
            raise ModelError(f"'{who}' adds logits, so all models need one vocabulary: the model has {size} tokens, '{name}' has {other.config.vocab_size}.")
        vocabularies: list[dict[str, int]] = [getattr(f.tokenizer, "get_vocab", dict)() for f in (main, other)]
        words, others_words = vocabularies
        if words and others_words and words != others_words:
            raise ModelError(f"'{who}' adds logits, so all models need one tokenizer; that of '{name}' gives other numbers to the same tokens.")


def answered(prompt: Any, answer: Any) -> Sequence:
    """A prompt's ids and an answer's, the answer's tokens supervised."""
    mask = np.arange(len(prompt) + len(answer)) >= len(prompt)
    return Sequence(np.concatenate([np.asarray(prompt, np.int64), np.asarray(answer, np.int64)]), mask)


class LockStep:
    """Companion models that read what the main model reads, each with its own cache. Called once a step by `generate`."""

    def __init__(self, companions: SequenceOf[CausalLM], mask: Tensor) -> None:
        self.companions, self.mask = list(companions), mask
        self.caches: list[Any] = [None] * len(self.companions)
        self.seen = 0

    @torch.no_grad()
    def next_logits(self, ids: Tensor) -> list[Tensor]:
        """The companions' raw fp32 logits for the token after `ids` [rows, length], left padded."""
        rows, length = ids.shape
        mask = self.mask.to(ids.device)
        if rows != len(mask):
            mask = mask.repeat_interleave(rows // len(mask), 0)
        mask = torch.cat([mask, mask.new_ones(rows, length - mask.shape[1])], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        fresh = slice(self.seen, length)
        found = []
        for i, model in enumerate(self.companions):
            out = model.network(
                input_ids=ids[:, fresh].to(model.device), attention_mask=mask.to(model.device), position_ids=positions[:, fresh].to(model.device),
                past_key_values=self.caches[i], use_cache=True, logits_to_keep=1,
            )  # fmt: skip
            self.caches[i] = out.past_key_values
            found.append(out.logits[:, -1].float().to(ids.device))
        self.seen = length
        return found


def left_mask(prompts: SequenceOf[Any]) -> Tensor:
    """1 where a left-padded batch of prompts has tokens."""
    width = max(len(p) for p in prompts)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for i, p in enumerate(prompts):
        mask[i, width - len(p) :] = 1
    return mask


__all__ = ["Answer", "Decode", "LockStep", "Wrapped", "answered", "left_mask", "main_model", "other_model", "same_vocabulary"]
