"""What optimizers share: building the base optimizer of a two-pass method, and moving weights to a point and back exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from luthier.errors import RecipeError
from luthier.optimize import Optimizer, torch_groups

if TYPE_CHECKING:
    from luthier.core.context import Context


def refuse(bad: bool, field: str, value: Any, allowed: str) -> None:
    """Raise the sentence that every optimizer raises for a bad field."""
    if bad:
        raise RecipeError(f"'{field}' is {value!r}; it must be {allowed}.")


def adamw(groups: Iterable[Any], lr: float, betas: SequenceOf[float], eps: float, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(torch_groups(groups, lr, weight_decay), lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay)  # type: ignore[arg-type]


def sgd(groups: Iterable[Any], lr: float, momentum: float, weight_decay: float, nesterov: bool = False) -> torch.optim.Optimizer:
    return torch.optim.SGD(torch_groups(groups, lr, weight_decay), lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)


def trained(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters that the last backward pass gave a gradient."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


@torch.no_grad()
def sam_perturbation(params: SequenceOf[Tensor], grads: SequenceOf[Tensor], rho: float, adaptive: bool = False) -> list[Tensor]:
    """The ascent step of SAM and ASAM, over all tensors together.

    SAM: eps = rho g / ||g||_2. ASAM (adaptive, element-wise): eps = rho w^2 g / || |w| g ||_2."""
    scaled = [p.abs() * g for p, g in zip(params, grads)] if adaptive else list(grads)
    norms = [s.norm(p=2) for s in scaled]
    norm = torch.stack([n.to(norms[0].device) for n in norms]).norm(p=2) if norms else torch.zeros(())
    scale = rho / (norm + 1e-12)
    return [(p * p if adaptive else 1.0) * g * scale.to(p) for p, g in zip(params, grads)]


@contextmanager
def moved(params: SequenceOf[Tensor], change: SequenceOf[Tensor]) -> Iterator[None]:
    """Weights plus `change` inside, exactly the old weights afterwards (restored from copies, not by subtraction)."""
    kept = [p.detach().clone() for p in params]
    try:
        with torch.no_grad():
            for p, c in zip(params, change):
                p.add_(c)
        yield
    finally:
        with torch.no_grad():
            for p, old in zip(params, kept):
                p.copy_(old)


@contextmanager
def at(params: SequenceOf[nn.Parameter], values: SequenceOf[Tensor]) -> Iterator[None]:
    """Other values in the parameters inside, the old ones afterwards, without copying either."""
    kept = [p.data for p in params]
    try:
        for p, value in zip(params, values):
            p.data = value.to(device=p.device, dtype=p.dtype)
        yield
    finally:
        for p, old in zip(params, kept):
            p.data = old


@dataclass
class TwoPass(Optimizer):
    """A base optimizer whose gradient is taken at a perturbed point of the same batch: the family of SAM.

    Subclasses give `perturbation`. Dropout is replayed and batch-norm statistics are frozen in the second pass."""

    lr: float = 2e-5
    """Learning rate of the base optimizer."""
    base: Literal["adamw", "sgd"] = "adamw"
    """What takes the step with the perturbed gradient."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates."""
    eps: float = 1e-8
    """Adam's term against division by zero."""
    momentum: float = 0.9
    """SGD's momentum."""
    weight_decay: float = 0.0
    """Decoupled for AdamW, L2 for SGD."""

    two_pass = True

    def __post_init__(self) -> None:
        refuse(not self.lr > 0, "lr", self.lr, "above 0")
        refuse(self.base not in ("adamw", "sgd"), "base", self.base, "'adamw' or 'sgd'")
        refuse(self.weight_decay < 0, "weight_decay", self.weight_decay, "0 or above")

    def build(self, groups: Iterable[Any], ctx: Context | None = None) -> torch.optim.Optimizer:
        if self.base == "sgd":
            return sgd(groups, self.lr, self.momentum, self.weight_decay)
        return adamw(groups, self.lr, self.betas, self.eps, self.weight_decay)

    def perturbation(
        self, params: list[Tensor], optimizer: torch.optim.Optimizer, outputs: Any, closure: Callable[..., Any], ctx: Context | None
    ) -> list[Tensor]:
        raise NotImplementedError

    def first_pass(self, closure: Callable[..., Any], ctx: Context | None) -> Any:
        """The pass whose gradient points uphill."""
        return closure()

    def step(self, optimizer: torch.optim.Optimizer, closure: Callable[..., Any], ctx: Context | None = None) -> Any:
        outputs = self.first_pass(closure, ctx)
        params = trained(optimizer)
        change = self.perturbation(params, optimizer, outputs, closure, ctx)
        with moved(params, change):
            closure()
        self.before_base_step(optimizer)
        # `finish` lets the plug-ins read and edit the gradient and clips it; it answers False when one of them drops the step.
        finish = getattr(closure, "finish", None)
        if finish is None or finish() is not False:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return getattr(outputs, "losses", None) or {"loss": outputs.loss}

    def before_base_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Weights are restored; the base step has not been taken."""


class PerTensor(torch.optim.Optimizer):
    """An optimizer whose update of one tensor looks at no other: derived classes write `_move`."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._move(param, group)
        return loss

    def _move(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        raise NotImplementedError
