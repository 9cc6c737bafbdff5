"""OwLore: train a few whole layers at a time, drawn by how many outlier weights they hold."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from luthier.adapt import Adapter
from luthier.adapt._shared import calibration_rows, unwrapped, validate
from luthier.catalog import register
from luthier.core.collect import collect
from luthier.core.modelmap import ModelMap
from luthier.core.plugin import Group, Parts, Step
from luthier.core.surgery import edit_optimizer
from luthier.errors import RecipeError

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family

THRESHOLDS = (13.0, 10.0, 7.0, 5.0, 4.0, 3.0)
"""Tried in this order where too few weights are outliers."""


@torch.no_grad()
def outlier_ratio(weights: SequenceOf[Tensor], norms: SequenceOf[Tensor], threshold: float, pool: str = "layer") -> float:
    """The share of entries with |W_ij| ||X_j||_2 above `threshold` times their mean, over the matrices [out, in] of one layer.

    pool: the mean is the layer's ("layer") or each matrix's own ("matrix")."""
    scores = [w.abs().float() * n.float() for w, n in zip(weights, norms)]
    total = sum(s.numel() for s in scores)
    if not total:
        return 0.0
    mean = sum(s.sum(dtype=torch.float64) for s in scores) / total
    count = sum(int((s > threshold * (mean if pool == "layer" else s.mean())).sum()) for s in scores)
    return count / total


def owlore(scores: SequenceOf[float], mode: str = "owl") -> np.ndarray:
    """The probability of drawing each layer. `scores`: outlier ratios (owl, owl-reverse) or weight norms (norm).

    owl, norm: p ~ score; owl-reverse: p ~ max p - p; uniform; increasing, decreasing: linear in depth. A trace is added to every
    layer, so that any number of layers can be drawn; scores that are all zero (or, reversed, all equal) give uniform."""
    n = len(scores)
    p = {
        "uniform": lambda: np.ones(n), "increasing": lambda: np.arange(1.0, n + 1), "decreasing": lambda: np.arange(n, 0.0, -1),
    }.get(mode, lambda: np.asarray(scores, dtype=np.float64))()  # fmt: skip
    if mode == "owl-reverse":
        p = p / max(p.sum(), 1e-300)
        p = p.max() - p
    if not p.sum() > 0:
        p = np.ones(n)
    p = p / p.sum() + 1e-9
    return p / p.sum()


@register("owlore", paper=77)
@dataclass
class OwLore(Adapter):
    """Train whole transformer layers, but only a few at a time, drawn anew every few steps with the layers that hold many
    activation-weighted outliers drawn most.

    D_l = share of entries of layer l with |W_ij| ||X_j||_2 > m times their mean, on calibration rows; p_l = D_l / sum D. Every
    `every` steps (from the first): freeze all layers, draw `active` of them without replacement by p, train these wholly. Embedding,
    final norm and head always train (`always: false` freezes them). `mode: uniform` is LISA. Needs rows: `calibration`, else training
    rows. The paper's optimizer is `galore`; any other composes.

    Decided here: the mean is that of all of a layer's linear weights together, as in the outlier metric's own release (`pool:
    matrix`: of each matrix). `threshold` 13 is the release's for Llama-2; where fewer than 0.1 % of a model's weights exceed it,
    the next lower of 10, 7, 5, 4, 3 is used and said. Optimizer state of frozen layers is kept, as in the release; `state: drop`
    saves the memory and starts a layer's moments anew. Layers below the lowest trained part need no backward pass."""

    active: int = 5
    """Layers that train at a time."""
    every: int = 50
    """Steps between draws."""
    mode: Literal["owl", "owl-reverse", "uniform", "norm", "increasing", "decreasing"] = "owl"
    """How layers are drawn."""
    threshold: float = 13.0
    """m: an outlier is this many times the mean."""
    pool: Literal["layer", "matrix"] = "layer"
    """Whose mean."""
    samples: int = 128
    """Calibration rows."""
    always: bool = True
    """Whether embedding, final norm and head train throughout."""
    state: Literal["keep", "drop"] = "keep"
    """Optimizer state of layers that are frozen."""

    toy = {"active": 1}

    def __post_init__(self) -> None:
        validate(self, ("active", "every", "threshold", "samples"))

    def attach(self, model: Family, ctx: Context | None = None) -> Parts:
        unwrapped(model, self.name)
        where = ModelMap(model.network)
        if self.active > len(where.blocks):
            raise RecipeError(f"'active' is {self.active}, but the network has {len(where.blocks)} layers; lower it.")
        self.scores = self._scores(model, where, ctx)
        self.probabilities = owlore(self.scores, self.mode)
        inside: dict[int, dict[str, nn.Parameter]] = {}
        outside: dict[str, dict[str, nn.Parameter]] = {}
        for name, param in model.network.named_parameters():
            param.requires_grad_(False)
            block, kind = where.block_of(name), where.category(name)
            if block is None:
                outside.setdefault(kind if kind in ("embedding", "head") else "body", {})[name] = param
            else:
                inside.setdefault(block, {})[name] = param
        self._layers = [Group("body", inside[b], active=False, options={"block": b}) for b in sorted(inside)]
        self._rng = ctx.numpy("owlore") if ctx is not None else np.random.default_rng(0)
        groups = [*self._layers, *([Group(role, params) for role, params in outside.items()] if self.always else [])]
        for group in groups:
            for param in group.params.values():
                param.requires_grad_(group.active)
        return Parts(groups)

    def _scores(self, model: Family, where: ModelMap, ctx: Context | None) -> list[float]:
        """What `owlore` makes probabilities of."""
        number = len(where.blocks)
        linears: list[dict[str, Any]] = [where.linears(b) for b in range(number)]
        matrices = [[m.weight.detach() if isinstance(m, nn.Linear) else m.weight.detach().T for m in found.values()] for found in linears]
        if self.mode == "norm":
            return [float(torch.stack([w.float().norm() for w in found]).norm()) if found else 0.0 for found in matrices]
        if self.mode not in ("owl", "owl-reverse"):
            return [0.0] * number
        stats = collect(model, calibration_rows(ctx, self.samples, self.name), {"column_norm"}, {n: m for found in linears for n, m in found.items()})
        norms = [[stats[n]["column_norm"].to(m.weight.device) if n in stats else m.weight.new_zeros(()) for n, m in found.items()] for found in linears]
        ratios: list[float] = []
        for threshold in (self.threshold, *(t for t in THRESHOLDS if t < self.threshold)):
            ratios = [outlier_ratio(w, x, threshold, self.pool) for w, x in zip(matrices, norms)]
            if np.mean(ratios) >= 1e-3:
                break
        if threshold != self.threshold and ctx is not None:
            ctx.notice(f"Fewer than 0.1 % of this model's weights are {self.threshold:g} times the mean; OwLore counts those above {threshold:g} times.")
        return ratios

    def before_step(self, step: Step, ctx: Context | None) -> None:
        if step.number % self.every:
            return
        drawn = set(self._rng.choice(len(self._layers), self.active, replace=False, p=self.probabilities).tolist())
        stopped: list[nn.Parameter] = []
        for i, group in enumerate(self._layers):
            if group.active and i not in drawn:
                stopped += group.params.values()
            group.active = i in drawn
            for param in group.params.values():
                param.requires_grad_(group.active)
                if not group.active:
                    param.grad = None
        if self.state == "drop":
            edit_optimizer(step.optimizer).reset(stopped)
        if ctx is not None:
            ctx.log(**{"owlore/mean_depth": float(np.mean(sorted(drawn)))})

    def state_dict(self) -> dict[str, Any]:
        return {"scores": [float(s) for s in self.scores]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scores = list(state["scores"])
        self.probabilities = owlore(self.scores, self.mode)
