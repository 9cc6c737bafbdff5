"""What the mergers share that drop entries of each update at random (dare, della): chance by name, rescaling, adding up."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from luthier.core.context import seed_of
from luthier.core.source import TensorSource
from luthier.core.windows import offset
from luthier.errors import RecipeError
from luthier.merge._shared import VectorMerger, deltas, weights_of

if TYPE_CHECKING:
    from luthier.core.context import Context

Rescale = Literal["l1", "density", "none"]
Sizes = tuple[Any, Any]
"""The sums of absolute values of a whole update, and of its entries that chance keeps."""
NOTHING = 1e-7
"""An update whose absolute values sum to less than this is not rescaled."""


def chance(name: str, shape: SequenceOf[int], seed: int, at: int = 0) -> Tensor:
    """Numbers in [0, 1) that depend on the tensor's name, the seed and the place alone: in whatever order and in how many pieces a tensor
    is read, it loses the same entries. `at`: the entries before these. (Philox counts, so that any place can be begun with.)"""
    many = math.prod(shape)
    bits = np.random.Philox(key=seed_of("sparsified", seed, name), counter=at // 8).random_raw((at % 8 + many + 1) // 2)  # 8 halves of 64 bits a count
    return torch.from_numpy((bits.view(np.uint32)[at % 8 : at % 8 + many] >> 8).astype(np.float32) * np.float32(2**-24)).reshape(tuple(shape))


def thinned(x: Tensor, keep: float | Tensor, draw: Tensor, rescale: Rescale = "l1", sizes: Sizes | None = None) -> Tensor:
    """The entries of x whose number in `draw` is below `keep` (a probability, or one for every entry); the others are 0.

    `l1` then multiplies all by ||x||_1 / ||kept||_1, `density` divides each by its probability, `none` leaves them. `sizes` are these two
    norms where x is not the whole update."""
    kept = x.masked_fill(~(draw.to(x.device) < (keep if isinstance(keep, float) else keep.to(x.device))), 0)
    if rescale == "density":
        return kept / keep if isinstance(keep, Tensor) or keep > 0 else kept
    if rescale == "l1":
        before, after = sizes or (x.abs().sum(), kept.abs().sum())
        if before >= NOTHING and after >= NOTHING:
            return kept * (before / after)
    return kept


Change = Callable[[Tensor, Tensor, Sizes], Tensor]
"""(rows of an update, a number in [0, 1) for every entry, sizes) -> what is left of the rows, rescaled."""


def sparsified(update: TensorSource, seed: int, change: Change, sized: bool = True) -> TensorSource:
    """`change` of every floating tensor, lazily and in whatever rows are asked for; tied tensors go by the name that comes first.

    `sized`: it needs the sizes, for which every tensor is read once more."""

    @functools.cache
    def sizes(name: str) -> Sizes:
        """Always summed up in the same blocks."""
        before: Any = 0
        after: Any = 0
        at = 0
        for x in update.pieces(name):
            before = x.abs().sum() + before
            after = change(x, chance(name, x.shape, seed, at), (1.0, 1.0)).abs().sum() + after
            at += x.numel()
        return before, after

    def read(name: str) -> Tensor:
        x, first = update[name], update.aliases.get(name, name)
        if not x.is_floating_point():
            return x
        return change(x, chance(first, x.shape, seed, offset(name, math.prod(x.shape[1:]))), sizes(first) if sized else (1.0, 1.0))

    return TensorSource(update, read, update.meta, update.aliases)


def combined(
    updates: SequenceOf[TensorSource], weights: SequenceOf[float] | None = None, scale: float = 1.0, agree: bool = False, normalise: bool = False
) -> TensorSource:  # fmt: skip
    """scale * sum_i w_i d_i; with `agree` only of the entries whose sign is that of the sum (+ where it is 0).

    `normalise` divides by the weights that took part, where those do not cancel."""
    w = weights_of(weights, len(updates))

    def read(name: str) -> Tensor:
        first = updates[0][name]
        if not first.is_floating_point():
            return first
        values = [weight * update[name] for weight, update in zip(w, updates)]
        total = sum(values[1:], values[0])
        if not agree:
            share = sum(w)
            return scale * total / (share if normalise and abs(share) >= 1e-8 else 1.0)
        sign = torch.where(total >= 0, 1.0, -1.0).to(total.dtype)
        total, shares = torch.zeros_like(total), torch.zeros_like(total)
        for weight, value in zip(w, values):
            takes_part = value.sign() == sign
            total += value.masked_fill(~takes_part, 0)
            shares += weight * takes_part
        return scale * (total / shares.masked_fill(shares == 0, 1) if normalise else total)

    return TensorSource(updates[0], read, updates[0].meta, updates[0].aliases)


@dataclass
class Sparsified(VectorMerger):
    """Every update loses entries at random, then the updates are added up."""

    density: float = 0.5
    """The share of every update's entries that is kept."""
    scale: float = 1.0
    """What the merged update is multiplied by (mergekit's lambda)."""
    weights: list[float] | None = None
    """One weight for each model; all 1 if not given."""
    normalise: bool = False
    """Divide by the weights that took part: a mean instead of a sum."""
    rescale: Literal["l1", "density", "none"] = "l1"
    """What makes up for the dropped entries: `l1` keeps the update's sum of absolute values, `density` divides by the probability to be kept."""
    seed: int | None = None
    """Seed of the choice; the run's if not given."""
    skip: list[str] = field(default_factory=list)
    """Tensors to leave as the base has them: names, leading parts of names, or globs. Task heads belong here."""

    by_rows = True
    agree: ClassVar[bool] = False
    """Whether a sign is elected for every entry."""

    def __post_init__(self) -> None:
        if not 0 <= self.density <= 1:
            raise RecipeError(f"`density` of {self.name} is {self.density}; it is the share of entries kept, from 0 to 1.")

    def thin(self, x: Tensor, draw: Tensor, sizes: Sizes) -> Tensor:
        """Rows of an update without the entries that chance drops."""
        raise NotImplementedError

    def update(self, base: Any, tuned: SequenceOf[Any], ctx: Context | None = None) -> TensorSource:
        seed = self.seed if self.seed is not None else ctx.seed if ctx is not None else 0
        sparse = [sparsified(update, seed_of(seed, i), self.thin, self.rescale == "l1" and self.density < 1) for i, update in enumerate(deltas(base, tuned, self.skip))]
        return combined(sparse, self.weights, self.scale, self.agree, self.normalise)
