"""Sharpness-aware minimisation, plain and adaptive."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from luthier.catalog import register
from luthier.optimize._shared import TwoPass, refuse, sam_perturbation

if TYPE_CHECKING:
    from luthier.core.context import Context


def sam(params: SequenceOf[Tensor], grads: SequenceOf[Tensor], rho: float = 0.05, adaptive: bool = False) -> list[Tensor]:
    """The point at which SAM (or, adaptive, ASAM) takes its gradient, minus the weights: see `sam_perturbation`."""
    return sam_perturbation(params, grads, rho, adaptive)


@register("sam", paper=75)
@dataclass
class SAM(TwoPass):
    """Take the gradient at the worst point of a small ball around the weights, so that training ends in flat minima.

    eps = rho g / ||g||_2; the base optimizer steps from w with the gradient at w + eps, on the same batch, dropout replayed.
    `adaptive` (ASAM): eps = rho w^2 g / || |w| g ||_2, a ball that does not change when layers are rescaled; entries that are
    exactly zero (LoRA's B at its start) never move in it. Costs two passes a step.

    Usual radii: 0.05 for SAM, 0.5 for ASAM. TRAM chooses the radius anew at every step from how far predictions moved."""

    rho: float | None = None
    """Radius; default 0.05, or 0.5 if adaptive."""
    adaptive: bool = False
    """Element-wise scaling by |w| (ASAM)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(self.rho is not None and self.rho < 0, "rho", self.rho, "0 or above")

    @property
    def radius(self) -> float:
        return (0.5 if self.adaptive else 0.05) if self.rho is None else self.rho

    def perturbation(
        self, params: list[Tensor], optimizer: torch.optim.Optimizer, outputs: Any, closure: Callable[..., Any], ctx: Context | None
    ) -> list[Tensor]:
        return sam(params, [p.grad for p in params if p.grad is not None], self.radius, self.adaptive)
