"""DRIFT: push every gradient along the weight difference to a model that has the wanted skill."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from luthier.catalog import register
from luthier.core.modelmap import block_index, category
from luthier.core.source import TensorSource, left_out
from luthier.errors import ModelError, RecipeError
from luthier.optimize import Optimizer, as_groups
from luthier.optimize._shared import adamw, refuse, sgd

if TYPE_CHECKING:
    import torch.optim

    from luthier.core.context import Context
    from luthier.core.plugin import Step

Mode = Literal["absolute", "gradnorm", "adaptive_cosine"]
MODES = ("absolute", "gradnorm", "adaptive_cosine")
SENSES = frozenset({"vision_model", "vision_tower", "visual", "audio_tower"})
"""Towers that read pictures or sound; a text model has nothing to say about them."""
FLOOR = 1e-12
"""A difference shorter than this has no direction."""


def drift(grad: Tensor, delta: Tensor, alpha: float = 1.0, mode: Mode = "adaptive_cosine") -> Tensor:
    """The nudged gradient of one tensor, for Delta = theta_r - theta and d = Delta / ||Delta||.

    absolute: g - alpha Delta;   gradnorm: g - alpha ||g|| d;   adaptive_cosine: g - alpha (cos(g, Delta) + 1) / 2 ||g|| d.
    Descent goes along -g, so all push toward theta_r; without a direction (Delta = 0) or a push (alpha = 0) g is returned as it is."""
    size = float(delta.norm())
    if alpha == 0 or size <= FLOOR:
        return grad
    if mode == "absolute":
        return grad - alpha * delta.to(grad)
    unit, strength = delta.float() / size, float(grad.float().norm())
    factor = 1.0 if mode == "gradnorm" else (cosine(grad, delta) + 1) / 2
    return grad - (alpha * factor * strength * unit).to(grad)


def cosine(grad: Tensor, delta: Tensor) -> float:
    """cos(g, Delta) within [-1, 1]; 0 where one of them vanishes."""
    g, d = grad.float().flatten(), delta.float().flatten()
    size = float(g.norm() * d.norm())
    return max(-1.0, min(1.0, float(g @ d) / size)) if size > 0 else 0.0


class Pull(NamedTuple):
    """What one parameter is pulled toward."""

    name: str
    param: nn.Parameter
    delta: Tensor
    alpha: float


@register("drift", paper=104)
@dataclass
class Drift(Optimizer):
    """Fine-tune as usual, but push every gradient along the weight difference to a sibling that can reason: merging's direction without merging's damage.

    Delta_W = theta_r,W - theta_W for every matched parameter, taken once before training; d = Delta_W / ||Delta_W||; with g the gradient of
    the whole step (accumulated, before clipping),

    - adaptive_cosine: g' = g - alpha (cos(g, Delta_W) + 1) / 2 ||g|| d: strong where plain descent would leave theta_r, 0 where it goes there;
    - gradnorm: g' = g - alpha ||g|| d;      absolute: g' = g - alpha Delta_W (rescaled to ||theta_W|| where `match_norm`).

    The push fades with the gradient, as intended. Adam's normalisation partly undoes the matching of sizes; `base: sgd` does not. Matched are
    the attention and feed-forward parameters of the language part (biases included), never a vision tower; `targets` adds norms, embeddings
    or the head. The sibling is named under `models:` and has the same architecture there; `names` maps leading parts of names where a
    vision-language model wraps its language model. Where no tuned parameter has a partner the run is refused; the number of partners is reported. With
    `away_from`, Delta = theta_toward - theta_away, the direction between two other models. Tune whole weights (adapt full, hft, name
    patterns): an adapter's factors have no counterpart in the sibling. Defaults: the paper's (alpha 1, lr 1e-6 under AdamW; it trains three
    epochs with cosine and warm-up 0.05, which `train` sets). One difference per matched parameter is held, on the CPU with `offload`."""

    lr: float = 1e-6
    """Peak learning rate."""
    toward: str = "reasoner"
    """The model with the wanted skill, by its name under `models:`."""
    away_from: str | None = None
    """Another model of `models:` that the difference starts from, in the place of the tuned one."""
    alpha: float = 1.0
    """Strength of the push."""
    mode: Literal["absolute", "gradnorm", "adaptive_cosine"] = "adaptive_cosine"
    """How the push is sized."""
    alphas: dict[str, float] = field(default_factory=dict)
    """Strengths of some parameters: leading parts of names or globs, the last that fits counts."""
    targets: list[Literal["attention", "ffn", "norm", "embedding", "head"]] = field(default_factory=lambda: ["attention", "ffn"])  # type: ignore[arg-type]
    """Which kinds of parameters are pushed."""
    skip_first: int = 0
    """So many of the first blocks are left alone."""
    layers: list[int] | None = None
    """Only these blocks (counted from 0)."""
    names: dict[str, str] = field(default_factory=dict)
    """From leading parts of the tuned model's names to those of the sibling, e.g. {model.language_model.: model.}."""
    match_norm: bool = True
    """Rescale each difference to the parameter's own norm; only `absolute` feels it."""
    offload: bool = False
    """Keep the differences on the CPU."""
    base: Literal["adamw", "sgd"] = "adamw"
    """What takes the step with the pushed gradient."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates."""
    eps: float = 1e-8
    """Adam's term against division by zero."""
    momentum: float = 0.9
    """SGD's momentum."""
    weight_decay: float = 0.0
    """Decoupled for AdamW, L2 for SGD."""

    parallel = frozenset({"single", "ddp"})
    toy = {"lr": 1e-3}
    toy_models: ClassVar[tuple[str, ...]] = ("reasoner",)

    def __post_init__(self) -> None:
        refuse(not self.lr > 0, "lr", self.lr, "above 0")
        refuse(self.mode not in MODES, "mode", self.mode, f"one of {', '.join(MODES)}")
        refuse(self.alpha < 0, "alpha", self.alpha, "0 or above")
        refuse(any(a < 0 for a in self.alphas.values()), "alphas", self.alphas, "0 or above each")
        kinds = ("attention", "ffn", "norm", "embedding", "head")
        refuse(not self.targets or any(t not in kinds for t in self.targets), "targets", self.targets, f"a list of {', '.join(kinds)}")
        refuse(self.skip_first < 0, "skip_first", self.skip_first, "0 or above")
        refuse(self.base not in ("adamw", "sgd"), "base", self.base, "'adamw' or 'sgd'")
        refuse(self.weight_decay < 0, "weight_decay", self.weight_decay, "0 or above")
        refuse(not all(0 <= b < 1 for b in self.betas), "betas", self.betas, "two numbers of [0, 1)")
        named = [self.toward] if self.away_from is None else [self.toward, self.away_from]
        self.needs = frozenset(f"model:{name}" for name in named)  # type: ignore[misc]
        self.pulls: list[Pull] = []

    def build(self, groups: Iterable[Any], ctx: Context | None = None) -> torch.optim.Optimizer:
        made = as_groups(groups)
        if ctx is not None:
            self.pulls = self._pulls({n: p for g in made for n, p in g.params.items()}, ctx)
        if self.base == "sgd":
            return sgd(made, self.lr, self.momentum, self.weight_decay)
        return adamw(made, self.lr, self.betas, self.eps, self.weight_decay)

    def after_backward(self, step: Step, ctx: Context) -> None:
        """Once a step, on the gradient of all its rows: a push in every micro-batch would be scaled several times."""
        found, moved = [], 0.0
        for pull in self.pulls:
            grad = pull.param.grad
            if grad is None:
                continue
            delta = pull.delta.to(grad.device)
            found.append(cosine(grad, delta))
            pushed = drift(grad, delta, pull.alpha, self.mode)
            if pushed is not grad:
                moved += float((pushed - grad).float().square().sum())
                grad.copy_(pushed)
        if found:
            ctx.log(**{"drift/cosine": sum(found) / len(found), "drift/push": moved**0.5})

    # the differences ----------------------------------------------------------------------------------------------------
    def _pulls(self, params: Mapping[str, nn.Parameter], ctx: Context) -> list[Pull]:
        toward = TensorSource.of(ctx.model(self.toward))
        away = None if self.away_from is None else TensorSource.of(ctx.model(self.away_from))
        chosen = {n: p for n, p in params.items() if self._chosen(n)}
        partners = {n: self._partner(n) for n in chosen if self._partner(n) in toward}
        if not partners:
            one = next(iter(chosen or params), "")
            raise RecipeError(
                f"drift finds no partner in '{self.toward}' for any tuned parameter (such as '{one}'); tune whole weights (`adapt: full`), choose `targets` and "
                f"`layers` that train, or map names with `names`, e.g. names: {{model.language_model.: model.}}."
            )
        ctx.notice(f"drift pushes {len(partners)} of {len(params)} tuned parameters toward '{self.toward}'.")
        return [self._pull(n, chosen[n], toward, away, partners[n]) for n in partners]

    def _pull(self, name: str, param: nn.Parameter, toward: TensorSource, away: TensorSource | None, partner: str) -> Pull:
        own = param.detach().float()
        if away is not None and partner not in away:
            raise ModelError(f"'{self.away_from}' has no '{partner}', which '{self.toward}' has; drift's direction between two models needs siblings of one architecture.")
        start = own if away is None else away[partner].to(own.device).float()
        there = toward[partner].to(own.device).float()
        if there.shape != own.shape or start.shape != own.shape:
            raise ModelError(f"'{name}' is {list(own.shape)} in the tuned model and {list(there.shape)} in '{self.toward}'; drift needs siblings of one architecture.")
        delta = there - start
        size = float(delta.norm())
        if self.match_norm and size > FLOOR:
            delta = delta * (float(own.norm()) / size)
        return Pull(name, param, delta.to(torch.device("cpu") if self.offload else param.device, param.dtype), self._alpha(name))

    def _chosen(self, name: str) -> bool:
        block, tower = block_index(name)
        if tower in SENSES or category(name) not in self.targets:
            return False
        return block is None or (block >= self.skip_first and (self.layers is None or block in self.layers))

    def _partner(self, name: str) -> str:
        plain = name.removeprefix("base_model.model.")
        for here, there in self.names.items():
            if plain.startswith(here):
                return there + plain.removeprefix(here)
        return plain

    def _alpha(self, name: str) -> float:
        fitting = [value for pattern, value in self.alphas.items() if left_out(name, [pattern])]
        return fitting[-1] if fitting else self.alpha
