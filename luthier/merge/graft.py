"""Grafting: find the few tuned entries that hold a skill, and copy only these onto the base."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from luthier.catalog import register
from luthier.core import sparse
from luthier.core.at_weights import at_weights, batches_of, covers, log_likelihoods, merit
from luthier.core.mask_learning import density, largest, learn, sigmoid_gate
from luthier.core.modelmap import category
from luthier.core.source import TensorSource, aligned, left_out
from luthier.errors import RecipeError
from luthier.merge import Merger
from luthier.merge._shared import models

if TYPE_CHECKING:
    from luthier.core.batch import Batch
    from luthier.core.context import Context
    from luthier.core.families import Family

Masks = dict[str, Tensor]


def graft(base: Any, tuned: Any, masks: Any, whole: Iterable[str] = ()) -> TensorSource:
    """gamma theta_tuned + (1 - gamma) theta_base for binary masks, lazily: values are copied, so each entry is one model's to the bit.

    Several tuned models come with one dict of masks each; an entry that several claim is their mean. `whole` names tensors to copy entirely
    (from the first model)."""
    base, whole = TensorSource.of(base), list(whole)
    sources = [aligned(base, TensorSource.of(one, base)) for one in models(tuned)]
    listed = [masks] if isinstance(masks, Mapping) else list(masks)

    def read(name: str) -> Tensor:
        own = base[name]
        if not own.is_floating_point():
            return own.clone()
        if left_out(name, whole):
            return sources[0][name].to(own.dtype)
        found = [(s, m[key].to(own.device)) for s, m in zip(sources, listed) if (key := base.aliases.get(name, name)) in m]
        if len(found) == 1:
            return torch.where(found[0][1], found[0][0][name].to(own.device, own.dtype), own)
        return _mean_of([(s[name], m) for s, m in found], own)

    return TensorSource(base, read, base.meta, base.aliases)


def _mean_of(found: list[tuple[Tensor, Tensor]], own: Tensor) -> Tensor:
    total, number = torch.zeros_like(own, dtype=torch.float64), torch.zeros_like(own, dtype=torch.int16)
    for tensor, mask in found:
        total += torch.where(mask, tensor.to(total), 0.0)
        number += mask
    return torch.where(number > 0, (total / number.clamp(min=1)).to(own.dtype), own)


def overlap(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """|one and other| / |one|: how much of a region lies in another's."""
    both = sum(int((m & other[n]).sum()) for n, m in one.items() if n in other)
    return both / max(1, sum(int(m.sum()) for m in one.values()))


@dataclass
class Learned:
    """A learned region, and how it came to be."""

    masks: Masks
    update: int
    """After which update it stood; 0: the start was never beaten."""
    lr: float
    losses: list[float]
    history: list[dict[str, float]]
    """Merit and density of the rounded mask after each update, the start first."""


def learn_region(
    base: Mapping[str, Tensor], change: Mapping[str, Tensor], start: Masks, network: nn.Module, draws: Iterable[list[Callable[[], Tensor]]],
    value: Callable[[Masks], float], bias: float = 10.0, lr: float | None = None, limit: int | None = None, generator: torch.Generator | None = None,
) -> Learned:  # fmt: skip
    """Plain gradient descent on S of gamma = start (1 - s) + (1 - start) s, s = sigmoid(S - bias), at theta = base + gamma change.

    `base` names all weights to run at, `change` those that may be grafted. After every update the rounded mask is judged by `value` (with a
    `limit` the mask of that many largest gammas); the first best one is kept. lr None: the first update moves the most moved score by 1."""
    scores = {n: torch.rand(c.shape, generator=generator).to(c.device).requires_grad_() for n, c in change.items()}
    optimizer = torch.optim.SGD(list(scores.values()), lr=lr or 0.0)
    kept = Learned(start, 0, lr or 0.0, [], [])
    best = value(start)
    kept.history.append({"merit": best, "density": density(start)})

    def weights() -> dict[str, Tensor]:
        return {**base, **{n: base[n] + sigmoid_gate(scores[n], start[n], bias) * c for n, c in change.items()}}

    def before(i: int) -> None:
        if i == 0 and lr is None:
            most = max(float(s.grad.abs().max()) for s in scores.values())  # type: ignore[union-attr]
            optimizer.param_groups[0]["lr"] = kept.lr = 1 / most if most > 0 else 0.0

    def after(i: int) -> None:
        nonlocal best
        with torch.no_grad():
            gates = {n: sigmoid_gate(scores[n], start[n], bias) for n in scores}
            rounded = {n: g > 0.5 for n, g in gates.items()} if limit is None else largest(gates, limit)
        found = value(rounded)
        kept.history.append({"merit": found, "density": density(rounded)})
        if found > best:
            best, kept.masks, kept.update = found, rounded, i + 1

    kept.losses = learn(scores, weights, network, draws, optimizer, before, after)
    return kept


@register("graft", paper=72)
@dataclass
class Graft(Merger):
    """Find where a fine-tune's skill lives: a very sparse mask such that copying just those tuned values onto the base keeps nearly all of it.

    theta = gamma theta_tuned + (1 - gamma) theta_base, gamma in {0, 1}. Base patch: the `density` share of entries that moved most (one
    threshold for the whole model). Learned from there with gamma(S) = gamma_b (1 - sigmoid(S - bias)) + (1 - gamma_b) sigmoid(S - bias),
    S ~ U(0, 1) at the start: plain gradient steps on the loss of the rows, each the mean of up to `accumulation` batches; after every update
    the rounded mask is judged on the rows and on validation rows (accuracy, or log-likelihood; each kind counts half), and the best is kept. Nothing copied is
    trained further; all else is the base's to the bit. The mask may drop entries of the patch and add others, so its density may grow: the
    report says what it became, `exact` holds it. Grafts are better calibrated than the fine-tune and forget less; small learning rates with
    SGD (or an L1 pull to the base) make fine-tunes that graft well.

    Embeddings and heads are not grafted, as in the paper, which holds them fixed in tuning too (verbaliser words, `adapt` without them). A
    head that was trained from nothing has to be copied: name it in `whole`; it is not counted in the density. Several models give one region
    each (learned on `rows` of their own where these are listed), and an entry that several claim is their mean; the report has the overlaps.
    `action: forget` gives one tuned model without its region: the skill is taken out of it.

    Defaults: the paper's 0.01 %, bias 10 and 100 updates. The released learning rate of 1e7 belongs to one model's gradients, so `auto`
    scales it: the first update moves the score that moves most by 1. The number of rows in an update and that ties go to the earlier mask are
    our choice. Several whole models and the scores are in memory at once. With a run's folder the update is also written as graft.safetensors."""

    density: float = 1e-4
    """Share of the graftable entries in the base patch."""
    mask: Literal["learned", "movement", "random"] = "learned"
    """Learned from the base patch, the base patch itself, or as many entries at random (a control)."""
    exact: bool = False
    """Keep exactly that many entries: those with the largest gamma, in the place of all above one half."""
    updates: int = 100
    """Updates of the mask; the released example takes 10."""
    lr: float | Literal["auto"] = "auto"
    """Step size on S, or `auto`. 1e7 in the released example."""
    bias: float = 10.0
    """How far the scores start below one half."""
    batch: int = 16
    """Rows a batch."""
    accumulation: int = 32
    """Batches whose mean gradient makes an update."""
    judge: int = 512
    """At most so many rows of each kind (learned from, validation) judge a mask."""
    rows: str | list[str] = "train"
    """The row stream that a region is learned on; a list has one for each model."""
    action: Literal["graft", "forget"] = "graft"
    """Copy the region onto the base, or put the base's values into the tuned model's region."""
    whole: list[str] = field(default_factory=list)
    """Tensors to copy whole, such as a head that was trained from nothing: names, leading parts of names, or globs."""
    skip: list[str] = field(default_factory=list)
    """Tensors to leave as the base has them: names, leading parts of names, or globs."""

    families = frozenset({"causal-lm", "text-encoder", "image-classifier"})
    toy = {"density": 0.05, "updates": 2, "accumulation": 1, "batch": 4}

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise RecipeError(f"`density` of graft is {self.density}; it must be above 0 and at most 1 (0.01 is one entry in a hundred).")
        for name in ("updates", "batch", "accumulation", "judge"):
            if getattr(self, name) < 1:
                raise RecipeError(f"`{name}` of graft is {getattr(self, name)}; it must be 1 or more.")
        if self.lr != "auto" and (isinstance(self.lr, str) or self.lr <= 0):
            raise RecipeError(f"`lr` of graft is {self.lr!r}; give a number above 0 or 'auto'.")
        self.report: dict[str, Any] = {}

    def merge(self, base: Any, tuned: SequenceOf[Any], ctx: Context | None = None) -> TensorSource:
        base = TensorSource.of(base)
        sources = [aligned(base, TensorSource.of(one, base), self.skip) for one in models(tuned)]
        streams = [self.rows] * len(sources) if isinstance(self.rows, str) else list(self.rows)
        if len(streams) != len(sources):
            raise RecipeError(f"`rows` of graft lists {len(streams)} streams for {len(sources)} models; give one for each, or a single name.")
        if self.action == "forget" and len(sources) > 1:
            raise RecipeError(f"`action: forget` of graft takes a skill out of one tuned model, but {len(sources)} are merged; name one in `of`.")
        names = [n for n in base.distinct if self._graftable(n, base[n])]
        if not names:
            raise RecipeError("graft finds no tensor that it may graft; narrow its `skip` and `whole`.")
        self._warn(base, sources[0], names, ctx)
        regions = [self._region(base, s, names, stream, ctx) for s, stream in zip(sources, streams)]
        self.report["overlap"] = [[overlap(a, b) for b in regions] for a in regions]
        if self.action == "forget":
            return graft(base, sources, [self._outside(base, regions[0])])
        merged = graft(base, sources, regions, self.whole)
        if ctx is not None and ctx.folder is not None:
            sparse.save(_as_update(base, merged, regions), ctx.folder / "graft.safetensors")
        return merged

    def _graftable(self, name: str, tensor: Tensor) -> bool:
        return tensor.is_floating_point() and category(name) not in ("embedding", "head") and not left_out(name, [*self.skip, *self.whole])

    def _outside(self, base: TensorSource, region: Masks) -> Masks:
        """Everything but the region; what `skip` names is the base's anyway."""
        return {n: ~region[n] if n in region else torch.ones(base[n].shape, dtype=torch.bool) for n in base.distinct if base[n].is_floating_point()}

    def _warn(self, base: TensorSource, tuned: TensorSource, names: list[str], ctx: Context | None) -> None:
        rest = [n for n in base.distinct if n not in set(names) and base[n].is_floating_point() and not left_out(n, [*self.skip, *self.whole])]
        moved = [n for n in rest if not torch.equal(base[n], tuned[n].to(base[n]))]
        if moved and ctx is not None:
            ctx.notice(f"The fine-tune also moved '{moved[0]}', which a graft leaves as the base has it; keep embeddings and heads fixed while tuning, or name it in `whole`.")

    def _region(self, base: TensorSource, tuned: TensorSource, names: list[str], stream: str, ctx: Context | None) -> Masks:
        change = {n: tuned[n].float() - base[n].float() for n in names}
        size = sum(c.numel() for c in change.values())
        k = max(1, round(self.density * size))
        if self.mask == "random":
            generator = torch.Generator().manual_seed(0) if ctx is None else ctx.rng("graft")
            region = largest({n: torch.rand(c.shape, generator=generator) for n, c in change.items()}, k)
        else:
            region = largest({n: c.abs() for n, c in change.items()}, k)
        facts: dict[str, Any] = {"entries": size, "start": k / size}
        if self.mask == "learned":
            learned = self._learned(base, tuned, change, region, k, stream, ctx)
            region = learned.masks
            facts |= {"update": learned.update, "lr": learned.lr, "losses": learned.losses, "history": learned.history}
        self.report.setdefault("regions", []).append(facts | {"kept": sum(int(m.sum()) for m in region.values()), "density": density(region)})
        return region

    def _learned(self, base: TensorSource, tuned: TensorSource, change: Masks, start: Masks, k: int, stream: str, ctx: Context | None) -> Learned:
        if ctx is None or ctx.current is None:
            raise RecipeError("graft learns its mask with a model and rows; merge within a recipe, or set `mask: movement`.")
        family = ctx.current
        covers(family.network, base, "graft")
        place, rows = family.device, ctx.rows(stream)
        frozen = {n: base[n].to(place).float() for n in base.distinct if base[n].is_floating_point() and not left_out(n, self.whole)}
        frozen |= {n: tuned[n].to(place).float() for n in base.distinct if base[n].is_floating_point() and left_out(n, self.whole)}
        order = torch.randperm(len(rows), generator=ctx.rng("graft")).tolist()
        judges = [batches_of(family, rows, order[: self.judge], self.batch, ctx.train_on)]
        if ctx.has_rows("val"):
            judges.append(batches_of(family, ctx.rows("val"), range(min(self.judge, len(ctx.rows("val")))), self.batch, ctx.train_on))

        def value(masks: Masks) -> float:
            with at_weights(family.network, {**frozen, **{n: torch.where(m.to(place), tuned[n].to(place).float(), frozen[n]) for n, m in masks.items()}}):
                return sum(merit(family, kind) for kind in judges) / len(judges)

        moves, patch = {n: c.to(place) for n, c in change.items()}, {n: m.to(place) for n, m in start.items()}
        lr, limit = None if self.lr == "auto" else float(self.lr), k if self.exact else None
        with family.evaluating(grad=True):
            found = learn_region(frozen, moves, patch, family.network, self._draws(family, rows, ctx), value, self.bias, lr, limit, ctx.rng("graft"))
        found.masks = {n: m.cpu() for n, m in found.masks.items()}
        return found

    def _draws(self, family: Family, rows: Any, ctx: Context) -> Iterator[list[Callable[[], Tensor]]]:
        """For every update the losses of its batches: a new order of the rows each time, as in an epoch that is cut off."""
        for _ in range(self.updates):
            order = torch.randperm(len(rows), generator=ctx.rng("graft")).tolist()[: self.batch * self.accumulation]
            yield [_loss(family, batch) for batch in batches_of(family, rows, order, self.batch, ctx.train_on)]


def _loss(family: Family, batch: Batch) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        values = log_likelihoods(family, batch)
        return -values.sum() / max(1, len(values))

    return loss


def _as_update(base: TensorSource, merged: TensorSource, regions: list[Masks]) -> sparse.SparseDelta:
    """What was grafted, as positions and differences."""
    found: sparse.SparseDelta = {}
    for name in regions[0]:
        index = torch.stack([region[name] for region in regions]).any(0).reshape(-1).nonzero()[:, 0]
        found[name] = (index, merged[name].reshape(-1)[index].float() - base[name].reshape(-1)[index].float())
    return found
