"""Model stock: how far to go from the base towards the average of its fine-tunes, told by the angle between them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from luthier.catalog import register
from luthier.core.source import TensorSource
from luthier.core.windows import cut_out
from luthier.errors import RecipeError
from luthier.merge._shared import VectorMerger, deltas

if TYPE_CHECKING:
    from luthier.core.context import Context

NOTHING = 1e-6
"""Below this the product of two norms is not divided by, and a denominator counts as 0."""


def model_stock(updates: SequenceOf[Tensor], filter_wise: bool = False) -> tuple[Tensor, Tensor]:
    """(t * mean of the updates, t): one t for the tensor, or for each of its rows (along the last dimension)."""
    t = ratio(products(updates, filter_wise))
    return t.unsqueeze(-1) * _mean(updates) if filter_wise and updates[0].ndim > 0 else t * _mean(updates), t


def products(updates: SequenceOf[Tensor], filter_wise: bool = False) -> Tensor:
    """[N, N, ...]: the inner products of all pairs, of the whole tensors or of their rows."""
    flat = [u if filter_wise and u.ndim > 0 else u.reshape(-1) for u in updates]
    found: list[list[Tensor]] = [[] for _ in flat]
    for i, j in itertools.product(range(len(flat)), repeat=2):
        found[i].append(torch.linalg.vecdot(flat[i], flat[j]) if i <= j else found[j][i])
    return torch.stack([torch.stack(row) for row in found])


def ratio(inner: Tensor) -> Tensor:
    """t = N c / (1 + (N - 1) c), c the mean cosine of all pairs of N updates. 0 where 1 + (N - 1) c vanishes: opposed updates say nothing
    about where the centre is."""
    n = len(inner)
    norms = [inner[i, i].sqrt() for i in range(n)]
    cosines = [(inner[i, j] / (norms[i] * norms[j]).clamp(min=NOTHING)).clamp(-1, 1) for i, j in itertools.combinations(range(n), 2)]
    cosine = torch.stack(cosines).mean(0)
    bottom = 1 + (n - 1) * cosine
    return torch.where(bottom.abs() < NOTHING, 0.0, n * cosine / bottom.masked_fill(bottom.abs() < NOTHING, 1))


def _mean(updates: SequenceOf[Tensor]) -> Tensor:
    return sum(updates[1:], updates[0]) / len(updates)


@register("model-stock")
@dataclass
class ModelStock(VectorMerger):
    """From few fine-tunes of one base, estimate the centre that many would average to: it lies between the base and their mean.

    Fine-tunes of one set-up lie on a thin shell around that centre. With the mean cosine c between the N updates of a tensor,
    t = N c / (1 + (N - 1) c) and theta = theta_0 + t * (mean_i theta_i - theta_0): equal updates (c = 1) give their mean, orthogonal
    ones the base. No data, no training, no settings. `filter_wise` takes one t for every row instead of every tensor. Needs two
    fine-tunes or more, of one base and one task, with other seeds, orders or rates.

    As in mergekit a pair whose norms multiply to less than 1e-6 has its cosine taken for smaller than it is, so tensors that hardly
    moved (bias vectors of a short run) stay nearer to the base; and where opposed updates make the denominator vanish the base is kept.
    Negative cosines give a negative t, as the formula says. `report` holds the t of every tensor (the mean over rows)."""

    filter_wise: bool = False
    """One ratio for every row of a tensor instead of one for the tensor."""
    skip: list[str] = field(default_factory=list)
    """Tensors to leave as the base has them: names, leading parts of names, or globs. Task heads belong here."""

    toy_models = ("second",)
    by_rows = True

    def __post_init__(self) -> None:
        self.report: dict[str, Any] = {"ratios": {}}

    def check(self, recipe: Any) -> str | None:
        named = [n for n in getattr(recipe, "merge_of", None) or [] if n != "base"]
        return None if not named or len(named) >= 2 else _TOO_FEW.format(len(named))  # what a page shows names none

    def update(self, base: Any, tuned: SequenceOf[Any], ctx: Context | None = None) -> TensorSource:
        updates = deltas(base, tuned, self.skip)
        if len(updates) < 2:
            raise RecipeError(_TOO_FEW.format(len(updates)))

        @functools.cache
        def ratios(name: str, rows: bool) -> Tensor:
            """The t of a whole tensor, whose inner products are added up in blocks of rows, or of each of its rows."""
            blocks = zip(*(u.pieces(name) for u in updates))
            if rows:
                return torch.cat([ratio(products(parts, True)) for parts in blocks])
            return ratio(torch.stack([products(parts) for parts in blocks]).sum(0))

        def read(name: str) -> Tensor:
            parts = [u[name] for u in updates]
            if not parts[0].is_floating_point() or parts[0].numel() == 0:
                return parts[0]
            rows = self.filter_wise and parts[0].ndim > 1
            t = ratios(updates[0].aliases.get(name, name), rows)
            self.report["ratios"][name] = float(t.detach().mean())
            return (cut_out(name, t).unsqueeze(-1) if rows else t) * _mean(parts)

        return TensorSource(updates[0], read, updates[0].meta, updates[0].aliases)


_TOO_FEW = (
    "model-stock compares two fine-tunes or more of one base, but `of` names {}; name more (runs, folders or models), e.g. `of: [this, other]`, "
    "or use lines or uniform-soup with `include_base`."
)
