"""New words in a model's vocabulary: mask, mode and sentinel tokens."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, Any

import torch

from luthier.core.context import seed_of
from luthier.errors import ModelError

if TYPE_CHECKING:
    from luthier.core.families import Family


def add_tokens(family: Family, tokens: SequenceOf[str]) -> list[int]:
    """The ids of special tokens; those that the tokenizer lacks are added to it and to the network.

    A new row of the embedding (and of an untied output head) is the mean of the rows there are plus Gaussian noise of their standard
    deviation in every dimension, from a seed of its own: like an ordinary word's, distinct even where embeddings are frozen, and equal for
    two models of equal weights. Weights grow in place: parameters stay the same objects, so groups that already name them train them."""
    tokenizer: Any = family.processor
    network: Any = family.base_network
    into, out = network.get_input_embeddings(), network.get_output_embeddings()
    known = tokenizer.get_vocab()
    new = [t for t in dict.fromkeys(tokens) if t not in known]
    if new:
        tokenizer.add_special_tokens({"additional_special_tokens": new}, replace_extra_special_tokens=False)
    ids = [int(i) for i in tokenizer.convert_tokens_to_ids(list(tokens))]
    size = max(len(tokenizer), into.weight.shape[0], *(1 + i for i in ids))
    fresh = [int(i) for i in tokenizer.convert_tokens_to_ids(new)] + [i for i in ids if i >= into.weight.shape[0]]
    if not fresh:
        return ids
    if any(m is not None and type(m) not in (torch.nn.Embedding, torch.nn.Linear) for m in (into, out)):
        raise ModelError("An adapter sits on the embedding or output head, so no tokens can be added; leave these layers out of the adapter's targets.")
    weights = {id(w): w for w in (into.weight, getattr(out, "weight", None), getattr(out, "bias", None)) if w is not None}
    for weight in weights.values():
        _grow(weight, sorted(set(fresh)), size)
    into.num_embeddings = network.config.get_text_config().vocab_size = size
    if out is not None:
        out.out_features = size
    return ids


@torch.no_grad()
def _grow(weight: torch.nn.Parameter, rows: list[int], size: int) -> None:
    """Fill the given rows, appended where the matrix does not reach that far."""
    old = weight.data[: rows[0]].float()
    mean, spread = old.mean(0), old.std(0)
    generator = torch.Generator().manual_seed(seed_of("vocabulary", size, *weight.shape))
    missing = size - weight.shape[0]
    if missing > 0:
        weight.data = torch.cat([weight.data, mean.to(weight.dtype).expand(missing, *weight.shape[1:])])
        weight.grad = None
    noise = torch.randn(len(rows), *weight.shape[1:], generator=generator).to(old.device)
    weight.data[torch.tensor(rows, device=weight.device)] = (mean + noise * spread).to(weight.dtype)
