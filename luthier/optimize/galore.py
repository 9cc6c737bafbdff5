"""GaLore: Adam on low-rank projected gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from luthier.catalog import register
from luthier.optimize import Optimizer, as_groups, torch_groups
from luthier.optimize._shared import PerTensor, refuse

if TYPE_CHECKING:
    from luthier.core.context import Context

Kind = Literal["std", "reverse_std", "left", "right", "full"]


def basis(grad: Tensor, rank: int, kind: Kind = "std") -> tuple[Tensor | None, Tensor | None]:
    """The leading singular vectors of a gradient (m x n): (left [m, r], right [n, r]), the side that is not used None.

    std: right if m >= n, else left (the smaller side is projected, so the moments are [max, r]); reverse_std: the other one."""
    u, _, vh = torch.linalg.svd(grad.float(), full_matrices=False)
    tall = grad.shape[0] >= grad.shape[1]
    sides = {"std": (not tall, tall), "reverse_std": (tall, not tall), "left": (True, False), "right": (False, True), "full": (True, True)}
    left, right = sides[kind]
    return (u[:, :rank].contiguous() if left else None, vh[:rank].T.contiguous() if right else None)


def project(grad: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """P^T G, G Q or P^T G Q."""
    low = grad if left is None else left.T.to(grad) @ grad
    return low if right is None else low @ right.to(grad)


def galore(low: Tensor, left: Tensor | None, right: Tensor | None, scale: float = 1.0) -> Tensor:
    """A low-rank update in the weight's own space: scale * P R, R Q^T or P R Q^T. Its rank is at most the basis's."""
    full = low if left is None else left.to(low) @ low
    return scale * (full if right is None else full @ right.T.to(low))


@register("galore", paper=77)
@dataclass
class GaLore(Optimizer):
    """Adam whose moments live on the gradient projected to its leading singular directions: full-parameter training with the
    optimizer memory of a low rank.

    For a matrix gradient G (m x n), every `refresh` of its own steps: P = the top-r right singular vectors of G if m >= n, else
    the left ones. R = G P (or P^T G); m, v = Adam's moments of R; W <- W - lr sqrt(1 - b2^t) / (1 - b1^t) * scale * back(m /
    (sqrt(v) + eps)). Vectors, embeddings and heads use plain Adam of the same form. A parameter without gradient is left out and
    its count stands still, so a basis is refreshed only while its layer is active.

    Old moments refer to the old basis after a refresh; the authors keep them as they are (`moments: keep`), `reset` drops them.
    Defaults: the release's (eps 1e-6, refresh 200 there, 100 in OwLore, whose optimizer this is; rank 128 there, OwLore 256)."""

    lr: float = 3e-4
    """Peak learning rate."""
    rank: int = 128
    """Rank of the projection."""
    refresh: int = 100
    """Steps between two decompositions of a gradient."""
    scale: float = 1.0
    """Factor on the projected update (0.25 in GaLore's pre-training runs)."""
    projection: Literal["std", "reverse_std", "left", "right", "full"] = "std"
    """Which side is projected."""
    moments: Literal["keep", "reset"] = "keep"
    """What happens to the moments when the basis changes."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates."""
    eps: float = 1e-6
    """Against division by zero."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices, applied after the step."""

    parallel = frozenset({"single", "ddp"})

    def __post_init__(self) -> None:
        refuse(not self.lr > 0, "lr", self.lr, "above 0")
        refuse(self.rank < 1, "rank", self.rank, "1 or more")
        refuse(self.refresh < 1, "refresh", self.refresh, "1 or more")
        kinds = ("std", "reverse_std", "left", "right", "full")
        refuse(self.projection not in kinds, "projection", self.projection, f"one of {', '.join(kinds)}")
        refuse(self.moments not in ("keep", "reset"), "moments", self.moments, "'keep' or 'reset'")
        refuse(not all(0 <= b < 1 for b in self.betas), "betas", self.betas, "two numbers of [0, 1)")

    def build(self, groups: Iterable[Any], ctx: Context | None = None) -> torch.optim.Optimizer:
        settings = {"rank": self.rank, "refresh": self.refresh, "scale": self.scale, "projection": self.projection, "moments": self.moments}
        made = []
        for group in torch_groups(as_groups(groups), self.lr, self.weight_decay):
            low = [projected(n, p, group["role"]) for n, p in zip(group["names"], group["params"])]
            for chosen in (True, False):
                params = [p for p, is_low in zip(group["params"], low) if is_low == chosen]
                names = [n for n, is_low in zip(group["names"], low) if is_low == chosen]
                if params:
                    made.append({**group, "params": params, "names": names, **(settings if chosen else {})})
        return GaLoreAdamW(made, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)


def projected(name: str, param: Tensor, role: str) -> bool:
    """Matrices of blocks and adapters are projected; embeddings, heads and what routes or prompts are not."""
    words = ("embed", "lm_head", "wte", "wpe", "classifier", "router")
    return param.ndim == 2 and role not in ("embedding", "head", "prompt", "router") and not any(w in name for w in words)


class GaLoreAdamW(PerTensor):
    """The update of `GaLore`; groups with a `rank` are projected. The whole state is tensors and numbers."""

    def __init__(self, params: Any, lr: float = 3e-4, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    def _move(self, param: Tensor, group: dict[str, Any]) -> None:
        state, grad = self.state[param], param.grad
        assert grad is not None
        low = "rank" in group
        fresh = low and state.get("step", 0) % group["refresh"] == 0
        if fresh:
            left, right = basis(grad, group["rank"], group["projection"])
            state |= {k: v.to(grad.dtype) for k, v in (("left", left), ("right", right)) if v is not None}
        left, right = state.get("left"), state.get("right")
        reduced = project(grad, left, right) if low else grad
        if "exp_avg" not in state or (fresh and group["moments"] == "reset"):
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(reduced), torch.zeros_like(reduced)
            state["held"] = 0
        state["step"] = state.get("step", 0) + 1
        state["held"] += 1
        one, two = group["betas"]
        m, v = state["exp_avg"], state["exp_avg_sq"]
        m.mul_(one).add_(reduced, alpha=1 - one)
        v.mul_(two).addcmul_(reduced, reduced, value=1 - two)
        update = m / (v.sqrt() + group["eps"])
        if low:
            update = galore(update, left, right, group["scale"])
        param.add_(update, alpha=-group["lr"] * math.sqrt(1 - two ** state["held"]) / (1 - one ** state["held"]))
        if group["weight_decay"] > 0:
            param.add_(param, alpha=-group["lr"] * group["weight_decay"])
