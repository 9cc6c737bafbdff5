"""PAT: prune the hidden width of a language model while it is tuned."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from luthier.adapt._shared import validate
from luthier.catalog import register
from luthier.compress import Compressor
from luthier.core.loss import Loss
from luthier.core.plugin import Group, Parts, Step
from luthier.core.quant import straight_through
from luthier.core.residual import Residual
from luthier.errors import ModelError, RecipeError

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family

__all__ = ["PAT", "Mask", "Operator", "pat", "shrink"]

LIMIT = 10.0
"""The exponent of exp(-tau w) in the mask's sigmoid, at most."""


# the mathematics ----------------------------------------------------------------------------------------------------------
def rest_from(horizon: float) -> int:
    """The step from which the mask rests: int(0.8 S)."""
    return max(1, int(0.8 * horizon))


def pat(w: Tensor, step: float, horizon: float) -> Tensor:
    """The soft mask of the channels: sigmoid(tau w) + b, which is 1 everywhere at step 0 where w = 0.

    tau = 1 / (1 - ln(max(1, s)) / ln S + 1e-6), b = max(1/2 - s / S, 0). From int(0.8 S) on tau stays as it is there and the mask rests."""
    rest = rest_from(horizon)
    late = step >= rest
    s = rest if late else step
    tau = 1 / (1 - math.log(max(1.0, s)) / math.log(max(2.0, horizon)) + 1e-6)
    return torch.sigmoid(((w.detach() if late else w) * tau).clamp(min=-LIMIT)) + max(0.5 - step / horizon, 0.0)


def decay(width: int, kept: int, step: float, horizon: float, rate: float = 2.77) -> Tensor:
    """The mask that is given and not learned: channels from `kept` on fade as exp(-a s / S), and twice as fast after S."""
    m = torch.ones(width)
    m[kept:] = math.exp(-rate * step / horizon) if step <= horizon else math.exp(-rate - 2 * rate * (step - horizon) / horizon)
    return m


def count_loss(w: Tensor, kept: int) -> Tensor:
    """10 |sum_c 1[w_c >= 0] - d'| / d', the indicator's gradient passed straight through, and the distance of every w to +-1/2."""
    number = straight_through(w, (w >= 0).to(w.dtype)).sum()
    up, down = w > 0, w <= 0
    apart = sum((w[side] - at).square().mean() for side, at in ((up, 0.5), (down, -0.5)) if bool(side.any()))
    return 10 * (number - kept).abs() / kept + apart


class Mask(nn.Module):
    """The one mask that all operators share."""

    def __init__(self, width: int, kept: int, learned: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width), requires_grad=learned)
        self.kept, self.learned, self.step, self.horizon, self.hard = kept, learned, 0.0, 1.0, False

    def channels(self) -> Tensor:
        """The d' channels that stay, in order: those of largest w, or the first."""
        if not self.learned:
            return torch.arange(self.kept, device=self.weight.device)
        return self.weight.detach().argsort(descending=True, stable=True)[: self.kept].sort().values

    def forward(self) -> Tensor:
        if self.hard:
            return torch.zeros_like(self.weight).index_fill(0, self.channels(), 1.0)
        if self.learned:
            return pat(self.weight, self.step, self.horizon)
        return decay(len(self.weight), self.kept, self.step, self.horizon).to(self.weight)


class Operator(nn.Module):
    """A hybrid sparsification module: v * m * (x + U D x) on what is written into the stream."""

    def __init__(self, width: int, rank: int, mask: Mask, generator: torch.Generator) -> None:
        super().__init__()
        bound = 1 / math.sqrt(width)  # kaiming-uniform, as torch's linear layers start
        self.down = nn.Parameter((torch.rand(rank, width, generator=generator) * 2 - 1) * bound)
        self.up, self.gain = nn.Parameter(torch.zeros(width, rank)), nn.Parameter(torch.ones(width))
        self.__dict__["mask"] = mask  # shared by all, so a part of none

    def forward(self, x: Tensor) -> Tensor:
        change = nn.functional.linear(nn.functional.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))
        return (self.gain * self.mask()).to(x.dtype) * (x + change)  # type: ignore[operator]  # a function, not a tensor

    def matrix(self) -> Tensor:
        """T = diag(v) (I + U D), without the mask."""
        eye = torch.eye(len(self.gain), device=self.gain.device)
        return (self.gain[:, None] * (eye + self.up @ self.down)).detach()

    def identity_loss(self) -> Tensor:
        """The mean square of D D^T - I: orthonormal rows, so that v carries the scale."""
        return (self.down @ self.down.T - torch.eye(len(self.down), device=self.down.device)).square().mean()


class Write:
    """The hook on a module that writes into the stream. An object, so that a copied network has a copied operator."""

    def __init__(self, operator: Operator) -> None:
        self.operator = operator

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return self.operator(out)


# the smaller network ------------------------------------------------------------------------------------------------------
@torch.no_grad()
def shrink(residual: Residual, maps: list[Tensor], channels: Tensor) -> None:
    """Fold T = `maps[j]` into the j-th writer (the embedding, then every block's attention output and down projection), keep these
    channels everywhere, and let the norms count them only: the same function as with all others held at zero."""
    residual.untie()
    network, width, kept, dim = residual.network, residual.width, len(channels), residual.heads.dim
    table = residual.embedding
    table.weight = nn.Parameter((table.weight.float() @ maps[0].T)[:, channels].to(table.weight.dtype))
    table.embedding_dim = kept
    for layer, t in zip(residual.writers, maps[1:]):
        layer.weight = nn.Parameter((t @ layer.weight.float())[channels].to(layer.weight.dtype))
        layer.out_features = kept
        if layer.bias is not None:
            layer.bias = nn.Parameter((t @ layer.bias.float())[channels].to(layer.bias.dtype))
    for norm, readers in residual.reading():
        norm.weight = nn.Parameter(norm.weight[channels] * math.sqrt(width / kept))  # type: ignore[index]
        if hasattr(norm, "variance_epsilon"):
            norm.variance_epsilon *= width / kept  # type: ignore[operator, assignment]
        for reader in readers:
            reader.weight = nn.Parameter(reader.weight[:, channels].clone())
            reader.in_features = kept
    network.config.hidden_size, network.config.head_dim = kept, dim
    network.config.rms_norm_eps *= width / kept


# the method ---------------------------------------------------------------------------------------------------------------
@register("pat", paper=50)
@dataclass
class PAT(Compressor):
    """Shrink the hidden width of a language model while it is tuned, so that what the pruned channels did moves into the others: a smaller dense
    network at the end, faster at every layer, and better than pruning before or after tuning.

    Every write into the residual stream (the embedding, each attention output and down projection, before it is added) passes
    v_j * m * (x + U_j D_j x), with U = 0 and v = 1 at the start. The mask m is one for all: m = sigmoid(tau w) + b, w = 0 at first, tau rising
    from 1 and b falling from 1/2 to 0 by half of the run, so that the model begins as it was; after 0.8 of the run the mask rests. Added to
    the objective: 10 |sum 1[w >= 0] - d'| / d' + the squared distances of w to +-1/2, and MSE(D D^T, I) of every operator. In the
    end T = diag(v) (I + U D) folds into the writers, the readers lose the columns, gains grow by sqrt(d / d') (and the norms' eps by d / d'),
    so the small network is the masked one exactly.

    The paper trains LoRA beside it (`adapt: {method: lora, rank: 20, alpha: 4, dropout: 0.05}`), lr 5e-5, batch 128, clip 0.3, S = 10 000 steps,
    d' = 0.75 d, rank 200 of 4096. There w can travel lr S = 0.5; shorter runs need a larger `mask_rate`, about 0.5 / (lr * steps). As the
    paper intends and the release does not: every operator has its identity loss, and v is folded. Decided here: exactly the d' channels of
    largest w stay (the paper's w > 0 is those when its count penalty is met), and evaluation during training uses that hard mask; S is a
    share of the run. Serves decoders of the Llama kind."""

    keep: float = 0.75
    """The share of the hidden channels that stays."""
    rank: int | None = None
    """Rank of the operators; default: 200 for 4096 channels, in proportion."""
    mask: Literal["learned", "fixed"] = "learned"
    """Learn which channels go, or let the last ones fade."""
    mask_rate: float = 1.0
    """The mask's learning rate as a multiple of the others'."""
    horizon: float = 1.0
    """S as a share of the run's steps."""
    count_weight: float = 1.0
    """Weight of the mask's loss."""
    identity_weight: float = 1.0
    """Weight of the identity losses."""

    families = frozenset({"causal-lm"})
    parallel = frozenset({"single", "ddp"})
    toy = {"rank": 2}
    tunes = True

    def __post_init__(self) -> None:
        validate(self, ("rank", "mask_rate", "horizon"))
        if not 0 < self.keep < 1:
            raise RecipeError(f"`keep` of pat is {self.keep!r}; give a share of the hidden channels above 0 and below 1.")
        for name in ("count_weight", "identity_weight"):
            if getattr(self, name) < 0:
                raise RecipeError(f"`{name}` of pat is {getattr(self, name)!r}; give 0 or more.")
        self.report: dict[str, Any] = {}
        self._operators: list[Operator] = []

    def check(self, recipe: Any) -> str | None:
        if getattr(recipe, "merge", None):
            return "'pat' ends with a network of another width, which cannot be merged with others; merge in a stage before it."
        return None

    # training -----------------------------------------------------------------------------------------------------------
    def attach(self, model: Family, ctx: Context | None = None) -> Parts:
        if hasattr(model.network, "peft_config") and not hasattr(model.network, "merge_and_unload"):
            raise ModelError("'pat' folds all that was learned into the weights, and prompt vectors cannot be folded; use another `adapt`.")
        residual = Residual(model, self.name)
        width = residual.width
        kept, rank = max(1, round(self.keep * width)), self.rank or max(1, round(width * 200 / 4096))
        generator = torch.Generator().manual_seed(ctx.seed if ctx is not None else 0)
        self._mask = Mask(width, kept, self.mask == "learned").to(model.device)
        writers = [residual.embedding, *(_outermost(model.network, w) for w in residual.writers)]
        self._operators = [Operator(width, rank, self._mask, generator).to(model.device) for _ in writers]
        for module, operator in zip(writers, self._operators):
            module.register_forward_hook(Write(operator))
        groups = [Group("operator", {f"pat.{i}.{n}": p for i, o in enumerate(self._operators) for n, p in o.named_parameters()}, weight_decay=0.0)]
        if self._mask.learned:
            groups.append(Group("mask", {"pat.mask": self._mask.weight}, lr_scale=self.mask_rate, weight_decay=0.0))
        return Parts(groups, {"pat": nn.ModuleDict({"mask": self._mask, "operators": nn.ModuleList(self._operators)})})

    def before_step(self, step: Step, ctx: Context) -> None:
        self._mask.step, self._mask.horizon = float(step.number), max(1.0, self.horizon * ctx.clock.steps)

    def penalty(self, model: Family, ctx: Context) -> Loss | None:
        loss = Loss()
        if self._mask.learned and self.count_weight and self._mask.step < rest_from(self._mask.horizon):
            loss.add("pat_mask", count_loss(self._mask.weight, self._mask.kept), per="batch", weight=self.count_weight)
        if self.identity_weight:
            identity = torch.stack([o.identity_loss() for o in self._operators]).sum()
            loss.add("pat_identity", identity, per="batch", weight=self.identity_weight)
        return loss

    def after_step(self, step: Step, ctx: Context) -> None:
        if self._mask.learned:
            ctx.log(**{"pat/open": float((self._mask.weight > 0).sum())})

    @contextmanager
    def folded(self, model: Family) -> Iterator[Family]:
        """The hard mask, as it will be cut."""
        before, self._mask.hard = self._mask.hard, True
        try:
            yield model
        finally:
            self._mask.hard = before

    # the result ---------------------------------------------------------------------------------------------------------
    def compress(self, model: Any, ctx: Context | None = None) -> Any:
        if isinstance(model, Mapping) or not self._operators:
            raise RecipeError("'pat' prunes while it tunes, so it needs a run; name it under `compress` of a recipe that trains.")
        before = sum(p.numel() for p in model.base_network.parameters())
        from luthier.core.stage import merged

        twin = merged(model.frozen_copy())
        for module in twin.network.modules():
            for key in [k for k, hook in module._forward_hooks.items() if isinstance(hook, Write)]:
                del module._forward_hooks[key]
        channels = self._mask.channels()
        shrink(Residual(twin, self.name), [o.matrix() for o in self._operators], channels)
        twin.modules = {}
        after = sum(p.numel() for p in twin.network.parameters())
        opened = int((self._mask.weight > 0).sum()) if self._mask.learned else self._mask.kept
        self.report |= {"width": len(channels), "width_before": len(self._mask.weight), "open": opened, "parameters": after, "parameters_before": before}
        return twin


def _outermost(network: nn.Module, layer: nn.Module) -> nn.Module:
    """The module that is called in the layer's place: an adapter's shell round it, or the layer."""
    for module in network.modules():
        if getattr(module, "base_layer", None) is layer and module is not layer:
            return module
    return layer
