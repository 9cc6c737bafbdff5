"""SOMF: give a fine-tune its safety back by learning which entries of its update may stay."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from luthier.catalog import fields_of, method, register
from luthier.core.at_weights import at_weights, batches_of, covers
from luthier.core.mask_learning import concrete_gate, density, learn, rescaled, uniform_like
from luthier.core.source import TensorSource, applied
from luthier.errors import DataError, RecipeError, nearest
from luthier.merge._shared import VectorMerger, deltas, models
from luthier.objective._shared import by_branch, preference

if TYPE_CHECKING:
    from luthier.core.batch import Batch
    from luthier.core.context import Context
    from luthier.core.families import Family

PAIR = ("chosen", "rejected")
Masks = Mapping[str, Tensor]


def somf(base: Any, tuned: Any, masks: Masks, fuse: VectorMerger | None = None, skip: SequenceOf[str] = ()) -> TensorSource:
    """theta_s + M(m delta_1 / mean(m), ..., m delta_T / mean(m)), lazily: one mask a tensor, shared by all models, binary or soft.

    delta_i = theta_i - theta_s; the mean is the tensor's own. One model alone is added as it is; several go through the merger `fuse`."""
    base = TensorSource.of(base)
    return applied(base, _fused(deltas(base, tuned, skip), masks, fuse))


def _fused(updates: SequenceOf[TensorSource], masks: Masks, fuse: VectorMerger | None) -> TensorSource:
    """The fused update. Gradients flow through the masks' values; what the merger chooses by them (TIES' signs) is constant."""

    def masked(update: TensorSource) -> TensorSource:
        def read(name: str, t: Tensor) -> Tensor:
            mask = masks.get(update.aliases.get(name, name))
            return t if mask is None else rescaled(mask.to(torch.float32)).to(t.device, t.dtype) * t

        made = update.map_named(read)
        return TensorSource(update, made.__getitem__, update.meta, update.aliases)

    parts = [masked(update) for update in updates]
    if len(parts) == 1:
        return parts[0]
    assert fuse is not None
    # A merger of updates is one of models whose base is zero.
    zero = TensorSource(updates[0], lambda name: torch.zeros_like(updates[0][name]), updates[0].meta, updates[0].aliases)
    return fuse.update(zero, parts)


def preference_loss(family: Family, batch: Batch, reference: Tensor, beta: float = 0.1) -> Tensor:
    """Mean of -log sigmoid(beta [(l_w - l_w^ref) - (l_l - l_l^ref)]), l = sums of log p over answers; `reference` is [rows, 2]."""
    return preference(pair_logps(family, batch), reference, beta=beta).mean()


def pair_logps(family: Family, batch: Batch) -> Tensor:
    """[rows, 2] sums of log p over the chosen and the rejected answer."""
    pairs = batch.of_branch(*PAIR)
    return by_branch(pairs, family.score(pairs).rows("sum"), PAIR)


@register("somf", paper=84)
@dataclass
class SOMF(VectorMerger):
    """Realign fine-tunes of a safe model: learn one binary mask of the entries of their updates that lie outside the safety region, and add only these.

    delta_i = theta_i - theta_s (the recipe's model is the safe one). Mask logits phi per entry, 0 at first, shared by all models; a relaxed
    Bernoulli sample m = sigmoid((phi + log u - log(1 - u)) / temperature), u uniform, fresh at every step; theta(phi) = theta_s + M(m delta_1 /
    mean(m), ...), the mean per tensor. Only phi is trained, by DPO on preference rows (safe answer chosen, unsafe rejected). The result
    uses m = [phi > 0] (`final: threshold`), so that it does not depend on chance; a binary sample, as we read the release, or the noise-free soft
    mask are options. Several models go through the merger `fuse`, so a merged model is realigned at once; one alone is added as it is.

    Decided where the paper is silent: the DPO reference is the fusion without a mask, the state that training starts from up to noise (or the
    safe model); one sample serves all rows of an update; tensors that no model changed have no mask; LoRA enters as its product B A (the
    release masks A and B apart, which masks the product bilinearly). Report refusals of harmless prompts beside refusals of harmful ones,
    else always refusing wins. Defaults: the paper's (DPO beta 0.1, lr 1e-3 with cosine, batch 4 x 4, temperature 0.5, 0.3 for sums; it uses one
    to three epochs). All models, phi and Adam's moments of phi are in memory at once."""

    rows: str = "safety"
    """The row stream of preference pairs: `data: {safety: FILE}`, rows with prompt, chosen and rejected."""
    epochs: int = 1
    """Passes over the pairs."""
    lr: float = 1e-3
    """Learning rate of phi at the start; it falls to 0 along a cosine."""
    beta: float = 0.1
    """DPO's scale of the log-ratios."""
    batch: int = 4
    """Pairs a batch."""
    accumulation: int = 4
    """Batches an update."""
    temperature: float = 0.5
    """Of the relaxed Bernoulli: the lower, the nearer samples are to 0 and 1."""
    final: Literal["threshold", "sample", "soft"] = "threshold"
    """The mask of the result: phi > 0, a binary sample, or sigmoid(phi / temperature)."""
    reference: Literal["fused", "safe"] = "fused"
    """What DPO compares with: the fusion without a mask, or the safe model."""
    fuse: str | dict[str, Any] = field(default_factory=lambda: {"method": "task-arithmetic", "scale": 0.3})
    """The merger of several models: a name, or a mapping with `method` and its options. Released besides the default: {method: ties, scale: 0.4,
    combine: sum} and {method: dare-linear, scale: 0.3, density: 0.8, rescale: density}."""
    skip: list[str] = field(default_factory=list)
    """Tensors to leave as the base has them: names, leading parts of names, or globs."""

    families = frozenset({"causal-lm"})
    toy = {"batch": 3, "accumulation": 1}
    toy_streams: ClassVar[dict[str, frozenset[str]]] = {"safety": frozenset({"prompt", "chosen", "rejected"})}

    def __post_init__(self) -> None:
        for name in ("epochs", "lr", "beta", "batch", "accumulation", "temperature"):
            if not getattr(self, name) > 0:
                raise RecipeError(f"`{name}` of somf is {getattr(self, name)}; it must be positive.")
        for name, words in (("final", ("threshold", "sample", "soft")), ("reference", ("fused", "safe"))):
            if getattr(self, name) not in words:
                raise RecipeError(f"`{name}` of somf is '{getattr(self, name)}'; it must be one of {', '.join(words)}.")
        if isinstance(self.fuse, Mapping) and "method" not in self.fuse:
            raise RecipeError("`fuse` of somf needs the key `method`, e.g. `fuse: {method: ties, scale: 0.4}`.")
        self.merger()  # a wrong one is refused before anything trains
        self.needs = frozenset({f"rows:{self.rows}"})  # type: ignore[misc]
        self.report: dict[str, Any] = {}

    def merger(self) -> VectorMerger:
        """What several masked updates are fused by."""
        options: dict[str, Any] = {"method": self.fuse} if isinstance(self.fuse, str) else dict(self.fuse)
        name = options.pop("method")
        cls = method("merge", name)
        if not issubclass(cls, VectorMerger):
            raise RecipeError(f"`fuse` of somf is '{name}', which averages whole models; use task-arithmetic (scale 1/T is the mean of T models) or ties.")
        known = [f.name for f in fields_of(cls)]
        wrong = next((key for key in options if key not in known), None)
        if wrong is not None:
            raise RecipeError(f"`fuse` of somf: '{name}' has no option '{wrong}'.{nearest(wrong, known)}")
        return cls(**options)

    def update(self, base: Any, tuned: SequenceOf[Any], ctx: Context | None = None) -> TensorSource:
        base, listed = TensorSource.of(base), models(tuned)
        updates, fuse = deltas(base, listed, self.skip), self.merger()
        masks = self._masks(base, updates, fuse, ctx)
        return _fused(updates, masks, fuse)

    def _masks(self, base: TensorSource, updates: list[TensorSource], fuse: VectorMerger, ctx: Context | None) -> dict[str, Tensor]:
        if ctx is None or ctx.current is None:
            raise RecipeError(f"somf learns its mask with a model and preference rows; merge within a recipe with `data: {{{self.rows}: FILE}}`.")
        family = ctx.current
        covers(family.network, base, "somf")
        place = family.device
        held = [{n: u[n].to(place).float() for n in u.distinct if u[n].is_floating_point()} for u in updates]
        names = [n for n in held[0] if any(bool(h[n].any()) for h in held)]
        if not names:
            ctx.notice("somf found nothing to realign: the models to merge are the base itself.")
            return {}
        start = {n: base[n].to(place).float() for n in base.distinct if base[n].is_floating_point()}
        phi = {n: torch.zeros_like(start[n], requires_grad=True) for n in names}
        narrow = [TensorSource.of({n: h[n] for n in names}) for h in held]

        def weights(masks: Masks) -> dict[str, Tensor]:
            fused = _fused(narrow, masks, fuse)
            return {**start, **{n: start[n] + fused[n].float() for n in names}}

        noise = ctx.rng("somf")
        with family.evaluating(grad=True):
            pairs = self._pairs(family, ctx, weights({}) if self.reference == "fused" else start)
            steps, total = self._steps(family, pairs, ctx)
            optimizer = torch.optim.AdamW(list(phi.values()), lr=self.lr, weight_decay=0.0)
            losses = learn(
                phi, lambda: weights({n: concrete_gate(p, uniform_like(p, noise), self.temperature) for n, p in phi.items()}),
                family.network, steps, optimizer, before=lambda i: _cosine(optimizer, self.lr, i, total),
            )  # fmt: skip
        masks = {n: self._final(p.detach(), noise).cpu() for n, p in phi.items()}
        self.report = {"density": density(masks), "losses": losses, "pairs": len(ctx.rows(self.rows)), "by_tensor": {n: float(m.mean()) for n, m in masks.items()}}
        return masks

    def _final(self, phi: Tensor, noise: torch.Generator) -> Tensor:
        if self.final == "soft":
            return torch.sigmoid(phi / self.temperature)
        return ((phi > 0) if self.final == "threshold" else concrete_gate(phi, uniform_like(phi, noise), self.temperature) > 0.5).float()

    def _pairs(self, family: Family, ctx: Context, reference: Mapping[str, Tensor]) -> list[tuple[Any, Tensor]]:
        """Every row with the reference's two log-probabilities, which are computed once."""
        rows = ctx.rows(self.rows)
        if not len(rows) or not {"chosen", "rejected"} <= set(rows[0]):
            raise DataError(f"somf learns from preference pairs, but the '{self.rows}' rows have no columns chosen and rejected.")
        found: list[Tensor] = []
        with at_weights(family.network, reference), torch.no_grad():
            for batch in batches_of(family, rows, range(len(rows)), 16, ctx.train_on):
                found += list(pair_logps(family, batch))
        return list(zip(rows, found, strict=True))

    def _steps(self, family: Family, pairs: list[tuple[Any, Tensor]], ctx: Context) -> tuple[Iterator[list[Callable[[], Tensor]]], int]:
        size = self.batch * self.accumulation

        def loss(part: list[tuple[Any, Tensor]]) -> Callable[[], Tensor]:
            batch = family.collate([row for row, _ in part], train_on=ctx.train_on)
            return lambda: preference_loss(family, batch, torch.stack([r for _, r in part]), self.beta)

        def steps() -> Iterator[list[Callable[[], Tensor]]]:
            for _ in range(self.epochs):
                order = torch.randperm(len(pairs), generator=ctx.rng("somf")).tolist()
                for at in range(0, len(order), size):
                    chosen = [pairs[i] for i in order[at : at + size]]
                    yield [loss(chosen[i : i + self.batch]) for i in range(0, len(chosen), self.batch)]

        return steps(), self.epochs * math.ceil(len(pairs) / size)


def _cosine(optimizer: torch.optim.Optimizer, lr: float, step: int, total: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * (1 + math.cos(math.pi * step / max(1, total))) / 2
