"""HFT: train a balanced random half of the weight matrices, freeze the other half."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from luthier.adapt import Adapter
from luthier.adapt._shared import unwrapped, validate
from luthier.catalog import register
from luthier.core.context import seed_of
from luthier.core.linalg import UpdateFilter
from luthier.core.modelmap import ModelMap
from luthier.core.plugin import Group, Parts, Step
from luthier.core.surgery import edit_optimizer
from luthier.errors import RecipeError

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


def half(
    names: SequenceOf[str], categories: SequenceOf[str], blocks: SequenceOf[int], seed: int, fraction: float = 0.5, granularity: str = "category"
) -> set[str]:
    """The names that train: a share `fraction` of them, chosen at random, balanced as `granularity` says.

    category: in every block the same share of every category's matrices. Where that is no whole number (1.5 of the 3 of a
    feed-forward), a random part of the blocks trains one more, so that over the network the share is met. layer: whole blocks.
    model: any of all."""
    rng = np.random.default_rng(seed)
    if granularity == "model":
        return {names[i] for i in rng.permutation(len(names))[: _round(fraction * len(names))]}
    if granularity == "layer":
        order = sorted(set(blocks))
        chosen = {order[i] for i in rng.permutation(len(order))[: _round(fraction * len(order))]}
        return {n for n, b in zip(names, blocks) if b in chosen}
    trained: set[str] = set()
    for category in sorted(set(categories)):
        members: dict[int, list[str]] = {}
        for name, own, block in zip(names, categories, blocks):
            if own == category:
                members.setdefault(block, []).append(name)
        shares = {b: fraction * len(found) for b, found in members.items()}
        count = {b: int(share + 1e-9) for b, share in shares.items()}
        open_blocks = [b for b, share in shares.items() if share - count[b] > 1e-9]
        for i in rng.permutation(len(open_blocks))[: max(0, _round(sum(shares.values())) - sum(count.values()))]:
            count[open_blocks[i]] += 1
        for block, found in members.items():
            trained |= {found[i] for i in rng.permutation(len(found))[: count[block]]}
    return trained


def _round(x: float) -> int:
    return int(x + 0.5)


@dataclass
class Unit:
    """A matrix with its bias, or one of the matrices that lie in a fused one."""

    category: str
    block: int
    params: dict[str, nn.Parameter]
    parts: dict[str, tuple[int, torch.Tensor]]
    """For a fused matrix: by parameter name, the dimension and the places along it that are this unit's."""


@register("hft", paper=44)
@dataclass
class HFT(Adapter):
    """Train only a random half of the weight matrices, balanced over layers and kinds, and keep the other half as pretrained, so that
    much old knowledge survives; draw another half in the next stage.

    theta <- theta - lr M update with M in {0, 1} constant per matrix. In every block 2 of the 4 attention matrices train; of the 3
    feed-forward matrices 2 in a random half of the blocks and 1 in the others; 1 of the 2 norms. A matrix takes its bias along. The
    frozen half has no gradient and no optimizer state. Where query, key and value are one matrix (GPT-2), their parts count as
    three matrices and the finished update is masked by part.

    Decided here: embeddings, final norm and head train (`embed: freeze` freezes them); norms are halved like matrices; a redrawn
    half starts with fresh optimizer state (`state: keep` keeps what a matrix had when it last trained). `fraction: 1` is full
    fine-tuning. The shares of matrices and of parameters (they differ under grouped-query attention) are in `report`."""

    fraction: float = 0.5
    """Share of the matrices that train."""
    granularity: Literal["category", "layer", "model"] = "category"
    """What is balanced: every category in every block; whole blocks; nothing."""
    redraw: Literal["stage", "epoch", "steps"] = "stage"
    """When a new half is drawn."""
    every: int = 100
    """For `redraw: steps`: how many."""
    embed: Literal["train", "freeze"] = "train"
    """Embeddings, final norm and head."""
    state: Literal["drop", "keep"] = "drop"
    """Optimizer state of matrices that a redraw freezes."""
    seed: int | None = None
    """Seed of the draws; default: the run's."""

    def __post_init__(self) -> None:
        validate(self, ("every",))
        if not 0 < self.fraction <= 1:
            raise RecipeError(f"'fraction' is {self.fraction!r}; it must be above 0 and at most 1.")
        self.draws = 0
        self._filter: UpdateFilter | None = None

    def attach(self, model: Family, ctx: Context | None = None) -> Parts:
        unwrapped(model, self.name)
        model.network.requires_grad_(True)
        self._units, outside = units(model)
        self._seed = (self.seed if self.seed is not None else ctx.seed if ctx is not None else 0, ctx.round if ctx is not None else 0)
        self._groups: dict[str, Group] = {}
        trained = self._draw()
        groups = [Group(role, params) for role, params in outside.items()] if self.embed == "train" else []
        if self.redraw == "stage":
            groups.append(Group("body", {n: p for u in trained for n, p in self._units[u].params.items()}))
        else:
            # one group for every matrix (all parts of a fused one together), so that each can be switched
            for unit in self._units.values():
                for name, param in unit.params.items():
                    self._groups.setdefault(name, Group("body", {name: param}))
            groups += self._groups.values()
            self._switch(trained)
        named = {id(p) for g in groups if g.active for p in g.params.values()}
        for param in model.network.parameters():
            param.requires_grad_(id(param) in named)
        self.report = self._shares(trained)
        return Parts(groups)

    def _draw(self) -> set[str]:
        names = list(self._units)
        seed = seed_of("hft", *self._seed, self.draws)
        kinds, blocks = [self._units[n].category for n in names], [self._units[n].block for n in names]
        trained = half(names, kinds, blocks, seed, self.fraction, self.granularity)
        self._mask(trained)
        return trained

    def _mask(self, trained: set[str]) -> None:
        """Masks for fused matrices of which only some parts train."""
        masks: dict[nn.Parameter, torch.Tensor] = {}
        for name, unit in self._units.items():
            for at, (dim, places) in unit.parts.items():
                param = unit.params[at]
                shape = [1] * param.ndim
                shape[dim] = param.shape[dim]
                mask = masks.setdefault(param, torch.ones(param.shape[dim], dtype=torch.bool, device=param.device).view(shape))
                mask.view(-1)[places.to(param.device)] = name in trained
        if self._filter is None:
            self._filter = UpdateFilter({})
            self._installed = False
        self._filter.masks = {p: m for p, m in masks.items() if not bool(m.all())}

    def _switch(self, trained: set[str]) -> list[nn.Parameter]:
        """Let the groups of the drawn matrices move and no others; what stopped moving."""
        wanted = {n for u in trained for n in self._units[u].params}
        stopped = []
        for name, group in self._groups.items():
            if group.active and name not in wanted:
                stopped.append(group.params[name])
            group.active = name in wanted
        return stopped

    def _redraw(self, step: Step) -> None:
        self.draws += 1
        stopped = self._switch(self._draw())
        if self.state == "drop":
            edit_optimizer(step.optimizer).reset(stopped)

    def before_step(self, step: Step, ctx: Context | None) -> None:
        if self._filter is not None and not self._installed:
            self._filter.install(step.optimizer)
            self._installed = True
        if self.redraw == "steps" and step.number and step.number % self.every == 0:
            self._redraw(step)

    def after_epoch(self, step: Step, ctx: Context | None) -> None:
        if self.redraw == "epoch":
            self._redraw(step)

    def _shares(self, trained: set[str]) -> dict[str, float]:
        size = {n: sum(len(u.parts[k][1]) * p.numel() // p.shape[u.parts[k][0]] if k in u.parts else p.numel() for k, p in u.params.items()) for n, u in self._units.items()}
        return {"matrices": len(trained) / max(1, len(self._units)), "parameters": sum(size[n] for n in trained) / max(1, sum(size.values()))}

    def state_dict(self) -> dict[str, Any]:
        return {"draws": self.draws}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.draws = int(state["draws"])
        trained = self._draw()
        if self._groups:
            self._switch(trained)


def units(model: Family) -> tuple[dict[str, Unit], dict[str, dict[str, nn.Parameter]]]:
    """The matrices inside the blocks by module path, and the parameters outside them by role. Tied weights count once."""
    network, where = model.network, ModelMap(model.network)
    fused = where.projections("qkv")
    found: dict[str, Unit] = {}
    outside: dict[str, dict[str, nn.Parameter]] = {}
    for name, param in network.named_parameters():
        block, kind, path = where.block_of(name), where.category(name), name.rpartition(".")[0]
        if block is None:
            outside.setdefault(kind if kind in ("embedding", "head") else "body", {})[name] = param
            continue
        pieces = _pieces(path, param, network.get_submodule(path), where) if path in fused or path.endswith("gate_up_proj") else None
        if pieces is None:
            unit = found.setdefault(path, Unit(kind, block, {}, {}))
            unit.params[name] = param
            continue
        for piece, at in pieces.items():
            unit = found.setdefault(f"{path}[{piece}]", Unit(kind, block, {}, {}))
            unit.params[name], unit.parts[name] = param, at
    return found, outside


def _pieces(path: str, param: nn.Parameter, module: nn.Module, where: ModelMap) -> dict[str, tuple[int, torch.Tensor]] | None:
    """Which outputs of a fused matrix are query, key and value (or gate and up); None where the layout is not known."""
    dim = 0 if isinstance(module, nn.Linear) or param.ndim == 1 else 1
    size = param.shape[dim]
    if path.endswith("gate_up_proj"):
        return {"gate": (dim, torch.arange(size // 2)), "up": (dim, torch.arange(size // 2, size))}
    heads = where.heads_of(where.tower_of(path))
    wide, narrow = heads.count * heads.dim, heads.kv * heads.dim
    if size != wide + 2 * narrow:
        return None
    if path.endswith("query_key_value"):  # a head's query, key and value side by side
        if heads.kv != heads.count:
            return None
        place = torch.arange(size).view(heads.count, 3, heads.dim)
        return {n: (dim, place[:, i].flatten()) for i, n in enumerate(("query", "key", "value"))}
    cuts = torch.arange(size).split([wide, narrow, narrow])
    return {n: (dim, cut) for n, cut in zip(("query", "key", "value"), cuts)}
