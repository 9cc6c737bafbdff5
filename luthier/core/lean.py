"""The same layers with fewer passes over memory: root-mean-square norms, gated feed-forward layers, and LoRA's additions.

They multiply little, but they keep much for the backward pass: SFT of SmolLM2 with LoRA holds 40 % less without it. Inside `lean(network)` every module
whose forward pass is known word for word computes in one autograd node, which keeps its inputs and makes the rest anew: a norm keeps
x and one number a token, a gated layer keeps x, gate and up, a LoRA layer keeps x and A x. Under autocast products are made in its
type, as they would be, but casts of weights are made again and not kept. Wherever somebody looks on (hooks, function modes, functorch)
or a part is of another kind, the usual path is taken; so nothing else needs to know.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as modules
from torch.overrides import _get_current_function_mode_stack


@contextmanager
def lean(network: nn.Module) -> Iterator[None]:
    """Inside, the known modules of a network take the short path; they are of their own classes again afterwards."""
    changed: list[tuple[nn.Module, Any]] = []
    for module in network.modules():
        usual: Any = type(module)
        short = _short_class(usual)
        if short is not None:
            changed.append((module, usual))
            module.__class__ = short
    try:
        yield
    finally:
        for module, usual in changed:
            module.__class__ = usual


@functools.cache
def _short_class(usual: Any) -> type | None:
    """A subclass with the short forward pass; None where a class is not known."""
    from peft.tuners.lora.layer import Linear
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

    if usual is Linear:
        kind: type = _Lora
    elif _same_forward(usual, LlamaRMSNorm):
        kind = _RMSNorm
    elif _same_forward(usual, LlamaMLP):
        kind = _Gated
    else:
        return None
    return type(usual.__name__, (kind, usual), {"__module__": usual.__module__, "__doc__": usual.__doc__})


def _same_forward(one: Any, other: Any) -> bool:
    """Many architectures have their layers word for word from Llama's."""
    if one is other or getattr(one, "forward", None) is other.forward:
        return True
    if not issubclass(one, nn.Module) or (one.__name__.removesuffix("RMSNorm") == one.__name__ and one.__name__.removesuffix("MLP") == one.__name__):
        return False
    try:
        return inspect.getsource(one.forward) == inspect.getsource(other.forward)
    except (OSError, TypeError):
        return False


# -- who may take the short path -------------------------------------------------------------------------------------------------
def watched() -> bool:
    """Somebody replaces or records what tensors do, or asks for derivatives that only the usual path has."""
    return bool(
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or _get_current_function_mode_stack()
        or torch.compiler.is_compiling()
        or modules._global_forward_hooks or modules._global_forward_pre_hooks or modules._global_backward_hooks or modules._global_backward_pre_hooks
    )  # fmt: skip


def _products_in(x: Tensor, tensors: Iterable[Tensor | None]) -> torch.dtype | None:
    """The type that products of x are made in: autocast's, or that of all tensors; None where it is not clear."""
    kinds, device = {x.dtype, *(t.dtype for t in tensors if t is not None)}, x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device) if kinds <= _CAST else None
    return x.dtype if len(kinds) == 1 else None


_CAST = {torch.float32, torch.bfloat16, torch.float16}
"""What autocast casts."""


def hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


class Factors(NamedTuple):
    """x -> W x + bias + scale B A x."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    scale: float

    def to(self, dtype: torch.dtype) -> Factors:
        """In the type of the products."""
        return Factors._make((*(None if t is None else t.to(dtype) for t in self[:4]), self.scale))

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of [n, in]: the output, and A x."""
        out = F.linear(x, self.weight, self.bias)
        if self.a is None or self.b is None:
            return out, None
        inner = x @ self.a.t()
        return out.addmm_(inner, self.b.t(), alpha=self.scale), inner

    def backward(self, grad: Tensor, x: Any, inner: Tensor | None, wanted: Sequence[bool], into: Tensor | None = None) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradient of x (added to `into`), and those of the factors, where `wanted` (of x and of the four factors) says so."""
        of_x, of_weight, of_bias, of_a, of_b = wanted
        low = None if self.b is None or not (of_x or of_a) else (grad @ self.b).mul_(self.scale)
        back = None
        if of_x:
            back = grad @ self.weight if into is None else into.addmm_(grad, self.weight)
            if low is not None and self.a is not None:
                back.addmm_(low, self.a)
        return back, [
            grad.t() @ x if of_weight else None,
            grad.sum(0) if of_bias else None,
            low.t() @ x if of_a and low is not None else None,
            (grad.t() @ inner).mul_(self.scale) if of_b and inner is not None else None,
        ]


def plain_linear(module: Any) -> bool:
    """A plain linear layer in which nobody is interested."""
    return type(module) is nn.Linear and not hooked(module) and type(module.weight) in (nn.Parameter, Tensor)


def _factors(module: Any) -> Factors | None:
    """What a linear layer with or without one LoRA adapter computes; None where it does more than that."""
    if plain_linear(module):
        return Factors(module.weight, module.bias, None, None, 1.0)
    if not isinstance(module, _Lora) or hooked(module) or not plain_linear(module.base_layer):
        return None
    base, active = module.base_layer, [name for name in module.active_adapters if name in module.lora_A]
    if bool(module.merged) != bool(module.disable_adapters):  # in the weights already, or switched off
        return Factors(base.weight, base.bias, None, None, 1.0)
    if module.merged or len(active) != 1 or active[0] in module.lora_variant or _drops(module.lora_dropout[active[0]]):
        return None
    a, b = module.lora_A[active[0]], module.lora_B[active[0]]
    if not (plain_linear(a) and plain_linear(b)) or a.bias is not None or b.bias is not None:
        return None
    return Factors(base.weight, base.bias, a.weight, b.weight, float(module.scaling[active[0]]))


def _drops(module: nn.Module) -> bool:
    """Whether a dropout module does anything."""
    return hooked(module) or not (isinstance(module, nn.Identity) or (type(module) is nn.Dropout and (module.p == 0 or not module.training)))


def again(ctx: Any, inputs: Sequence[Any], usual: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients that have gradients themselves: through the usual operations, made once more."""
    wanted = [t for t, need in zip(inputs, ctx.needs_input_grad) if need and t is not None]
    found = iter(torch.autograd.grad(usual(*inputs).to(grad.dtype), wanted, grad, create_graph=True))
    return tuple(next(found) if need and t is not None else None for t, need in zip(inputs, ctx.needs_input_grad))


# -- norms ----------------------------------------------------------------------------------------------------------------------
class _RMSNorm(nn.Module):
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != torch.float32 or self.weight.dtype != torch.float32 or type(self.weight) is not nn.Parameter or watched():
            return super().forward(hidden_states)
        return _Norm.apply(hidden_states, self.weight, self.variance_epsilon)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        ctx.eps = eps
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), (x, weight, scale) = grads, ctx.saved_tensors
        if torch.is_grad_enabled():
            eps = ctx.eps
            return *again(ctx, (x, weight), lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)), grad), None
        of_x, of_weight = ctx.needs_input_grad[:2]
        back = None
        if of_x:
            inner = grad * weight
            along = torch.linalg.vecdot(inner, x).unsqueeze(-1).mul_(scale**3).div_(-x.shape[-1])
            back = inner.mul_(scale).addcmul_(x, along)
        return back, (grad * x).mul_(scale).flatten(0, -2).sum(0) if of_weight else None, None


# -- linear layers with LoRA --------------------------------------------------------------------------------------------------------
class _Lora(nn.Module):
    base_layer: Any
    lora_A: Any
    lora_B: Any
    lora_dropout: Any
    lora_variant: Any
    scaling: Any
    active_adapters: Any
    disable_adapters: Any
    merged: Any

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        factors = None if args or kwargs or watched() else _factors(self)
        dtype = None if factors is None or factors.a is None else _products_in(x, factors[:4])
        if factors is None or dtype is None:
            return super().forward(x, *args, **kwargs)
        return _LowRank.apply(x, *factors, dtype)


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *given: Any) -> Tensor:
        *parts, ctx.dtype = given
        ctx.scale = parts[4]
        out, inner = Factors._make(parts).to(ctx.dtype)(x.reshape(-1, x.shape[-1]).to(ctx.dtype))
        ctx.save_for_backward(x, *parts[:4], inner)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), (x, *parts, inner) = grads, ctx.saved_tensors
        factors = Factors._make((*parts, ctx.scale))
        if torch.is_grad_enabled():
            scale, dtype = ctx.scale, ctx.dtype
            return *again(ctx, (x, *parts), lambda x, *parts: _usual(x, Factors._make((*parts, scale)), dtype), grad), None, None
        flat = x.reshape(-1, x.shape[-1]).to(ctx.dtype)
        back, rest = factors.to(ctx.dtype).backward(grad.reshape(-1, grad.shape[-1]), flat, inner, ctx.needs_input_grad[:5])
        return *_like([x, *parts], [back, *rest]), None, None


def _usual(x: Tensor, factors: Factors, dtype: torch.dtype) -> Tensor:
    """The same by plain operations."""
    x, f = x.to(dtype), factors.to(dtype)
    out = F.linear(x, f.weight, f.bias)
    return out if f.a is None or f.b is None else out + F.linear(F.linear(x, f.a), f.b) * f.scale


def _like(tensors: Sequence[Tensor | None], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients in the shapes and types of what they are gradients of."""
    return [None if g is None or t is None else g.view_as(t).to(t.dtype) for t, g in zip(tensors, grads)]


# -- gated feed-forward layers -----------------------------------------------------------------------------------------------------
class _Gated(nn.Module):
    gate_proj: Any
    up_proj: Any
    down_proj: Any
    act_fn: Any

    def forward(self, x: Tensor) -> Tensor:
        parts: list[Factors] = []
        if not watched() and type(self.act_fn) in (nn.SiLU, _silu()) and not hooked(self.act_fn):
            found = (_factors(layer) for layer in (self.gate_proj, self.up_proj, self.down_proj))
            parts = [f for f in found if f is not None]
        tensors = [t for part in parts for t in part[:4]]
        dtype = _products_in(x, tensors) if len(parts) == 3 else None
        return super().forward(x) if dtype is None else _GatedLinear.apply(x, *tensors, tuple(part.scale for part in parts), dtype)


@functools.cache
def _silu() -> type:
    from transformers.activations import ACT2FN

    return type(ACT2FN["silu"])


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *given: Any) -> Tensor:
        *parts, ctx.scales, ctx.dtype = given
        gate, up, down = _three(parts, ctx.scales)
        flat = x.reshape(-1, x.shape[-1]).to(ctx.dtype)
        g, g_inner = gate.to(ctx.dtype)(flat)
        u, u_inner = up.to(ctx.dtype)(flat)
        out, d_inner = down.to(ctx.dtype)(F.silu(g).mul_(u))
        ctx.save_for_backward(x, *parts, g, u, g_inner, u_inner, d_inner)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), saved = grads, ctx.saved_tensors  # once: a checkpoint gives them out one time
        if torch.is_grad_enabled():
            return *again(ctx, saved[:13], functools.partial(_usual_gated, ctx.scales, ctx.dtype), grad), None, None
        x, given, (g, u, g_inner, u_inner, d_inner) = saved[0], saved[1:13], saved[13:]
        gate, up, down = _three(given, ctx.scales)
        of_x, need = ctx.needs_input_grad[0], ctx.needs_input_grad[1:13]
        flat, grad = x.reshape(-1, x.shape[-1]).to(ctx.dtype), grad.reshape(-1, grad.shape[-1])
        below = of_x or any(need[:8])
        active = F.silu(g) if below or any(need[8:]) else None
        h = active * u if active is not None and (need[8] or need[10]) else None
        of_h, of_down = down.to(ctx.dtype).backward(grad, h, d_inner, (below, *need[8:]))
        back, of_gate, of_up = None, [None] * 4, [None] * 4
        if of_h is not None and active is not None:
            of_gate_out = torch.ops.aten.silu_backward(of_h * u, g)
            back, of_up = up.to(ctx.dtype).backward(of_h.mul_(active), flat, u_inner, (of_x, *need[4:8]))  # type: ignore[assignment]
            back, of_gate = gate.to(ctx.dtype).backward(of_gate_out, flat, g_inner, (of_x, *need[:4]), into=back)  # type: ignore[assignment]
        return *_like([x, *given], [back, *of_gate, *of_up, *of_down]), None, None


def _three(tensors: Sequence[Any], scales: Sequence[float]) -> list[Factors]:
    return [Factors._make((*tensors[4 * i : 4 * i + 4], scale)) for i, scale in enumerate(scales)]


def _usual_gated(scales: Sequence[float], dtype: torch.dtype, x: Tensor, *tensors: Any) -> Tensor:
    gate, up, down = _three(tensors, scales)
    return _usual(F.silu(_usual(x, gate, dtype)) * _usual(x, up, dtype), down, dtype)
