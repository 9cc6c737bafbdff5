"""Model Breadcrumbs: cut both tails of every update by magnitude, then add them up."""

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
from luthier.core.sparse import Cut, band_mask, cut
from luthier.core.windows import whole
from luthier.errors import RecipeError
from luthier.merge._shared import VectorMerger, deltas, floating, layer_of, size_of, summed

if TYPE_CHECKING:
    from luthier.core.context import Context

Granularity = Literal["tensor", "row", "layer"]
Order = Literal["remove-first", "keep-first"]


def breadcrumbs(
    base: Any, tuned: Any, keep: float = 0.2, remove: float = 0.1, scale: float = 0.4, granularity: Granularity = "tensor",
    order: Order = "remove-first", weights: SequenceOf[float] | None = None, skip: SequenceOf[str] = (),
) -> TensorSource:  # fmt: skip
    """theta_0 + scale * sum_t m_t (theta_t - theta_0), lazily. See the class for the mask m."""
    base = TensorSource.of(base)
    crumbs = [middle(update, keep, remove, granularity, order) for update in deltas(base, tuned, skip)]
    return applied(base, summed(crumbs, scale, weights))


def middle(update: TensorSource, keep: float, remove: float, granularity: Granularity = "tensor", order: Order = "remove-first") -> TensorSource:
    """An update without its largest and its smallest entries; nothing is rescaled."""
    ranks = functools.partial(_ranks, keep=keep, remove=remove, order=order)
    mask_of = None if granularity == "row" else _together(update, ranks, layer_of if granularity == "layer" else str)

    def read(name: str, tensor: Tensor) -> Tensor:
        if tensor.ndim == 0 or not tensor.is_floating_point():
            return tensor
        size = tensor.abs()
        if mask_of is not None:
            mask = mask_of(update.aliases.get(name, name), size)
        else:
            mask = band_mask(size, *ranks(tensor.shape[-1]), rows=True)
        return torch.where(mask, tensor, torch.zeros_like(tensor))

    changed = update.map_named(read)
    return TensorSource(update, changed.__getitem__, update.meta, update.aliases)


def _ranks(n: int, keep: float, remove: float, order: Order) -> tuple[int, int]:
    """The first magnitude rank that is kept of n, and how many are."""
    first, number = int(remove * n), int(keep * n)
    return (first, number) if order == "remove-first" else (first, max(0, number - first))


def _together(update: TensorSource, ranks: Callable[[int], tuple[int, int]], group_of: Callable[[str], Any]) -> Callable[[str, Tensor], Tensor]:
    """Masks over all tensors of a group together: of a block (a tensor outside the blocks is alone), or of one tensor."""
    layers: dict[Any, list[str]] = {}
    for name in floating(update):
        layers.setdefault(group_of(name), []).append(name)

    @functools.cache
    def cuts(key: Any) -> tuple[Cut, Cut]:
        # Single numbers are kept whole and belong to no ranking.
        members = [n for n in layers[key] if (m := update.meta(n)) is None or m[0] != ()]
        with whole():
            sizes = update.only(members).map(torch.abs, entrywise=True)
            first, number = ranks(size_of(update.only(members)))
            return cut(sizes, first + number), cut(sizes, first)

    def mask(name: str, size: Tensor) -> Tensor:
        outer, inner = cuts(group_of(name))
        return outer.mask(name, size) & ~inner.mask(name, size)

    return mask


@register("breadcrumbs", paper=96)
@dataclass
class Breadcrumbs(VectorMerger):
    """Of what every fine-tune changed keep only the middle: the tiny changes are noise that adds up, the huge ones are outliers that wreck other tasks.

    For every tensor: drop the int(remove n) entries of largest magnitude, keep the next int(keep n), zero the rest, rescale nothing;
    theta = theta_0 + scale * sum_t m_t (theta_t - theta_0), a sum over tasks. The same values are meant to keep working as tasks are
    added. keep = 1, remove = 0 is task arithmetic.

    Defaults are the example of the released code for two tasks; `keep` is its beta, `remove` its gamma, `scale` its alpha, fractions
    KEPT and REMOVED (the paper's beta and gamma are percentiles of what is cut: about 0.1 kept, 0.01 removed, scale 0.3). `remove-first`
    is the released order, ranks [remove n, (remove + keep) n); `keep-first` takes the outliers out of the kept ones, so keep - remove
    is left. The paper speaks of layers, mergekit ranks whole tensors (our default; `keep` is its density), the release ranks every row,
    which deletes rows too short for a share of 1. Single numbers are kept whole, as released. Where keep + remove
    exceeds 1 outliers are dropped all the same (mergekit then drops fewer, and none at density 1). Equal magnitudes are ranked by index."""

    keep: float = 0.2
    """The share of entries that is kept (beta)."""
    remove: float = 0.1
    """The share of largest entries that is dropped as outliers (gamma)."""
    scale: float = 0.4
    """What the summed updates are multiplied by (alpha)."""
    granularity: Literal["tensor", "row", "layer"] = "tensor"
    """What magnitudes are ranked over: a tensor, each row of it, or all tensors of a block."""
    order: Literal["remove-first", "keep-first"] = "remove-first"
    """Which cut is made first."""
    weights: list[float] | None = None
    """One weight for each model; all 1 if not given."""
    skip: list[str] = field(default_factory=list)
    """Tensors to leave as the base has them: names, leading parts of names, or globs. Task heads belong here."""

    by_rows = True

    def __post_init__(self) -> None:
        for name in ("keep", "remove"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"`{name}` of breadcrumbs is {getattr(self, name)}; it is a share of entries, from 0 to 1.")

    def update(self, base: Any, tuned: SequenceOf[Any], ctx: Context | None = None) -> TensorSource:
        crumbs = [middle(u, self.keep, self.remove, self.granularity, self.order) for u in deltas(base, tuned, self.skip)]
        return summed(crumbs, self.scale, self.weights)
