"""TIES: trim each update to its largest entries, elect a sign for every weight, average those that agree."""

from __future__ import annotations

import functools
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from luthier.catalog import register
from luthier.core.source import TensorSource, applied
from luthier.core.sparse import Cut, cut
from luthier.core.windows import whole
from luthier.errors import RecipeError
from luthier.merge._shared import VectorMerger, deltas, floating, size_of, weights_of

if TYPE_CHECKING:
    from luthier.core.context import Context

Elect = Literal["mass", "count"]
Combine = Literal["mean", "sum", "max"]


def ties(
    base: Any, tuned: Any, density: float = 0.2, scale: float = 1.0, scope: Literal["all", "tensor"] = "all", elect: Elect = "mass",
    combine: Combine = "mean", weights: SequenceOf[float] | None = None, skip: SequenceOf[str] = (),
) -> TensorSource:  # fmt: skip
    """theta_0 + scale * TIES of the updates, lazily. See the class for the steps."""
    base = TensorSource.of(base)
    return applied(base, trimmed_merge(deltas(base, tuned, skip), density, scale, scope, elect, combine, weights))


def trimmed_merge(
    updates: SequenceOf[TensorSource], density: float, scale: float, scope: str, elect: Elect, combine: Combine, weights: SequenceOf[float] | None
) -> TensorSource:  # fmt: skip
    """The merged update. Thresholds over whole vectors and the majority sign are found when they are first needed."""
    w = weights_of(weights, len(updates))
    trims = [_trim(update, density, scope) for update in updates]

    def trimmed(name: str) -> list[Tensor]:
        found = (trim(name, update[name]) for trim, update in zip(trims, updates))  # one untrimmed update at a time
        return [x if weight == 1 else x.mul_(weight) for weight, x in zip(w, found)]

    @functools.cache
    def majority() -> float:
        def read(name: str) -> Tensor:
            first = updates[0][name]
            return elected(trimmed(name), elect) if first.is_floating_point() else first

        signs = TensorSource(floating(updates[0]), read, updates[0].meta)
        signs.by_rows = True
        total = sum(float(part.double().sum()) for name in signs for part in signs.pieces(name) if part.is_floating_point())
        return -1.0 if total < 0 else 1.0

    def read(name: str) -> Tensor:
        first = updates[0][name]
        if not first.is_floating_point():
            return first
        return scale * agreeing(trimmed(name), w, elect, combine, majority)

    return TensorSource(updates[0], read, updates[0].meta, updates[0].aliases)


def _trim(update: TensorSource, density: float, scope: str) -> Callable[[str, Tensor], Tensor]:
    """A tensor's update with nothing but its largest entries: int(density n) of the whole vector or of the tensor."""

    @functools.cache
    def threshold(name: str | None) -> Cut:
        with whole():
            vector = floating(update) if name is None else update.only([name])
            least = 0 if name is None or density == 0 else 1  # small tensors keep an entry
            return cut(vector.map(torch.abs, entrywise=True), max(least, int(density * size_of(vector))))

    def trim(name: str, tensor: Tensor) -> Tensor:
        return threshold(None if scope == "all" else name).trim(update.aliases.get(name, name) if scope == "all" else name, tensor)

    return trim


def elected(values: SequenceOf[Tensor], elect: Elect) -> Tensor:
    """The sign of every entry: of the summed values (mass), or of most values (count); 0 where they balance."""
    total = torch.zeros_like(values[0])
    for x in values:
        total += x.sign() if elect == "count" else x
    return total.sign_()


def agreeing(values: SequenceOf[Tensor], weights: SequenceOf[float], elect: Elect, combine: Combine, majority: Callable[[], float]) -> Tensor:
    """Merge the models' entries that have the elected sign; entries that balance take the sign most of the vector has."""
    sign = elected(values, elect)
    held = torch.zeros_like(sign)
    for x in values:
        held += x.abs()
    if bool((held.sign_() > sign.abs()).any()):  # something is there, but it balances
        sign = sign.masked_fill(sign == 0, majority())
    total, share = torch.zeros_like(sign), torch.zeros_like(sign)
    for weight, x in zip(weights, values):
        along = (x * sign).clamp_(min=0)  # what agrees, made positive
        total = torch.maximum(total, along) if combine == "max" else total.add_(along)
        if combine == "mean":
            share.add_(along.sign_(), alpha=abs(weight))
    if combine == "mean":
        total.div_(share.masked_fill_(share == 0, 1))
    return total.mul_(sign)


@register("ties")
@dataclass
class Ties(VectorMerger):
    """Before adding fine-tunes up, keep only each one's largest changes and, for every weight, only the changes that agree in sign.

    1. Trim: of every update keep its `density` largest entries by magnitude. 2. Elect a sign for every entry: that of the summed
    trimmed updates (`mass`) or of most of them (`count`). 3. Disjoint merge: the mean over the models whose trimmed entry has the
    elected sign. theta = theta_0 + scale * merged.

    Defaults are the paper's without validation (20 %, scale 1). `scope: all` ranks the whole vector as the paper does, `tensor` each
    tensor alone as mergekit does (there at least one); exactly int(density n) entries are kept (the released threshold keeps one more). Entries that
    balance exactly take the sign that most of the vector has, as released. Weights scale updates before the election, and the mean
    then divides by the agreeing weights. For `lines` wrap it: the depth scale belongs after a nonlinear merger, not before."""

    density: float = 0.2
    """The share of every update's entries that is kept."""
    scale: float = 1.0
    """What the merged update is multiplied by (tuned over 0.8 to 1.8 in the paper)."""
    scope: Literal["all", "tensor"] = "all"
    """Whether the largest entries are found over the whole model or within every tensor."""
    elect: Literal["mass", "count"] = "mass"
    """How the sign of an entry is elected."""
    combine: Literal["mean", "sum", "max"] = "mean"
    """What becomes of the entries that agree."""
    weights: list[float] | None = None
    """One weight for each model; all 1 if not given."""
    skip: list[str] = field(default_factory=list)
    """Tensors to leave as the base has them: names, leading parts of names, or globs. Task heads belong here."""

    by_rows = True

    def __post_init__(self) -> None:
        if not 0 <= self.density <= 1:
            raise RecipeError(f"`density` of ties is {self.density}; it is the share of entries kept, from 0 to 1.")

    def update(self, base: Any, tuned: SequenceOf[Any], ctx: Context | None = None) -> TensorSource:
        updates = deltas(base, tuned, self.skip)
        return trimmed_merge(updates, self.density, self.scale, self.scope, self.elect, self.combine, self.weights)
