"""LoFiT: learned offsets on a few attention heads."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from luthier.adapt import Adapter
from luthier.adapt._shared import unwrapped, validate
from luthier.catalog import register
from luthier.core.loss import Loss
from luthier.core.modelmap import ModelMap
from luthier.core.plugin import Group, Parts, Step
from luthier.errors import ModelError, RecipeError

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family

START = 1e-3
"""Standard deviation at which scales and offsets start."""


def lofit(z: Tensor, scale: Tensor | None = None, offset: Tensor | None = None) -> Tensor:
    """z' = (1 + A) z + v for head outputs z [..., heads, dim] with A, v [heads, dim]."""
    if scale is not None:
        z = z * (1 + scale).to(z)
    return z if offset is None else z + offset.to(z)


def strongest(scale: Tensor, number: int) -> Tensor:
    """[number, 2] (layer, head) of the heads with the largest ||A||_2, from A [layers, heads, dim], strongest first."""
    order = scale.float().norm(dim=-1).flatten().argsort(descending=True, stable=True)[:number]
    return torch.stack([order // scale.shape[1], order % scale.shape[1]], 1)


class HeadEdits(nn.Module):
    """All scales [layers, heads, dim], and the offsets [K, dim] with the heads they belong to."""

    heads: Tensor

    def __init__(self, layers: int, heads: int, dim: int, number: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(layers, heads, dim))
        self.offset = nn.Parameter(torch.zeros(number, dim))
        self.register_buffer("heads", torch.full((number, 2), -1))
        self.off = False

    def offsets(self, layer: int) -> Tensor | None:
        """The offsets of one layer's heads [heads, dim]; None where it has none."""
        mine = (self.heads[:, 0] == layer).nonzero()[:, 0]
        if not len(mine):
            return None
        full = self.offset.new_zeros(self.scale.shape[1], self.scale.shape[2])
        return full.index_add(0, self.heads[mine, 1], self.offset[mine])

    def scales(self, layer: int) -> Tensor | None:
        """The layer's scales while they are learned; None afterwards."""
        return self.scale[layer] if self.scale.requires_grad or bool(self.scale[layer].any()) else None


def _edit(module: Any, args: tuple[Any, ...]) -> Any:
    """In front of an output projection: the concatenated head outputs."""
    edits, layer = module.lofit_place
    if edits.off:
        return None
    z = args[0]
    heads = z.unflatten(-1, edits.scale.shape[1:])
    return (lofit(heads, edits.scales(layer), edits.offsets(layer)).flatten(-2), *args[1:])


@register("lofit", paper=28)
@dataclass
class LoFiT(Adapter):
    """Find the few attention heads that matter for a task, then learn one offset vector for each of them; nothing else trains.

    z = a head's output before the output projection. Step 1 (the first `select_share` of the run): z' = (1 + A) z for every head,
    A ~ N(0, 1e-3^2), loss + l1 * sum |A|; keep the K heads with the largest ||A||_2. Step 2: A = 0 and out of the way; z' = z + v for
    these heads, v ~ N(0, 1e-3^2), no penalty. Exported as biases of the output projections, free at run time. K x dim numbers train.

    Needs an architecture that can have those biases (Llama, Qwen 3, Gemma, Granite by `attention_bias`; GPT-2, BERT, ViT anyway),
    checked at the start. Heads are query heads. Defaults: Llama-2-7B's, AdamW 1e-2 for offsets and half of that for scales; K = 3 %
    of the heads. The two steps share the run; with heads known beforehand (`heads`) or drawn (`selection: random`, the control) the
    whole run is step 2. The ranking is in `report`; with a too large `l1` all norms tie near 0 and it is noise."""

    number: int | None = None
    """K; default: 3 % of the heads, at least one."""
    selection: Literal["learned", "random", "all"] = "learned"
    """How heads are found."""
    heads: list[list[int]] = field(default_factory=list)
    """Heads known beforehand, as [layer, head]."""
    select_share: float = 0.5
    """Share of the run that finds heads."""
    l1: float = 5e-4
    """Weight of the penalty in step 1 (published: 5e-4 to 5e-3)."""
    select_lr_scale: float = 0.5
    """Learning rate of step 1, relative to step 2's."""

    switchable = True
    families = frozenset({"causal-lm", "text-encoder", "image-classifier"})
    parallel = frozenset({"single", "ddp"})

    def __post_init__(self) -> None:
        validate(self, ("number", "select_lr_scale"))
        if not 0 < self.select_share < 1:
            raise RecipeError(f"'select_share' is {self.select_share!r}; it must be above 0 and below 1.")
        if self.l1 < 0:
            raise RecipeError(f"'l1' is {self.l1!r}; it must be 0 or above.")
        if any(len(h) != 2 for h in self.heads):
            raise RecipeError("'heads' holds pairs [layer, head].")
        self.report: dict[str, Any] = {}

    def attach(self, model: Family, ctx: Context | None = None) -> Parts:
        unwrapped(model, self.name)
        network = model.network.requires_grad_(False)
        where = ModelMap(network)
        self._sites = list(where.projections("attention_output"))
        if not self._sites:
            raise ModelError(f"The attention output projections of {type(network).__name__} are not known, so LoFiT cannot act on its heads.")
        self._needs_bias = _bias_names(network, self._sites)
        count, dim = where.heads_of(where.tower_of(self._sites[0]))[:2]
        total = len(self._sites) * count
        number = len(self.heads) or (total if self.selection == "all" else self.number or math.ceil(0.03 * total))
        if number > total:
            raise RecipeError(f"'number' is {number}, but the network has {total} heads.")
        self._check_heads(len(self._sites), count)
        self._edits = edits = HeadEdits(len(self._sites), count, dim, number).to(model.device)
        network.add_module("lofit", edits)
        for layer, site in enumerate(self._sites):
            module: Any = network.get_submodule(site)
            module.lofit_place = (edits, layer)  # a tuple: the one module stays registered below the network only
            module.register_forward_pre_hook(_edit)
        rng = ctx.rng("lofit") if ctx is not None else torch.Generator().manual_seed(0)
        self._rng = rng
        self._scales = Group("body", {"lofit.scale": edits.scale}, lr_scale=self.select_lr_scale, weight_decay=0.0)
        self._offsets = Group("body", {"lofit.offset": edits.offset}, weight_decay=0.0, active=False)
        if self.selection == "learned" and not self.heads:
            _start(edits.scale, rng)
            edits.offset.requires_grad_(False)
            return Parts([self._scales, self._offsets])
        chosen = torch.tensor(self.heads) if self.heads else torch.arange(total) if self.selection == "all" else torch.randperm(total, generator=rng)[:number]
        self._choose(chosen if self.heads else torch.stack([chosen // count, chosen % count], 1))
        return Parts([self._offsets])

    def _check_heads(self, layers: int, count: int) -> None:
        for layer, head in self.heads:
            if not (0 <= layer < layers and 0 <= head < count):
                raise RecipeError(f"'heads' names head {head} of layer {layer}; the network has {layers} layers of {count} heads.")

    @torch.no_grad()
    def _choose(self, heads: Tensor) -> None:
        """Step 2 begins: the scales are dropped, the offsets of the chosen heads train."""
        edits = self._edits
        edits.heads.copy_(heads)
        edits.scale.zero_()
        edits.scale.requires_grad_(False)
        _start(edits.offset, self._rng)
        edits.offset.requires_grad_(True)
        self._scales.active, self._offsets.active = False, True
        self.report["heads"] = heads.tolist()

    @property
    def selecting(self) -> bool:
        """Whether heads are still being found."""
        return bool((self._edits.heads < 0).any())

    def before_step(self, step: Step, ctx: Context | None) -> None:
        if self.selecting and ctx is not None and step.number >= round(self.select_share * ctx.clock.steps):
            scale = self._edits.scale.detach()
            self.report["norms"] = scale.float().norm(dim=-1).tolist()
            self._choose(strongest(scale, len(self._edits.heads)))

    def penalty(self, model: Family, ctx: Context | None = None) -> Loss | None:
        if not self.selecting or not self.l1:
            return None
        return Loss().add("l1", self._edits.scale.abs().sum().reshape(1), per="batch", weight=self.l1)

    @contextmanager
    def disabled(self, model: Family) -> Iterator[Family]:
        self._edits.off = True
        try:
            yield model
        finally:
            self._edits.off = False

    @contextmanager
    def folded(self, model: Family) -> Iterator[Family]:
        """Scales multiplied into the projections' weights, offsets added to their biases; undone bit for bit."""
        network, edits = model.network, self._edits
        place = network._modules.pop("lofit")
        undo: list[Any] = []
        if self._needs_bias and hasattr(model.config, "attention_bias"):
            undo.append((model.config, "attention_bias", model.config.attention_bias))
            model.config.attention_bias = True
        for name in self._needs_bias:
            layer: Any = network.get_submodule(name)
            undo.append((layer, "bias", None))
            layer.bias = nn.Parameter(torch.zeros(layer.weight.shape[0], dtype=layer.weight.dtype, device=layer.weight.device), requires_grad=False)
        with torch.no_grad():
            for number, site in enumerate(self._sites):
                _fold(network.get_submodule(site), edits.scales(number), edits.offsets(number), undo)
        with self.disabled(model):
            try:
                yield model
            finally:
                for owner, attribute, old in reversed(undo):
                    setattr(owner, attribute, old)
                network._modules["lofit"] = place

    def state_dict(self) -> dict[str, Any]:
        return {"report": self.report, "selecting": self.selecting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.report = dict(state["report"])
        if not state["selecting"] and self.selecting:
            self._choose(torch.tensor(self.report["heads"]))


@torch.no_grad()
def _start(param: nn.Parameter, rng: torch.Generator) -> None:
    param.copy_(torch.randn(param.shape, generator=rng) * START)


def _fold(module: Any, scale: Tensor | None, offset: Tensor | None, undo: list[Any]) -> None:
    """New weight and bias of one projection; what they replace goes to `undo`."""
    weight = module.weight if isinstance(module, nn.Linear) else module.weight.T
    if offset is not None:
        undo.append((module, "bias", module.bias))
        module.bias = nn.Parameter(module.bias + (weight.float() @ offset.flatten().float()).to(module.bias), requires_grad=False)
    if scale is not None:
        undo.append((module, "weight", module.weight))
        new = weight * (1 + scale.flatten()).to(weight)
        module.weight = nn.Parameter(new if isinstance(module, nn.Linear) else new.T.contiguous(), requires_grad=False)


def _bias_names(network: nn.Module, sites: list[str]) -> list[str]:
    """The layers that get a bias when the network is exported: none if all sites have one, else what `attention_bias` adds."""
    if all(getattr(network.get_submodule(s), "bias", None) is not None for s in sites):
        return []
    config = copy.deepcopy(getattr(network, "config", None))
    if config is not None and hasattr(config, "attention_bias"):
        config.attention_bias = True
        with torch.device("meta"):
            like = type(network)(config)
        with_bias = [n for n, m in like.named_modules() if getattr(m, "bias", None) is not None]
        if set(sites) <= set(with_bias):
            return [n for n in with_bias if getattr(network.get_submodule(n), "bias", None) is None]
    raise ModelError(
        f"{type(network).__name__} has no bias on its attention output projections, so LoFiT's offsets could not be exported; "
        "use a Llama-type model with `attention_bias`, or 'lora' with `targets: [o_proj]`."
    )
