"""Edits of a torch optimizer while it runs: supports move, layers freeze and thaw, code books are replaced.

A torch optimizer keeps for every parameter a dict of state: a step count and, for each entry of the parameter, moments
(`exp_avg`, `exp_avg_sq`, `momentum_buffer`, row and column covers ...). `edit_optimizer(optimizer)` changes them by entry, so that
a method that moves its trainable entries keeps exact moments for those that stay and stated ones for those that come.

Per-entry age: an entry that joins at step 300 must not be bias corrected as if it had been averaged 300 times. `seed` therefore
stores an `age` beside Adam's moments (how many updates they hold) and `correct`, called after every optimizer step, replaces the
change of the entries whose age differs from Adam's own count by the change that Adam with their age would have made.
`age` lives in the optimizer's state, hence in its checkpoints.
(Entries that must not move at all: `core.sparse.UpdateFilter`.)
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def rewind(optimizer: Any) -> Iterator[dict[Tensor, Tensor]]:
    """Try steps and take them back: weights, moments and counts of all that the optimizer holds are afterwards what they were, bit for bit.

    Yields the weights as they were, by parameter. Restoring weights alone would leave the trial's gradient in the moments."""
    inner = getattr(optimizer, "optimizer", optimizer)
    weights = {p: p.detach().clone() for group in inner.param_groups for p in group["params"]}
    state = {p: {k: v.clone() if isinstance(v, Tensor) else copy.deepcopy(v) for k, v in held.items()} for p, held in inner.state.items()}
    try:
        yield weights
    finally:
        with torch.no_grad():
            for p, old in weights.items():
                p.copy_(old)
        inner.state.clear()
        inner.state.update(state)


def edit_optimizer(optimizer: Any) -> Editor:
    """An editor of the optimizer's state. Wrappers with an `optimizer` attribute (Accelerate's) are looked through."""
    return Editor(getattr(optimizer, "optimizer", optimizer))


class Editor:
    """See the module. Every method does nothing for a parameter that has no state yet, unless it says otherwise."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    # reading ------------------------------------------------------------------------------------------------------------
    def group(self, param: Tensor) -> dict[str, Any]:
        """The parameter group that `param` is in."""
        for group in self.optimizer.param_groups:
            if any(p is param for p in group["params"]):
                return group
        raise KeyError("The optimizer does not hold this parameter.")

    def state(self, param: Tensor) -> dict[str, Any]:
        """The parameter's state; empty if it was never stepped."""
        return self.optimizer.state.get(param, {})

    def entries(self, param: Tensor) -> dict[str, Tensor]:
        """The state tensors that hold one number for every entry of the parameter."""
        return {k: v for k, v in self.state(param).items() if isinstance(v, Tensor) and v.shape == param.shape and k != "step"}

    def steps(self, param: Tensor) -> int:
        """How often the parameter was stepped, as far as the optimizer counts."""
        return int(self.state(param).get("step", 0))

    def is_adam(self, param: Tensor) -> bool:
        """Whether the parameter's state is Adam's."""
        return {"exp_avg", "exp_avg_sq", "step"} <= set(self.state(param))

    # editing ------------------------------------------------------------------------------------------------------------
    def reset(self, params: Iterable[Tensor]) -> None:
        """Forget all state of some parameters: their next step is their first."""
        for param in params:
            self.optimizer.state.pop(param, None)

    @torch.no_grad()
    def clear(self, param: Tensor, index: Tensor) -> None:
        """Zero the moments of some entries (`index` into the flattened parameter)."""
        for value in self.entries(param).values():
            value.view(-1)[index] = 0

    @torch.no_grad()
    def move(self, param: Tensor, order: Tensor) -> None:
        """Entry i of the state becomes what entry `order[i]` was: call it with the permutation that the parameter underwent."""
        for value in self.entries(param).values():
            value.copy_(value.flatten()[order].view_as(value))

    @torch.no_grad()
    def seed(self, param: Tensor, index: Tensor, m: Tensor | float = 0.0, v: Tensor | float = 0.0, age: Tensor | float = 0.0) -> None:
        """Give some entries Adam moments `m`, `v` that hold `age` updates.

        Other optimizers' moments of these entries are zeroed (there is no general meaning of `m` and `v` for them)."""
        if not self.is_adam(param):
            self.clear(param, index)
            return
        state = self.state(param)
        if "age" not in state:
            state["age"] = torch.full_like(param, float(state["step"]), dtype=torch.float32)
            state["age_step"] = float(state["step"])
        for key, value in (("exp_avg", m), ("exp_avg_sq", v), ("age", age)):
            flat = state[key].view(-1)
            flat[index] = value.to(flat) if isinstance(value, Tensor) else torch.as_tensor(value).to(flat)

    @torch.no_grad()
    def correct(self, param: Tensor) -> None:
        """After an optimizer step: let every entry have moved as Adam of its own age moves it, then let the ages grow by one.

        Does nothing where no entry was ever seeded, and where the step left the parameter out (its count did not rise)."""
        state = self.state(param)
        if "age" not in state or not self.is_adam(param):
            return
        step = float(state["step"])
        if step == state["age_step"]:
            return
        state["age_step"] = step
        age = state["age"].add_(1.0)
        other = (age != step).view(-1).nonzero()[:, 0]
        if not len(other):
            return
        group = self.group(param)
        betas, eps, lr = group["betas"], group["eps"], float(group["lr"])
        m, v, a = (state[k].view(-1)[other].float() for k in ("exp_avg", "exp_avg_sq", "age"))
        wanted = adam_change(m, v, a, lr, betas, eps)
        made = adam_change(m, v, torch.full_like(a, step), lr, betas, eps)
        param.view(-1)[other] += (wanted - made).to(param.dtype)

    def swap(self, old: nn.Parameter, new: nn.Parameter, keep: bool = False) -> None:
        """Put another parameter object in the place of one; its state is dropped, or kept if the shapes agree and `keep`."""
        group = self.group(old)
        group["params"] = [new if p is old else p for p in group["params"]]
        state = self.optimizer.state.pop(old, None)
        if keep and state is not None and old.shape == new.shape:
            self.optimizer.state[new] = state


def adam_change(m: Tensor, v: Tensor, age: Tensor, lr: float, betas: tuple[float, float], eps: float) -> Tensor:
    """The change that Adam makes to entries whose moments hold `age` updates (age >= 1), by torch's placement of eps:

    -lr * m / (1 - beta1^age) / (sqrt(v / (1 - beta2^age)) + eps)."""
    one, two = 1 - betas[0] ** age, 1 - betas[1] ** age
    return -lr * (m / one) / ((v / two).sqrt() + eps)
