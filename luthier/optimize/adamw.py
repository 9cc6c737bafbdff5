"""AdamW."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.catalog import register
from luthier.optimize import Optimizer
from luthier.optimize._shared import adamw, refuse

if TYPE_CHECKING:
    import torch

    from luthier.core.context import Context


@register("adamw", wraps="torch.optim.AdamW")
@dataclass
class AdamW(Optimizer):
    """Adam with decoupled weight decay: every entry moves by its averaged gradient over the root of its averaged square.

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  w <- w - lr (decay w + m^ / (sqrt(v^) + eps)), with m^, v^ corrected for
    their start at zero. Vectors and scalars (norms, biases) do not decay unless their group says so."""

    lr: float = 2e-4
    """Peak learning rate; full fine-tuning wants about a tenth of this."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the two averages."""
    eps: float = 1e-8
    """Against division by zero."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices."""

    def __post_init__(self) -> None:
        refuse(not self.lr > 0, "lr", self.lr, "above 0")
        refuse(not all(0 <= b < 1 for b in self.betas), "betas", self.betas, "two numbers of [0, 1)")
        refuse(self.eps < 0, "eps", self.eps, "0 or above")
        refuse(self.weight_decay < 0, "weight_decay", self.weight_decay, "0 or above")

    def build(self, groups: Iterable[Any], ctx: Context | None = None) -> torch.optim.Optimizer:
        return adamw(groups, self.lr, self.betas, self.eps, self.weight_decay)
