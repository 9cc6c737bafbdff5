"""Tuning of a few weights that are chosen by name and place, with the stopping rule of Fine-tuning Done Right in Model Editing (paper 21)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import translate
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from luthier.adapt import Adapter
from luthier.adapt._shared import heads, unwrapped, validate
from luthier.catalog import register
from luthier.core.modelmap import Kind, ModelMap
from luthier.core.plugin import Group, Parts, Step
from luthier.errors import ModelError, RecipeError, nearest

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family

PARTS: dict[str, tuple[Kind, ...]] = {
    "ffn-output": ("ffn_output",), "ffn-input": ("ffn_gate", "ffn_input"), "attention-output": ("attention_output",),
    "query-key-value": ("query", "key", "value", "qkv"), "block": (),
}  # fmt: skip


def name_pattern(names: Iterable[str], patterns: Iterable[str]) -> dict[str, list[str]]:
    """For each pattern the names that it matches: whole, or from a dot on to the end. `*` stands for anything, `?` for one character,
    `[...]` for one of some; a name without its last part (a module's path) matches all its parameters."""
    found: dict[str, list[str]] = {}
    names = list(names)
    for pattern in patterns:
        form = re.compile(rf"(?:.*\.)?(?:{translate(pattern)[:-2]})(?:\.(?:weight|bias))?\Z", re.DOTALL)
        found[pattern] = [n for n in names if form.match(n)]
    return found


def block_at(place: int | float, number: int) -> int:
    """The index of a block: an index (negative: from the end), or a share of the depth in [0, 1], 0 the first and 1.0 the last."""
    index = round(place * (number - 1)) if isinstance(place, float) else place
    if (isinstance(place, float) and not 0 <= place <= 1) or not -number <= index < number:
        raise RecipeError(f"'block' is {place}, but the model has {number} blocks; give an index from {-number} to {number - 1}, or a share of the depth from 0.0 to 1.0.")
    return index % number


@register("name-pattern", paper=(21, 99))
@dataclass
class NamePattern(Adapter):
    """Train a few of the network's own weights, chosen by name or by kind and depth, e.g. one matrix of one block to edit knowledge.

    Everything that is not chosen is frozen and stays bit-identical; nothing is added, so the result is a plain model. Choose by `part` and
    `block` (the same words for every architecture), or by `patterns` of parameter names. The new head of a classifier trains as well.

    LocFT-BF edits knowledge this way: plain fine-tuning in shuffled mini-batches of all edits over several epochs, in one well-chosen matrix.
    Its stopping rule is here too: a batch whose loss is below `loss_floor` moves nothing (no step, no optimizer state), and after an
    epoch whose mean loss over rows is below it, training ends. Published: floor 0.01, at most 25 epochs of batches of 100, Adam without
    decay at 5e-4; the feed-forward output of block 22 of 32 for Llama-3-8B, of block 6 of 28 for Qwen2.5-7B, all of block 23 of 32 at 5e-5
    for Mistral-7B. The place must be searched for each model (preset `locft-bf`). Decided here: a part is its matrices without their biases."""

    patterns: list[str] = field(default_factory=list)
    """Names or ends of names of parameters or modules, with * and ?; where given, part and block do not count."""
    part: Literal["ffn-output", "ffn-input", "attention-output", "query-key-value", "block"] = "ffn-output"
    """Which matrices of a block; `block`: all its parameters."""
    block: int | float | None = None
    """Which block: an index, negative from the end, or a share of the depth such as 0.7; default: all."""
    loss_floor: float = 0.0
    """A step whose loss is below is left out, and an epoch whose mean loss is below is the last; 0: neither."""
    _sum: float = field(default=0.0, init=False, repr=False)
    _rows: int = field(default=0, init=False, repr=False)
    _done: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        validate(self)
        if self.loss_floor < 0:
            raise RecipeError(f"'loss_floor' is {self.loss_floor}; it must not be negative.")
        if isinstance(self.block, bool) or (isinstance(self.block, float) and not 0 <= self.block <= 1):
            raise RecipeError(f"'block' is {self.block}; give an index, or a share of the depth from 0.0 to 1.0.")

    def check(self, recipe: Any) -> str | None:
        chosen = list(getattr(recipe, "optimize", None) or [])
        if self.loss_floor and chosen and getattr(chosen[0].build(), "two_pass", False):
            return f"name-pattern's loss_floor leaves out steps by a loss that optimize '{chosen[0].method}' only knows afterwards; set `loss_floor: 0` or use `optimize: adamw`."
        return None

    def attach(self, model: Family, ctx: Context | None = None) -> Parts:
        unwrapped(model, self.name)
        network: nn.Module = model.network
        every = dict(network.named_parameters(remove_duplicate=False))
        chosen = self._by_pattern(every) if self.patterns else self._by_part(model, every)
        top = heads(network)
        moving = {id(every[n]) for n in chosen}
        groups: dict[str, dict[str, nn.Parameter]] = {}
        for name, param in network.named_parameters():
            is_head = id(param) not in moving and any(name.startswith(f"{h}.") for h in top)
            param.requires_grad_(id(param) in moving or is_head)
            if param.requires_grad:
                groups.setdefault("head" if is_head else "body", {})[name] = param
        tied = sorted(n for n, p in every.items() if id(p) in moving and n not in chosen)
        if tied and ctx is not None:
            ctx.notice(f"'{tied[0]}' is tied to a chosen parameter and moves with it.")
        return Parts([Group(role, params) for role, params in groups.items()])

    def _by_pattern(self, every: dict[str, nn.Parameter]) -> set[str]:
        found = name_pattern(every, self.patterns)
        for pattern, names in found.items():
            if not names:
                raise RecipeError(f"`patterns` has '{pattern}', which matches no parameter of the network.{nearest(pattern, every)} Its names look like '{next(iter(every))}'.")
        return {n for names in found.values() for n in names}

    def _by_part(self, model: Family, every: dict[str, nn.Parameter]) -> set[str]:
        where = ModelMap(model.network)
        if not where.blocks:
            raise ModelError("The blocks of this network are not known; choose its weights by `patterns`.")
        depths = where.towers.values()
        blocks = {i for places in depths for i in (places if self.block is None else [places[block_at(self.block, len(places))]])}
        if self.part == "block":
            return {n for n in every if where.block_of(n) in blocks}
        paths = {p for kind in PARTS[self.part] for p in where.projections(kind) if where.block_of(p) in blocks}
        found = {n for n in every if n.rpartition(".")[0] in paths and n.endswith("weight")}
        if not found:
            raise ModelError(f"No '{self.part}' matrix is known in this network; choose its weights by `patterns`, or use `part: block`.")
        return found

    # the stopping rule --------------------------------------------------------------------------------------------------
    def after_backward(self, step: Step, ctx: Context | None) -> None:
        if self.loss_floor and step.losses.get("loss", self.loss_floor) < self.loss_floor:
            step.skip = True

    def after_step(self, step: Step, ctx: Context | None) -> None:
        if self.loss_floor and "loss" in step.losses:
            self._sum, self._rows = self._sum + step.losses["loss"] * len(step.rows), self._rows + len(step.rows)

    def after_epoch(self, step: Step, ctx: Context | None) -> None:
        self._done = self._rows > 0 and self._sum / self._rows < self.loss_floor
        self._sum, self._rows = 0.0, 0

    def stop(self, ctx: Context | None) -> str | None:
        return f"an epoch's mean loss is below {self.loss_floor}" if self._done else None

    def state_dict(self) -> dict[str, Any]:
        return {"sum": self._sum, "rows": self._rows, "done": self._done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sum, self._rows, self._done = float(state["sum"]), int(state["rows"]), bool(state["done"])
