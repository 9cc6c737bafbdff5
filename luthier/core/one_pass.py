"""torch's optimizers in one pass over memory; on a CPU they would go through all weights about ten times a step.

torch has these kernels (`fused`), but does not take them by itself on a CPU, and they do not look at strides: a transposed gradient
would be added to other weights than its own. So the tensors are looked at before every step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def one_pass(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The same optimizer with the same numbers but for rounding, faster. Other classes, and settings that somebody has made, stay as they are."""
    groups = [optimizer.defaults, *optimizer.param_groups]
    made = any(group.get(name) for group in groups for name in ("foreach", "fused", "capturable", "differentiable"))
    if type(optimizer) in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD) and not made:
        optimizer.register_step_pre_hook(_prepare)
    return optimizer


@torch.no_grad()
def _prepare(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        moving = [p for p in group["params"] if p.grad is not None]
        group["fused"] = all(_plain(p, optimizer.state.get(p, {})) for p in moving)
        for p in moving if group["fused"] else ():
            if p.grad.stride() != p.stride():
                p.grad = torch.empty_like(p).copy_(p.grad)
            if "step" in (state := optimizer.state.get(p, {})):
                state["step"] = state["step"].to(p.device)  # where an earlier step was not fused it is the CPU's


def _plain(p: Tensor, state: dict[str, Any]) -> bool:
    if p.grad is None or p.grad.layout != torch.strided or not p.is_floating_point() or p.device.type not in ("cpu", "cuda"):
        return False
    return all(t.is_contiguous() for t in (p, *state.values()) if isinstance(t, Tensor))
