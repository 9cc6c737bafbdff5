"""GreenTrainer: train the weight tensors that bring most, within a budget of operations."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from luthier.catalog import register
from luthier.core import ranks
from luthier.core.meters import BackwardCosts, Flops, backward_costs
from luthier.core.surgery import rewind
from luthier.errors import RecipeError
from luthier.optimize import Optimizer
from luthier.optimize._shared import adamw, refuse

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.plugin import Step


def cost(chosen: SequenceOf[int], dw: SequenceOf[float], dy: SequenceOf[float], charge: str = "exact") -> float:
    """T(m) = sum of dw over the chosen tensors + sum of dy over those before the deepest of them (`release`: the deepest's own too)."""
    if not len(chosen):
        return 0.0
    return float(sum(dw[k] for k in chosen) + sum(dy[: max(chosen) + (charge == "release")]))


def greentrainer(
    importance: SequenceOf[float], dw: SequenceOf[float], dy: SequenceOf[float], budget: float, resolution: int = 1000, charge: Literal["exact", "release"] = "exact"
) -> list[int]:
    """The set of tensors with the largest total importance whose backward pass costs at most `budget`. Tensors are in order from the
    output to the input; one without positive importance is never in it.

    With the deepest chosen tensor k, what is left for weight gradients is budget - reach(k), reach(k) = sum_{j<k} dy[j]. So one knapsack
    table over the weight gradients of tensors 1..k, read at budget - reach(k), serves all k: the optimum of the paper's recurrence in
    O(N x resolution) in place of O(N^2 x resolution). Costs are counted in sum(dw + dy) / `resolution`, rounded down, and the
    rounded budget is lowered until the true cost fits."""
    value, w, d = (np.asarray(x, dtype=np.float64) for x in (importance, dw, dy))
    if budget < 0 or not len(value):
        return []
    reach = np.cumsum(d) if charge == "release" else np.concatenate([[0.0], np.cumsum(d)[:-1]])
    unit = max(float(w.sum() + d.sum()) / resolution, 1e-300)
    cap = int(min(budget, w.sum() + d.sum()) / unit + 1e-9)
    whole, deep = (w / unit + 1e-9).astype(np.int64), (reach / unit + 1e-9).astype(np.int64)
    near = [k for k in range(len(value)) if deep[k] <= cap]  # those deeper cannot be reached
    best, tables, taken = np.zeros(cap + 1), [], []
    for k in near:
        take = np.zeros(cap + 1, dtype=bool)
        if value[k] > 0 and whole[k] <= cap:
            better = best[: cap + 1 - whole[k]] + value[k]
            take[whole[k] :] = better > best[whole[k] :]
            best = best.copy()
            best[whole[k] :] = np.maximum(best[whole[k] :], better)
        tables.append(best)
        taken.append(take)
    for limit in range(cap, -1, -1):
        ends = [(tables[k][limit - deep[k]], -k) for k in near if deep[k] <= limit]
        if not ends:
            break
        last = -max(ends)[1]
        chosen = _behind(taken[: last + 1], whole, limit - int(deep[last]))
        if cost(chosen, dw, dy, charge) <= budget:
            return chosen
    return []


def _behind(taken: list[np.ndarray], whole: np.ndarray, left: int) -> list[int]:
    """The set behind an entry of the table."""
    chosen = []
    for k in range(len(taken) - 1, -1, -1):
        if taken[k][left]:
            chosen.append(k)
            left -= int(whole[k])
    return chosen[::-1]


def backward_budget(costs: BackwardCosts, share: float) -> float:
    """What a selection may cost so that forward and backward pass together keep `share` of their operations:
    rho_bp t_bp = rho (t_fp + t_bp) - t_fp, or 5 % of t_bp where the forward pass alone costs more; less what any selection costs."""
    wanted = share * (costs.forward + costs.backward) - costs.forward
    return (wanted if wanted > 0 else 0.05 * costs.backward) - costs.fixed


def reachable(costs: BackwardCosts, budget: float, charge: str = "exact") -> list[str]:
    """The tensors that the error reaches within the budget, whatever else is chosen; at least the first."""
    price = [cost([k], [0.0] * len(costs.dw), costs.dy, charge) for k in range(len(costs.names))]
    return [n for n, p in zip(costs.names, price) if p <= budget] or costs.names[:1]


@register("greentrainer", paper=57)
@dataclass
class GreenTrainer(Optimizer):
    """AdamW on a changing selection of the weight tensors: those that promise the largest fall of the loss among all that can be trained
    with `share` of the operations of full training; chosen anew as training goes on.

    Forming tensor k's gradient costs dw_k operations; passing the error through all that lies between it and the tensor before costs
    dy. A selection m costs T(m) = sum_k m_k dw_k + sum_{j < deepest} dy_j, as autograd stops at the deepest trained tensor. Importance: on
    the step's own batch one real optimizer step w_0 -> w_1 of the tensors that the error can reach within the budget, the gradient g_1 there,
    I_k = -<g_1, w_1 - w_0>, the loss that tensor k's change took away, over the largest; weights, moments and counts are put back. A dynamic programme finds the best m with T(m) within the budget; tensors with
    I_k <= 0 are left out even where there is budget. All others get no gradient at all, so their moments stand still and Adam does not
    move them; they keep their moments for when they return.

    All operations are measured on the run's own batch, not worked out from shapes: see `core.meters.backward_costs` (norms and biases
    count nothing beside matrix products). `greentrainer/operations` is what a step with the selection cost, measured, as a share of one
    with all tensors. Composes with any adapter: of a LoRA it selects factors, whose errors still pass through the frozen weights.

    A choice costs two further passes and a few replayed operations. Defaults: 0.5 (the paper: 0.4 and 0.5), a new choice every epoch
    (1 to 2), table of 1000, AdamW at 2e-5 with decay 0.01, linear schedule without warm-up, 5 epochs of batches of 4 (its release's, which also decays gains and biases). Decided
    here: `charge: exact`; the release also charges the deepest tensor's own dy, which is not needed. Clipping does not apply to the trial step."""

    lr: float = 2e-5
    """Peak learning rate."""
    share: float = 0.5
    """Operations of forward and backward pass that are kept; 1: all."""
    interval: int = 1
    """Epochs between choices."""
    every: int | None = None
    """Steps between choices, in place of epochs."""
    resolution: int = 1000
    """Steps into which costs are rounded."""
    charge: Literal["exact", "release"] = "exact"
    """Whether the deepest chosen tensor also pays for passing the error through itself."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates."""
    eps: float = 1e-8
    """Adam's term against division by zero."""
    weight_decay: float = 0.01
    """Decoupled weight decay of trained matrices."""

    two_pass = True
    parallel = frozenset({"single", "ddp"})

    def __post_init__(self) -> None:
        refuse(not self.lr > 0, "lr", self.lr, "above 0")
        refuse(not 0 < self.share <= 1, "share", self.share, "above 0 and at most 1")
        refuse(self.interval < 1, "interval", self.interval, "1 or more")
        refuse(self.every is not None and self.every < 1, "every", self.every, "1 or more, or left out")
        refuse(self.resolution < 10, "resolution", self.resolution, "10 or more")
        refuse(self.charge not in ("exact", "release"), "charge", self.charge, "'exact' or 'release'")
        refuse(self.weight_decay < 0, "weight_decay", self.weight_decay, "0 or above")
        self.chosen: list[str] = []
        """The tensors that train now."""
        self.importance: dict[str, float] = {}
        self.costs: BackwardCosts | None = None
        self._chosen_at: int | None = None
        self._epoch = self._steps = 0

    def build(self, groups: Iterable[Any], ctx: Context | None = None) -> torch.optim.Optimizer:
        return adamw(groups, self.lr, self.betas, self.eps, self.weight_decay)

    def before_step(self, step: Step, ctx: Context | None) -> None:
        self._epoch = step.epoch

    def step(self, optimizer: torch.optim.Optimizer, closure: Callable[..., Any], ctx: Context | None = None) -> Any:
        params = {n: p for group in optimizer.param_groups for n, p in zip(group["names"], group["params"]) if p.requires_grad}
        now, wait = (self._steps, self.every) if self.every is not None else (self._epoch, self.interval)
        due = self._chosen_at is None or now - self._chosen_at >= wait
        if due:
            self._choose(optimizer, closure, params, ctx)
            self._chosen_at = now
        for name, param in params.items():
            param.requires_grad_(name in self.chosen)
        with Flops() if due else nullcontext() as flops:
            outputs = closure()
        if flops is not None and self.costs is not None and ctx is not None:
            whole = self.costs.forward + self.costs.backward
            ctx.log(**{"greentrainer/operations": flops.total / max(1, whole), "greentrainer/tensors": len(self.chosen)})
        finish = getattr(closure, "finish", None)
        if finish is None or finish() is not False:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self._steps += 1
        return getattr(outputs, "losses", None) or {"loss": outputs.loss}

    def _choose(self, optimizer: torch.optim.Optimizer, closure: Callable[..., Any], params: dict[str, Tensor], ctx: Context | None) -> None:
        """Measure what every tensor costs and brings, and solve for the selection."""
        for param in params.values():
            param.requires_grad_(True)
        with backward_costs(params) as measured:  # type: ignore[arg-type]
            closure()
        self.costs = costs = ranks.gather(measured())[0]  # all processes choose alike
        self._seen(params, ctx)
        budget = backward_budget(costs, self.share)
        near = set(reachable(costs, budget, self.charge))
        for name, param in params.items():
            if name not in near:
                param.requires_grad_(False).grad = None
        with rewind(optimizer) as before:
            optimizer.step()
            change = {n: p.detach() - before[p] for n, p in params.items() if p.grad is not None}
            closure()
            gain = {n: -float((g * c).sum()) for n, c in change.items() if (g := params[n].grad) is not None}
        largest = max(map(abs, gain.values()), default=0.0) or 1.0
        self.importance = {n: gain.get(n, 0.0) / largest for n in params}
        found = greentrainer([self.importance[n] for n in costs.names], costs.dw, costs.dy, budget, self.resolution, self.charge)
        self.chosen = [costs.names[k] for k in found]
        if not self.chosen and costs.names:
            self.chosen = costs.names[:1]
            if ctx is not None:
                ctx.notice(f"GreenTrainer found no tensor that helps within {self.share:g} of the operations, so only '{self.chosen[0]}' trains; a larger `share` allows more.")

    def _seen(self, params: dict[str, Tensor], ctx: Context | None) -> None:
        """A tensor that no watched operation of the forward pass takes has no price."""
        assert self.costs is not None
        unseen = [n for n in params if n not in set(self.costs.names)]
        if len(unseen) == len(params):
            raise RecipeError(f"greentrainer cannot watch where '{unseen[0]}' and the other trained tensors enter the forward pass, so it has no prices to choose by; take another `adapt` or another `optimize`.")
        if unseen and ctx is not None and self._chosen_at is None:
            ctx.notice(f"GreenTrainer saw no operation that {len(unseen)} of {len(params)} tensors enter, e.g. '{unseen[0]}'; they do not train.")

    def state_dict(self) -> dict[str, Any]:
        return {"chosen": list(self.chosen), "importance": dict(self.importance), "chosen_at": self._chosen_at, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.chosen, self.importance = list(state["chosen"]), dict(state["importance"])
        self._chosen_at, self._steps = state["chosen_at"], state["steps"]
