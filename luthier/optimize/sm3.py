"""SM3: adaptive steps from row and column covers, dense or on a sparse support."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from luthier.catalog import register
from luthier.optimize import Optimizer, as_groups, torch_groups
from luthier.optimize._shared import PerTensor, refuse

if TYPE_CHECKING:
    from luthier.core.context import Context


def sm3(grad: Tensor, index: Tensor, rows: Tensor, columns: Tensor, beta: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """nu, rows, columns after one step, for entries at flat `index` of a matrix [len(rows), len(columns)].

    nu_ij = min(r_i, c_j) + g_ij^2 (beta > 0: beta min(...) + (1 - beta) g^2); r_i and c_j rise to the largest nu of their entries."""
    row, column = index // len(columns), index % len(columns)
    least = torch.minimum(rows[row], columns[column])
    nu = least * beta + grad.square() * (1 - beta) if beta > 0 else least + grad.square()
    return nu, rows.scatter_reduce(0, row, nu, "amax"), columns.scatter_reduce(0, column, nu, "amax")


@register("sm3", paper=95)
@dataclass
class SM3(Optimizer):
    """Adagrad-like steps that remember one number a row and one a column instead of one an entry.

    nu_ij = min(r_i, c_j) + g_ij^2; r_i = max_j nu_ij; c_j = max_i nu_ij; w -= lr * momentum average of g / sqrt(nu + eps).
    nu never falls below the sum of the entry's own squared gradients. A vector has one number an entry (Adagrad).

    For a packed sparse delta (its group's option `support` maps the parameter's name to its flat indices and the matrix's shape)
    the covers are those of the whole matrix; SpIEL's variant `ma` grows where r_i c_j is large. Defaults: the release of SpIEL
    (beta 0, eps 1e-8); momentum 0.9 is the SM3 paper's."""

    lr: float = 1e-2
    """Peak learning rate."""
    momentum: float = 0.9
    """Averaging of the update; 0 keeps no state per entry at all."""
    beta: float = 0.0
    """Above 0: the covers are running averages instead of sums."""
    eps: float = 1e-8
    """Against division by zero, inside the root."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices."""

    parallel = frozenset({"single", "ddp"})

    def __post_init__(self) -> None:
        refuse(not self.lr > 0, "lr", self.lr, "above 0")
        refuse(not 0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)")
        refuse(not 0 <= self.beta < 1, "beta", self.beta, "in [0, 1)")
        refuse(self.eps < 0, "eps", self.eps, "0 or above")

    def build(self, groups: Iterable[Any], ctx: Context | None = None) -> torch.optim.Optimizer:
        given = as_groups(groups)
        supports = {id(g.params[n]): s for g in given for n, s in g.options.get("support", {}).items() if n in g.params}
        optimizer = CoverOptimizer(torch_groups(given, self.lr, self.weight_decay), self.lr, self.momentum, self.beta, self.eps, self.weight_decay)
        optimizer.supports = supports
        return optimizer


class CoverOptimizer(PerTensor):
    """The update of `SM3`. `supports`: by id of a packed parameter, (flat indices, shape of its matrix)."""

    def __init__(self, params: Any, lr: float = 1e-2, momentum: float = 0.9, beta: float = 0.0, eps: float = 1e-8, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "beta": beta, "eps": eps, "weight_decay": weight_decay})
        self.supports: dict[int, tuple[Tensor, tuple[int, int]]] = {}

    def _move(self, param: Tensor, group: dict[str, Any]) -> None:
        grad, state = param.grad.float(), self.state[param]  # type: ignore[union-attr]
        nu = self._cover(param, grad, state, group["beta"]).view_as(grad)
        update = grad * (nu + group["eps"]).rsqrt()
        if group["momentum"] > 0:
            last = state.get("momentum_buffer", torch.zeros_like(update))
            update = state["momentum_buffer"] = group["momentum"] * last + (1 - group["momentum"]) * update
        if group["weight_decay"] > 0:
            param.mul_(1 - group["lr"] * group["weight_decay"])
        param.add_(update.to(param.dtype), alpha=-group["lr"])
        state["step"] = state.get("step", 0) + 1

    def _cover(self, param: Tensor, grad: Tensor, state: dict[str, Any], beta: float) -> Tensor:
        if id(param) not in self.supports and param.ndim < 2:
            old = state.get("sum", torch.zeros_like(grad))
            state["sum"] = old * beta + grad.square() * (1 - beta) if beta > 0 else old + grad.square()
            return state["sum"]
        if id(param) in self.supports:
            index, (height, width) = self.supports[id(param)]
        else:
            height, width = param.shape[0], param[0].numel()
            index = torch.arange(param.numel(), device=param.device)
        if "rows" not in state:
            state["rows"], state["columns"] = grad.new_zeros(height), grad.new_zeros(width)
        nu, state["rows"], state["columns"] = sm3(grad.flatten(), index, state["rows"], state["columns"], beta)
        return nu
