"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.catalog import register
from luthier.optimize import Optimizer
from luthier.optimize._shared import refuse, sgd

if TYPE_CHECKING:
    import torch

    from luthier.core.context import Context


@register("sgd", wraps="torch.optim.SGD")
@dataclass
class SGD(Optimizer):
    """Plain gradient descent with momentum: no state but one velocity, and steps proportional to the gradient.

    u <- momentum u + g + decay w;  w <- w - lr u (with `nesterov`: w <- w - lr (g + decay w + momentum u))."""

    lr: float = 1e-2
    """Peak learning rate."""
    momentum: float = 0.9
    """Share of the last velocity that is kept."""
    nesterov: bool = False
    """Look one velocity ahead."""
    weight_decay: float = 0.0
    """L2 decay of matrices."""

    def __post_init__(self) -> None:
        refuse(not self.lr > 0, "lr", self.lr, "above 0")
        refuse(not 0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)")
        refuse(self.nesterov and self.momentum == 0, "nesterov", self.nesterov, "false where momentum is 0")
        refuse(self.weight_decay < 0, "weight_decay", self.weight_decay, "0 or above")

    def build(self, groups: Iterable[Any], ctx: Context | None = None) -> torch.optim.Optimizer:
        return sgd(groups, self.lr, self.momentum, self.weight_decay, self.nesterov)
