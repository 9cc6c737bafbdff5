"""log p of given tokens under a linear head, a block of the vocabulary at a time.

The logits of a block live only until their largest value, the sum of their exponentials and the exponentials' mean of the head's rows are
known; what was summed before shrinks when a larger logit comes (as attention does it over keys). So [tokens x vocabulary] never
exists, and what does stays in the processor's cache. Under a frozen head the gradient of the
hidden states, W_y - sum_v p_v W_v, is at hand after the forward pass; where the head trains, the backward pass makes each block anew.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.core.lean import again

BLOCK = 4096
"""Rows of the head at a time."""


def head_logp(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, scale: float = 1.0) -> Tensor:
    """log softmax(scale (W h + bias))[target] of [n, d] hidden states, in fp32."""
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    return _HeadLogProb.apply(hidden, weight, bias, target, scale, dtype)  # type: ignore[no-any-return, no-untyped-call]


class _HeadLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        ctx.scale, ctx.dtype = scale, dtype
        ctx.ready = ctx.needs_input_grad[0] and not any(ctx.needs_input_grad[1:3])
        flat = hidden.detach().to(dtype)
        top = torch.full((len(flat), 1), torch.finfo().min, device=flat.device)  # finite: a block of impossible tokens may come first
        total, picked = torch.zeros_like(top), torch.zeros_like(top)
        mean = torch.zeros(flat.shape, device=flat.device) if ctx.ready else None
        for start, w, b in _blocks(weight, bias, dtype):
            logits = _logits(flat, w, b, scale)
            at, inside = _places(target, start, len(w))
            picked = torch.where(inside, logits.gather(1, at), picked)
            larger = torch.maximum(top, logits.amax(-1, keepdim=True))
            shrink = (top - larger).exp_()
            share = logits.sub_(larger).exp_()
            total.mul_(shrink).add_(share.sum(-1, keepdim=True))
            if mean is not None:
                mean.mul_(shrink).add_(share.to(dtype) @ w)
            top = larger
        norm = total.log().add_(top)
        direction = None if mean is None else (weight[target] - mean.div_(total)).mul_(scale).to(hidden.dtype)
        ctx.save_for_backward(hidden, weight, bias, target, norm, direction)
        return (picked - norm)[:, 0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), (hidden, weight, bias, target, norm, direction) = grads, ctx.saved_tensors
        if torch.is_grad_enabled():
            usual = functools.partial(_usual, ctx.scale, ctx.dtype, target)
            return *again(ctx, (hidden, weight, bias), usual, grad), None, None, None
        if direction is not None:
            return direction * grad[:, None].to(direction.dtype), None, None, None, None, None
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        flat, grad = hidden.to(ctx.dtype), grad[:, None] * ctx.scale
        back = torch.zeros(flat.shape, device=flat.device) if of_hidden else None
        rows, entries = torch.empty_like(weight) if of_weight else None, torch.empty_like(bias) if of_bias else None
        for start, w, b in _blocks(weight, bias, ctx.dtype):
            share = _logits(flat, w, b, ctx.scale).sub_(norm).exp_().mul_(-grad)
            at, inside = _places(target, start, len(w))
            share.scatter_add_(1, at, torch.where(inside, grad, 0.0))
            of_logits = share.to(ctx.dtype)
            if back is not None:
                back.add_(of_logits @ w)
            if rows is not None:
                rows[start : start + len(w)] = of_logits.t() @ flat
            if entries is not None:
                entries[start : start + len(w)] = share.sum(0)
        return None if back is None else back.to(hidden.dtype), rows, entries, None, None, None


def _blocks(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Where each block of the head begins, its rows and its biases."""
    for start in range(0, len(weight), BLOCK):
        yield start, weight[start : start + BLOCK].to(dtype), None if bias is None else bias[start : start + BLOCK].to(dtype)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    logits = F.linear(hidden, weight, bias).float()
    return logits if scale == 1.0 else logits.mul_(scale)


def _places(target: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """[n, 1] each: a target's column in a block (any, where it is in another), and whether it is in this one."""
    at = (target - start)[:, None]
    return at.clamp(0, size - 1), (at >= 0) & (at < size)


def _usual(scale: float, dtype: torch.dtype, target: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same through whole rows of logits."""
    logits = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).float() * scale
    return logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(-1)
