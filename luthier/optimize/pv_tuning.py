"""PV-Tuning: a continuous step on codebooks, and a big step on a few codes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from luthier.catalog import register
from luthier.core.context import seed_of
from luthier.optimize import Optimizer, as_groups, torch_groups
from luthier.optimize._shared import PerTensor, refuse

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.quant import VectorQuant


@torch.no_grad()
def pv_tuning(
    quant: VectorQuant, reference: Tensor, share: float = 0.01, beam: int = 1, force: bool = False, trust: float | None = None, temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> int:  # fmt: skip
    """The discrete step in a subspace: the ceil(share * groups) groups in which `reference` (the weights after a big step) differs most
    from the matrix take the codes nearest to it; the codebooks stay. Returns how many groups changed.

    `force`: other codes than now. `trust`: groups change in the order of that distance until ||new - old|| / ||old|| reaches it, the one that
    reaches it still does (so that one always may), and the rest keep their codes. `temperature` above 0: the groups are drawn in proportion
    to that distance ^ (1 / temperature). `generator` draws them, and the order in which several codebooks are searched."""
    now = quant()
    number = math.ceil(share * quant.groups)
    distance = (reference.to(now) - now).reshape(quant.groups, -1).norm(dim=1)
    if temperature > 0:
        # the largest of log p + Gumbel noise are a draw without replacement
        noise = torch.rand(quant.groups, generator=generator).clamp_min(1e-30).to(distance)
        distance = distance.log() / temperature - (-noise.log()).log()
    chosen = distance.topk(number).indices
    before = quant.codes[:, chosen].clone()
    changed = quant.recode(reference, chosen, beam, force, generator)
    if trust is not None and bool(changed.any()):
        moved = (quant() - now).reshape(quant.groups, -1)[chosen].square().sum(1)
        over = moved.cumsum(0) - moved >= (trust * now.norm()) ** 2
        quant.codes[:, chosen[over]] = before[:, over]
        changed[over] = False
    return int(changed.sum())


@register("pv-tuning", paper=71)
@dataclass
class PVTuning(Optimizer):
    """Tune a network that is held as codes (`compress: pv-tuning`): each step moves codebooks, scales and plain weights a little, as Adam does,
    and gives a few groups of weights, those with the largest wanted change, other codes.

    P step, codes fixed: w <- w - lr c r u, u = m / (sqrt(v) + eps), c = sqrt(1 - b2^t) / (1 - b1^t) (Adam's correction), r = ||w|| / ||u|| (LAMB; 1
    where either is 0; it does not count the correction, so that first steps of a coded matrix are short). V step, values fixed: an update of
    the same form with `code_lr` and betas (0, 0.95), of the buffer where there is one, makes a reference of each coded matrix; in the
    ceil(max_change * groups) groups where the reference is farthest from the matrix as it is after the P step, the code nearest to the
    reference is taken (beam search for several codebooks), nowhere else. A small step nearly never changes a nearest code, so either the steps are kept in a buffer, or they are big:
    `delta_decay` 0 keeps a full-precision buffer from step to step (straight-through with few changes, the released default), 1 starts
    from the codes each time (the paper's algorithm; then `code_lr` must be of the size of the distance between codes, tenths, or `force` be
    on), and between them buffer <- (1 - d) buffer + d W_q. A report should say which one was used.

    Without coded weights this is Adam with trust ratios. Defaults: the release's; beam 1 for one codebook and 5 for more, whose
    order is drawn anew in every step; the groups with the largest wanted change, or with `temperature` T drawn by norm^(1/T). Memory: a second moment and (below `delta_decay` 1) a buffer a coded weight."""

    lr: float = 3e-4
    """Peak rate of codebooks, scales and plain weights, relative to their norm."""
    code_lr: float = 1e-2
    """Peak rate of the coded weights' reference, relative to their norm."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the P step."""
    code_betas: tuple[float, float] = (0.0, 0.95)
    """Decay rates of the V step."""
    eps: float = 1e-6
    """Against division by zero, beside the root of the uncorrected second moment."""
    lamb: bool = True
    """Scale every tensor's update to its norm."""
    delta_decay: float = 0.0
    """How far the buffer returns to the codes after each step: 0 straight-through, 1 the paper's algorithm."""
    max_change: float = 1e-2
    """The share of a matrix's groups that may change their code in a step."""
    beam: int | None = None
    """Width of the search; default: 1 for one codebook, 5 for several."""
    force: bool = False
    """Chosen groups must take other codes than they have."""
    trust: float | None = None
    """The relative change of a matrix at which a V step ends; groups whose reference is nearest keep their codes."""

    temperature: float = 0.0
    """Above 0, the groups that may change are drawn by the size of their wanted change ^ (1 / temperature); 0 takes the largest."""

    parallel = frozenset({"single", "ddp"})

    def __post_init__(self) -> None:
        for name in ("lr", "code_lr"):
            refuse(not getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in ("betas", "code_betas"):
            refuse(len(getattr(self, name)) != 2 or not all(0 <= b < 1 for b in getattr(self, name)), name, getattr(self, name), "two numbers of [0, 1)")
        refuse(not 0 <= self.delta_decay <= 1, "delta_decay", self.delta_decay, "of [0, 1]")
        refuse(not 0 < self.max_change <= 1, "max_change", self.max_change, "above 0 and at most 1")
        refuse(self.beam is not None and self.beam < 1, "beam", self.beam, "1 or more")
        refuse(self.trust is not None and not self.trust > 0, "trust", self.trust, "above 0")
        refuse(self.temperature < 0, "temperature", self.temperature, "0 or above")

    def build(self, groups: Iterable[Any], ctx: Context | None = None) -> torch.optim.Optimizer:
        given, made, quantised = as_groups(groups), [], {}
        for group in given:
            coded = group.options.get("quantised", {})
            for name, param in group.params.items():
                if name.removesuffix(".weight") in coded:
                    quantised[param] = coded[name.removesuffix(".weight")]
            for part in torch_groups([group], self.lr):
                if coded:
                    part |= {"lr_scale": part["lr_scale"] * self.code_lr / self.lr, "betas": tuple(self.code_betas)}
                    part["lr"] = self.lr * part["lr_scale"]
                made.append(part)
        settings = {"decay": self.delta_decay, "share": self.max_change, "beam": self.beam, "force": self.force, "trust": self.trust,
                    "temperature": self.temperature, "seed": ctx.seed if ctx else 0}  # fmt: skip
        return PVOptimizer(made, quantised, settings, self.lr, self.betas, self.eps, self.lamb)  # type: ignore[arg-type]  # parameters are tensors

    def after_step(self, step: Any, ctx: Context | None) -> None:
        optimizer = step.optimizer
        if isinstance(optimizer, PVOptimizer) and optimizer.quantised and ctx is not None:
            total = sum(q.groups for q in optimizer.quantised.values())
            ctx.log(**{"pv/codes_changed": optimizer.changed / max(1, total), "pv/delta_decay": self.delta_decay})


class PVOptimizer(PerTensor):
    """The update of `PVTuning`. Codes, codebooks and scales are modules of the model's; the state is moments and buffers."""

    moves_codes = True

    def __init__(self, groups: Any, quantised: dict[Tensor, VectorQuant], settings: dict[str, Any], lr: float, betas: tuple[float, float], eps: float, lamb: bool) -> None:
        super().__init__(groups, {"lr": lr, "betas": tuple(betas), "eps": eps, "lamb": lamb})
        self.quantised, self.settings, self.changed = quantised, settings, 0
        self.number = {param: i for i, param in enumerate(quantised)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Plain weights and codebooks first (P), then the codes, given the new values (V)."""
        self.changed, coded = 0, []
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None and param not in self.quantised:
                    param.add_(self._update(param, param, group))
                elif param.grad is not None:
                    coded.append((param, group))
        for param, group in coded:
            self._recode(param, group)

    def _update(self, param: Tensor, at: Tensor, group: dict[str, Any]) -> Tensor:
        """What is added to `at`, the parameter or its buffer, for the parameter's gradient."""
        state, grad = self.state[param], param.grad
        assert grad is not None
        one, two = group["betas"]
        state["step"] = state.get("step", 0) + 1
        v = state.setdefault("exp_avg_sq", torch.zeros_like(param))
        v.mul_(two).addcmul_(grad, grad, value=1 - two)
        if one:
            m = state.setdefault("exp_avg", torch.zeros_like(param))
            m.mul_(one).add_(grad, alpha=1 - one)
        else:
            m = grad
        update = m / (v.sqrt() + group["eps"])
        size, own = update.norm(), at.norm()
        ratio = own / size if group["lamb"] and float(size) > 0 and float(own) > 0 else 1.0
        correction = math.sqrt(1 - two ** state["step"]) / (1 - one ** state["step"])
        return update * (-group["lr"] * correction * ratio)

    def _recode(self, param: Tensor, group: dict[str, Any]) -> None:
        """The V step of one matrix. `param` is what the codes said before the P step."""
        quant, state, how = self.quantised[param], self.state[param], self.settings
        start = param.detach() if how["decay"] == 1 else state.setdefault("buffer", param.detach().clone())
        reference = start + self._update(param, start, group)
        beam = how["beam"] or (1 if len(quant.codebooks) == 1 else 5)
        drawn = torch.Generator().manual_seed(seed_of(how["seed"], "pv-tuning", state["step"], self.number[param]))
        self.changed += pv_tuning(quant, reference, how["share"], beam, how["force"], how["trust"], how["temperature"], drawn)
        param.copy_(quant())
        if how["decay"] < 1:
            state["buffer"] = (1 - how["decay"]) * reference + how["decay"] * param
