"""What several mergers share: the updates of the tuned models, their weights, choosing a value on validation rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from luthier.core.modelmap import block_index
from luthier.core.source import TensorSource, aligned, applied, delta, left_out, working
from luthier.errors import RecipeError
from luthier.merge import Merger

if TYPE_CHECKING:
    from luthier.core.context import Context

Score = Callable[[TensorSource], float]
BLOCK = 1 << 16
"""Entries that are widened at a time; they stay in the processor's cache."""


class VectorMerger(Merger):
    """Mergers that compute one update from the tuned models' updates and add it to the base."""

    skip: list[str]

    def update(self, base: Any, tuned: SequenceOf[Any], ctx: Context | None = None) -> TensorSource:
        """The merged update, before it is added to the base and rounded to its types."""
        raise NotImplementedError

    def merge(self, base: Any, tuned: SequenceOf[Any], ctx: Context | None = None) -> TensorSource:
        base = TensorSource.of(base)
        return applied(base, self.update(base, tuned, ctx))


def models(tuned: Any) -> list[Any]:
    """The tuned models as a list; one alone may be given bare."""
    alone = isinstance(tuned, (Mapping, str, Path)) or hasattr(tuned, "state_dict") or hasattr(tuned, "network")
    listed = [tuned] if alone else list(tuned)
    if not listed:
        raise RecipeError("There is nothing to merge; name at least one tuned model.")
    return listed


def deltas(base: Any, tuned: Any, skip: Iterable[str] = ()) -> list[TensorSource]:
    """The update of every tuned model, wide enough that base + update is the tuned model exactly."""
    base = TensorSource.of(base)
    return [delta(base, one, skip, wide=True) for one in models(tuned)]


def update_of(merger: Merger, base: TensorSource, tuned: SequenceOf[Any], ctx: Context | None) -> TensorSource:
    """What any merger would add to the base."""
    if isinstance(merger, VectorMerger):
        return merger.update(base, tuned, ctx)
    return delta(base, TensorSource.of(merger.merge(base, tuned, ctx)), wide=True)


def weights_of(weights: SequenceOf[float] | None, number: int) -> list[float]:
    """One weight a model; all 1 if none are given."""
    if weights is None:
        return [1.0] * number
    if len(weights) != number:
        raise RecipeError(f"`weights` has {len(weights)} entries, but {number} models are merged; give one weight for each.")
    return [float(w) for w in weights]


def summed(updates: SequenceOf[TensorSource], scale: float = 1.0, weights: SequenceOf[float] | None = None) -> TensorSource:
    """scale * sum_t w_t tau_t."""
    w = [scale * one for one in weights_of(weights, len(updates))]

    def read(name: str) -> Tensor:
        first = updates[0][name]
        if not first.is_floating_point():
            return first
        total = w[0] * first
        for weight, update in zip(w[1:], updates[1:]):
            total = total + weight * update[name]
        return total

    return TensorSource(updates[0], read, updates[0].meta, updates[0].aliases)


def average(
    states: SequenceOf[TensorSource], weights: SequenceOf[float] | None = None, skip: Iterable[str] = (), home: TensorSource | None = None
) -> TensorSource:  # fmt: skip
    """The (weighted) mean of whole models, in the types of `home` (the base, or else the first of them).

    Sums run in higher precision, so that equal models average to themselves exactly; integer tensors and what `skip` names are home's."""
    home, skip = states[0] if home is None else home, list(skip)
    ready = [aligned(home, s, skip) for s in states]
    w = weights_of(weights, len(states))
    total = sum(w)
    if total == 0:
        raise RecipeError("The weights of a mean must not sum to 0.")

    def read(name: str) -> Tensor:
        own = home[name]
        if not own.is_floating_point() or left_out(name, skip):
            return own.clone()
        dtype = working(own.dtype if own.dtype.itemsize > 1 else torch.float32, wide=True)
        mean = torch.zeros(own.shape, dtype=dtype, device=own.device)
        for weight, state in zip(w, ready):
            _add(mean, state[name].to(own.device), weight)
        return mean.div_(total).to(own.dtype)

    return TensorSource(home, read, home.meta, home.aliases)


def _add(total: Tensor, tensor: Tensor, weight: float) -> None:
    """total += weight * tensor, widened block by block: a wide copy of the tensor would be written to memory and read again."""
    for there, here in zip(total.view(-1).split(BLOCK), tensor.reshape(-1).split(BLOCK)):
        there.add_(here.to(total.dtype), alpha=weight)


def ingredients(base: Any, tuned: Any, include_base: bool = False) -> tuple[list[TensorSource], TensorSource | None]:
    """The models of a soup, and the base where one is given."""
    home = None if base is None else TensorSource.of(base)
    states = [TensorSource.of(one, home) for one in models(tuned)]
    if include_base:
        if home is None:
            raise RecipeError("`include_base` needs a base model.")
        states.insert(0, home)
    return states, home


def floating(update: TensorSource) -> TensorSource:
    """The floating tensors, each tied one once, in alphabetical order: the vector that a threshold over the whole model ranks."""
    return update.only(n for n in sorted(update.distinct) if (m := update.meta(n)) is None or m[1].is_floating_point)


def size_of(update: TensorSource) -> int:
    """How many floating numbers an update has (tensors of unknown shape are read)."""
    total = 0
    for name in update:
        meta = update.meta(name)
        if meta is None:
            tensor = update[name]
            meta = (tuple(tensor.shape), tensor.dtype)
        if meta[1].is_floating_point:
            count = 1
            for length in meta[0]:
                count *= length
            total += count
    return total


def best(values: Iterable[float], value_of: Callable[[float], float]) -> tuple[float, list[dict[str, float]]]:
    """The first of the values with the highest score, and all that were tried."""
    tried = [{"value": float(v), "score": float(value_of(v))} for v in values]
    return max(tried, key=lambda t: t["score"])["value"], tried


def layer_of(name: str) -> tuple[str, int] | str:
    """What tensors of one block share: the stack's name and the block's number; a tensor outside the blocks is alone."""
    index, _ = block_index(name)
    return name if index is None else (name.split(f".{index}.", 1)[0], index)
