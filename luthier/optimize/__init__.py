"""The axis `optimize`: how weights move."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from luthier.core.plugin import Group, Plugin

if TYPE_CHECKING:
    import torch

    from luthier.core.context import Context


class Optimizer(Plugin):
    """`build` makes a torch optimizer whose parameter groups carry `lr` and `lr_scale`; the engine sets `lr` each step.

    With `two_pass` the method drives the backward passes itself in `step`."""

    two_pass: ClassVar[bool] = False
    lr: float

    def build(self, groups: Iterable[Any], ctx: Context | None = None) -> torch.optim.Optimizer:
        raise NotImplementedError

    def step(self, optimizer: torch.optim.Optimizer, closure: Callable[..., Any], ctx: Context | None = None) -> Any:
        """`closure(rng="same"|"fresh", edit=None, grad=True)` evaluates the step's micro-batches and leaves the normalised
        gradient in `.grad`; it returns what the passes computed. Only for `two_pass`."""
        raise NotImplementedError


def as_groups(groups: Iterable[Any]) -> list[Group]:
    """Groups as given, or one group of plain parameters or (name, parameter) pairs."""
    given = list(groups)
    if all(isinstance(g, Group) for g in given):
        return given
    named = {}
    for i, item in enumerate(given):
        name, param = item if isinstance(item, tuple) else (str(i), item)
        named[name] = param
    return [Group("body", named)]


def torch_groups(groups: Iterable[Any], lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Parameter groups for torch. Vectors and scalars (norms, biases) do not decay, as is the custom."""
    made = []
    for group in as_groups(groups):
        decay = weight_decay if group.weight_decay is None else group.weight_decay
        for flat in (False, True):
            params = {n: p for n, p in group.params.items() if (p.ndim < 2) == flat}
            if params:
                made.append(
                    {
                        "params": list(params.values()), "names": list(params), "role": group.role, "lr": lr * group.lr_scale,
                        "lr_scale": group.lr_scale, "weight_decay": 0.0 if flat and group.weight_decay is None else decay,
                    }
                )  # fmt: skip
    return made
