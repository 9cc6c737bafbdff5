"""TRAM: sharpness-aware minimisation within a trust region of function space."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from luthier.catalog import register
from luthier.errors import TrainingError
from luthier.optimize._shared import TwoPass, at, refuse, sam_perturbation

if TYPE_CHECKING:
    from luthier.core.context import Context


def tram(params: SequenceOf[Tensor], grads: SequenceOf[Tensor], d: float, adaptive: bool = True) -> list[Tensor]:
    """eps = d w^2 g / || |w| g ||_2: ASAM's ascent step with a measured distance `d` for its radius (adaptive=False: d g / ||g||)."""
    return sam_perturbation(params, grads, d, adaptive)


@torch.no_grad()
def fisher_perturbation(params: SequenceOf[Tensor], grads: SequenceOf[Tensor], gamma: float = 0.1, eta: float = 0.1) -> list[Tensor]:
    """eps = gamma F^-1 g / sqrt(g^T F^-1 g), with the diagonal F = g^2 damped as F^-1 = 1 / (1 + eta F)."""
    inverse = [1 / (1 + eta * g.square()) for g in grads]
    norm = torch.stack([(g.square() * f).sum().cpu() for g, f in zip(grads, inverse)]).sum().sqrt() if grads else torch.zeros(())
    return [f * g * (gamma / (norm + 1e-12)).to(g) for g, f in zip(grads, inverse)]


@register("tram", paper=75)
@dataclass
class TRAM(TwoPass):
    """Sharpness-aware steps whose radius is not a constant but how far the predictions moved: flat minima are sought only as far
    as the function is allowed to change.

    Per batch: g at theta_t; the radius d, without gradient, as the mean over predictions of a KL summed over classes,

    - previous: KL(p(theta_{t-1}) || p(theta_t)), the weights before the last step (d = 0 at the first step: a plain step);
    - base: the same against the weights at the stage's start; ema: against their running average with `decay`;
    - x: KL(p(x + z) || p(x)), z ~ N(0, sigma^2) (or uniform in [-sigma, sigma]) on the input embeddings;

    eps = d theta^2 g / || |theta| g ||_2 (ASAM's form; `adaptive: false`: d g / ||g||, for weights that start at zero such as
    LoRA's B); gradient at theta + eps on the same batch; theta restored; base step with that gradient. 3 forward, 2 backward.
    fisher: eps = gamma F^-1 g / sqrt(g^T F^-1 g) with g and F = g^2 from the noised inputs; 2 forward, 2 backward.

    Needs an objective that scores or classifies. KL is averaged over tokens (rows for classifiers), not over classes: the
    element mean of the authors' release divides by the vocabulary and leaves a radius near 0. Their release also leaves the
    gradient out of eps; the paper's formula stands here. d is logged as `tram/distance`. Dropout is shared by both predictions.
    Defaults: the paper's language runs (Adam betas (0.9, 0.99), lr 2e-5), sigma 0.1, gamma = eta = 0.1."""

    variant: Literal["previous", "base", "ema", "x", "fisher"] = "previous"
    """What the current predictions are compared with."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Adam's decay rates."""
    adaptive: bool = True
    """Scale the perturbation by |theta|, element-wise."""
    decay: float = 0.999
    """For `ema`: share of the old average that is kept."""
    sigma: float = 0.1
    """For `x` and `fisher`: size of the embedding noise."""
    noise: Literal["normal", "uniform"] = "normal"
    """Distribution of the noise."""
    scale: float = 1.0
    """Factor on the measured distance."""
    gamma: float = 0.1
    """For `fisher`: the radius."""
    eta: float = 0.1
    """For `fisher`: damping."""

    def __post_init__(self) -> None:
        super().__post_init__()
        variants = ("previous", "base", "ema", "x", "fisher")
        refuse(self.variant not in variants, "variant", self.variant, f"one of {', '.join(variants)}")
        refuse(not 0 <= self.decay <= 1, "decay", self.decay, "in [0, 1]")
        refuse(self.sigma < 0, "sigma", self.sigma, "0 or above")
        refuse(self.noise not in ("normal", "uniform"), "noise", self.noise, "'normal' or 'uniform'")
        refuse(self.scale < 0, "scale", self.scale, "0 or above")
        self._shadow: list[Tensor] = []
        self._params: list[nn.Parameter] = []
        self.distance = 0.0

    @property
    def keep(self) -> float:
        """The shadow's decay: 0 the last weights, 1 the first ones."""
        return {"previous": 0.0, "base": 1.0}.get(self.variant, self.decay)

    def build(self, groups: Iterable[Any], ctx: Context | None = None) -> torch.optim.Optimizer:
        optimizer = super().build(groups, ctx)
        if self.variant in ("previous", "base", "ema"):
            self._params = [p for group in optimizer.param_groups for p in group["params"]]
            self._shadow = [p.detach().clone() for p in self._params]
        return optimizer

    def first_pass(self, closure: Callable[..., Any], ctx: Context | None) -> Any:
        return closure(edit=lambda: self.noised(closure, ctx)) if self.variant == "fisher" else closure()

    def perturbation(
        self, params: list[Tensor], optimizer: torch.optim.Optimizer, outputs: Any, closure: Callable[..., Any], ctx: Context | None
    ) -> list[Tensor]:
        grads = [p.grad for p in params if p.grad is not None]
        if self.variant == "fisher":
            return fisher_perturbation(params, grads, self.gamma, self.eta)
        if not outputs.scores:
            raise TrainingError("TRAM compares predictions, but this objective makes none (it neither scores nor classifies); use 'sam' instead.")
        # A pass without gradient leaves the .grad of the first in place.
        with torch.no_grad():
            if self.variant == "x":
                other = closure(edit=lambda: self.noised(closure, ctx), grad=False)
                self.distance = self.scale * divergence(other, outputs)
            else:
                other = closure(edit=lambda: at(self._params, self._shadow), grad=False)
                self.distance = self.scale * divergence(other, outputs, dict(zip(map(id, self._params), self._shadow)))
        if ctx is not None:
            ctx.log(**{"tram/distance": self.distance})
            if self.adaptive and any(not bool(p.any()) for p in params):
                ctx.notice("Some trained weights are all zero (LoRA's B at its start); TRAM's adaptive form never perturbs them. Set `adaptive: false`.")
        return tram(params, grads, self.distance, self.adaptive)

    @torch.no_grad()
    def before_base_step(self, optimizer: torch.optim.Optimizer) -> None:
        """The weights of this step become the next step's past (with decay 0), taken before they move."""
        if self._shadow and self.keep < 1:
            for shadow, param in zip(self._shadow, self._params):
                shadow.mul_(self.keep).add_(param.detach(), alpha=1 - self.keep)

    @contextmanager
    def noised(self, closure: Any, ctx: Context | None) -> Iterator[None]:
        """Noise on the input embeddings during a pass."""
        model = getattr(closure, "model", None) or (ctx.current if ctx is not None else None)
        if model is None:
            raise TrainingError("TRAM's noise needs the model: run it within a recipe, or give the closure an attribute `model`.")
        generator = ctx.rng("tram") if ctx is not None else None

        def add(_module: nn.Module, _inputs: Any, out: Tensor) -> Tensor:
            shape = out.shape
            z = torch.randn(shape, generator=generator) if self.noise == "normal" else torch.rand(shape, generator=generator) * 2 - 1
            return out + self.sigma * z.to(out)

        handles = [m.register_forward_hook(add) for m in _embeddings(model.base_network)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": list(self._shadow)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for mine, saved in zip(self._shadow, state["shadow"]):
            mine.copy_(saved)


def _embeddings(network: Any) -> list[nn.Module]:
    """What turns inputs into vectors: one module, or one a tower."""
    try:
        return [network.get_input_embeddings()]
    except NotImplementedError:
        ends = ("token_embedding", "patch_embedding", "word_embeddings", "patch_embeddings")
        found = [m for n, m in network.named_modules() if n.endswith(ends)]
    if not found:
        raise TrainingError(f"The input embeddings of {type(network).__name__} are not known; use TRAM's variant 'previous' or 'base'.")
    return found


@torch.no_grad()
def divergence(reference: Any, current: Any, weights: dict[int, Tensor] | None = None) -> float:
    """KL(reference || current), summed over classes, averaged over predictions.

    Scores hold hidden states; a head that trains is evaluated for the reference at its own `weights` (by id of the parameter)."""
    from luthier.core.scores import kl

    total = number = 0.0
    for ref, cur in zip(reference.scores, current.scores):
        if isinstance(cur, Tensor):
            values = kl(ref, cur)
        else:
            values = cur.kl(_with_head(ref, weights or {}))
        total, number = total + float(values.sum()), number + values.numel()
    return total / max(1.0, number)


def _with_head(scores: Any, weights: dict[int, Tensor]) -> Any:
    """The same scores under a head whose parameters are replaced where `weights` has them."""
    projection = scores.head.projection
    own = {n: weights[id(p)] for n, p in projection.named_parameters() if id(p) in weights}
    if not own:
        return scores
    other = scores.detach()
    other.head = type(scores.head)(_At(projection, own), scores.head.scale, scores.head.softcap)
    return other


class _At(nn.Module):
    """A module called at other parameter values."""

    call: Callable[[Tensor], Tensor]

    def __init__(self, module: nn.Module, values: dict[str, Tensor]) -> None:
        super().__init__()
        object.__setattr__(self, "call", lambda hidden: torch.func.functional_call(module, values, (hidden,)))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.call(hidden)
