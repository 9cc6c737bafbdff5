"""Straggler sparsify: mix base and tuned model, with a sparse update in the few layers that spoil the mix (paper 55)."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from luthier.catalog import register
from luthier.core.at_weights import at_weights
from luthier.core.landscape import Landscape, collated, layer_barriers, layers, stragglers
from luthier.core.source import TensorSource, applied, left_out
from luthier.core.sparse import Cut, cut
from luthier.core.windows import whole
from luthier.errors import ModelError, RecipeError
from luthier.merge._shared import VectorMerger, best, deltas, models, size_of, summed

if TYPE_CHECKING:
    from luthier.core.context import Context

GRID = tuple(round(1 - i / 10, 1) for i in range(11))


def straggler_sparsify(base: Any, tuned: Any, names: Iterable[str], keep: float = 0.3, strength: float = 1.0, skip: SequenceOf[str] = ()) -> TensorSource:
    """theta_0 + strength * delta', where of the tensors that `names` names (globs and leading parts too) only the largest changes are left, lazily."""
    base = TensorSource.of(base)
    return applied(base, scaled(sparse_in(_mean(deltas(base, tuned, skip)), names, keep), strength))


def sparse_in(update: TensorSource, names: Iterable[str], keep: float) -> TensorSource:
    """An update of which some tensors keep only their int(keep n) entries of largest magnitude."""
    patterns = list(names)

    @functools.cache
    def largest(name: str) -> Cut:
        with whole():
            one = update.only([name])
            return cut(one.map(torch.abs, entrywise=True), int(keep * size_of(one)))

    def change(name: str, x: Tensor) -> Tensor:
        if not x.is_floating_point() or not left_out(name, patterns):
            return x
        return largest(name).trim(name, x)

    changed = update.map_named(lambda name, x: change(update.aliases.get(name, name), x))
    return TensorSource(update, changed.__getitem__, update.meta, update.aliases)


def scaled(update: TensorSource, strength: float) -> TensorSource:
    """strength * delta."""
    return summed([update], strength)


def _mean(updates: SequenceOf[TensorSource]) -> TensorSource:
    mean = summed(updates, 1 / len(updates))
    mean.by_rows = all(update.by_rows for update in updates)
    return mean


@register("straggler-sparsify", paper=55)
@dataclass
class StragglerSparsify(VectorMerger):
    """Mix the base with its fine-tune for robustness, and where single layers spoil the mix keep only the largest of their changes.

    theta(a) = theta_0 + a delta', with a = `strength` (robust fine-tuning by weight interpolation, WiSE-FT). In the straggler layers
    delta' keeps the int(keep n) entries of largest magnitude of each tensor, elsewhere it is theta_1 - theta_0. Stragglers are the
    `share` of layers with the highest barrier: put layer l alone at (1-a) theta_0 + a theta_1, all others tuned, and take how far the
    loss on the validation rows rises above the straight line between the ends of that path (see the measure `interpolation`). Several
    fine-tunes enter as their mean. keep 1 is plain interpolation, strength 1 and keep 1 the tuned model.

    `strength` 0.5 is what WiSE-FT advises without validation; `auto` takes the best of 1.0, 0.9 ... 0 on the validation rows, which should
    then hold rows from outside the training distribution, or the tuned end wins. Decided where the paper's text leaves it open: the update
    is made sparse, not the layer itself; tensor by tensor, since gains and matrices change on other scales; keep 0.3 of 0.1, 0.3, 0.5;
    the top 20 % of layers, a layer being a block and outside the blocks a module. `report` says which layers they were."""

    keep: float = 0.3
    """The share of a straggler's changes that is kept."""
    share: float = 0.2
    """The share of layers that are taken for stragglers."""
    strength: float | Literal["auto"] = 0.5
    """How far to go from the base (0) to the tuned model (1), or `auto`."""
    stragglers: list[str] | None = None
    """The stragglers by name (names, leading parts of names, or globs), if they are known; found on the validation rows if not given."""
    by: Literal["block", "module"] = "block"
    """What a layer is."""
    points: int = 5
    """Points on the path of a layer."""
    limit: int = 256
    """At most so many validation rows."""
    skip: list[str] = field(default_factory=list)
    """Tensors to leave as the base has them: names, leading parts of names, or globs. Task heads belong here."""

    needs = frozenset({"val"})
    toy = {"points": 3}

    by_rows = True

    def __post_init__(self) -> None:
        for name in ("keep", "share"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"`{name}` of straggler-sparsify is {getattr(self, name)}; it is a share, from 0 to 1.")
        if self.strength != "auto" and (isinstance(self.strength, (str, bool)) or not 0 <= self.strength <= 1):
            raise RecipeError(f"`strength` of straggler-sparsify is {self.strength!r}; give a number from 0 (the base) to 1 (the tuned model), or 'auto'.")
        if self.points < 3 or self.limit < 1:
            raise RecipeError(f"straggler-sparsify needs 3 `points` or more and a `limit` of 1 or more, not {self.points} and {self.limit}.")
        if self.stragglers is not None and self.strength != "auto":
            vars(self)["needs"] = frozenset()  # nothing is left to be found on validation rows
        self.report: dict[str, Any] = {}

    def update(self, base: Any, tuned: SequenceOf[Any], ctx: Context | None = None) -> TensorSource:
        base = TensorSource.of(base)
        update = _mean(deltas(base, models(tuned), self.skip))
        names = self.stragglers if self.stragglers is not None else self._found(base, update, ctx)
        sparse = sparse_in(update, names, self.keep)
        strength = self._strength(base, sparse, ctx)
        self.report |= {"strength": strength}
        return scaled(sparse, strength)

    def _found(self, base: TensorSource, update: TensorSource, ctx: Context | None) -> list[str]:
        """The tensors of the stragglers."""
        if ctx is None or ctx.current is None or not ctx.has_rows("val"):
            raise RecipeError("straggler-sparsify finds the stragglers on validation rows; add `data: {val: FILE}`, or name them in `stragglers`.")
        family, whole = ctx.current, applied(base, update)
        if missing := next((n for n in base if n not in family.network.state_dict()), None):
            raise ModelError(f"straggler-sparsify runs the current model at other weights, but it has no tensor '{missing}'; merge its adapter first.")
        view = Landscape(family, collated(family, ctx.rows("val"), ctx.train_on, self.limit))
        with at_weights(family.network, whole.only(whole.distinct), statistics=True):
            barriers = layer_barriers(base, whole, view.loss, self.points, self.by)
        chosen = stragglers(barriers, self.share)
        self.report |= {"stragglers": chosen, "barriers": barriers}
        by_layer = layers(base.distinct, self.by)
        return [name for layer in chosen for name in by_layer[layer]]

    def _strength(self, base: TensorSource, sparse: TensorSource, ctx: Context | None) -> float:
        if self.strength != "auto":
            return float(self.strength)
        if ctx is None or ctx.evaluator is None:
            raise RecipeError("`strength: auto` of straggler-sparsify needs validation rows; add `data: {val: FILE}`, or give a number.")
        chosen, tried = best(GRID, lambda a: ctx.score(applied(base, scaled(sparse, a))))
        self.report["tried"] = tried
        return chosen
