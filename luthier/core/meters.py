"""Meters: what a computation cost, counted while it runs and not worked out from a configuration.

`Flops` counts floating-point operations of forward and backward passes (matrix products, convolutions, attention: what
`torch.utils.flop_counter` knows; what is done entry by entry counts nothing), `saved_bytes` the activations that autograd keeps,
`backward_costs` what the gradient of every single weight tensor costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


aten = torch.ops.aten
_COUNTS: dict[Any, Callable[..., Any]] = {
    **flop_registry,
    # torch counts attention's kernels of GPUs, and leaves out the one of CPUs
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def in_backward() -> bool:
    """Whether this is called from within a backward pass."""
    return torch._C._current_graph_task_id() != -1


class Flops(TorchDispatchMode):
    """`with Flops() as flops: ...` counts floating-point operations (a multiply-add is two); `.forward`, `.backward`, `.total`.

    What checkpointing computes again is part of the backward pass, in which it happens."""

    def __init__(self) -> None:
        super().__init__()
        self.forward, self.backward = 0, 0

    @property
    def total(self) -> int:
        return self.forward + self.backward

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = _COUNTS.get(getattr(func, "_overloadpacket", func))
        if count is not None:
            spent = int(count(*args, **kwargs, out_val=out))
            if in_backward():
                self.backward += spent
            else:
                self.forward += spent
        return out


# memory -----------------------------------------------------------------------------------------------------------------


@dataclass
class SavedBytes:
    """Bytes that autograd keeps for backward passes."""

    now: int = 0
    peak: int = 0
    held: dict[int, int] = field(default_factory=dict)
    """How often each storage is kept; the same one counts once."""

    def take(self, place: int, size: int) -> None:
        self.held[place] = self.held.get(place, 0) + 1
        if self.held[place] == 1:
            self.now += size
            self.peak = max(self.peak, self.now)

    def give(self, place: int, size: int) -> None:
        self.held[place] -= 1
        if not self.held[place]:
            del self.held[place]
            self.now -= size


class _Kept:
    """A tensor that a graph keeps; when the graph lets go of it, its bytes leave the meter."""

    def __init__(self, tensor: Tensor, meter: SavedBytes, weights: set[int]) -> None:
        self.tensor, self.meter = tensor, meter
        storage = tensor.untyped_storage()
        self.place, self.size = storage.data_ptr(), storage.nbytes()
        self.counts = self.place not in weights
        if self.counts:
            meter.take(self.place, self.size)

    def __del__(self) -> None:
        if self.counts:
            self.meter.give(self.place, self.size)


@contextmanager
def saved_bytes(*modules: nn.Module) -> Iterator[SavedBytes]:
    """`.now` and `.peak` bytes of the tensors that the graphs made inside keep for their backward passes.

    Whole storages, each once; parameters and buffers of `modules` do not count, as they are there anyway."""
    weights = {t.untyped_storage().data_ptr() for m in modules for t in (*m.parameters(), *m.buffers())}
    meter = SavedBytes()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: _Kept(t, meter, weights), lambda kept: kept.tensor):
        yield meter


# the price of each gradient -----------------------------------------------------------------------------------------------


@dataclass
class BackwardCosts:
    """Floating-point operations of a backward pass by weight tensor, in the order in which the error reaches them (the output first).

    With tensors m trained it costs `fixed` + the sum of their `dw` + the sum of `dy` of the tensors before the deepest of them."""

    names: list[str]
    dw: list[int]
    """To form the tensor's own gradient."""
    dy: list[int]
    """To pass the error on, from where this tensor is used to where the next one is."""
    forward: int
    """Of the forward pass."""
    backward: int
    """Of the backward pass with all these tensors trained."""
    fixed: int
    """Of `backward`, what any trained tensor needs: above the first of them, and what checkpointing computes again."""


@dataclass
class _Level:
    """A place along the pass: calls with the same input, which need the error from above and not from each other."""

    dw: dict[str, int] = field(default_factory=dict)
    dy: int = 0


class _Calls(TorchFunctionMode):
    """Notes every call of torch that a named parameter enters or that costs operations, and what its gradients cost."""

    def __init__(self, flops: Flops, params: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.flops, self.names = flops, {id(p): n for n, p in params.items()}
        self.levels: list[_Level] = []
        self.trace: list[tuple[Any, int]] = []
        """Every noted call of the first pass, with its level; later passes (micro-batches) go along it."""
        self.at = 0
        self.first: Any = None
        self.known: dict[int, int] = {}
        """The level of the calls that a tensor enters."""
        self.alive: list[Tensor] = []
        """What `known` is about; while a tensor is held, no other has its id."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = self.flops.forward
        out = func(*args, **kwargs)
        made = args[:1] if out is None else out  # written into the first argument
        if in_backward() or not any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves(made)):
            return out
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        mine = [t for t in tensors if id(t) in self.names]
        if (mine and func in _LOOKS) or (not mine and self.flops.forward == before):
            return out
        level = self._level(func, tensors, mine)
        if self.flops.forward > before:
            others = [t for t in tensors if t.requires_grad and id(t) not in self.names]
            level.dy += self._replay(func, args, kwargs, others)
        for t in mine:
            spent = self._replay(func, args, kwargs, [t]) if self.flops.forward > before else 0
            level.dw[self.names[id(t)]] = level.dw.get(self.names[id(t)], 0) + spent
        return out

    def _level(self, func: Any, tensors: list[Tensor], mine: list[Tensor]) -> _Level:
        call = (func, tuple(self.names[id(t)] for t in mine))
        if mine and self.first is None:
            self.first = call
        elif call == self.first:
            self.at = 0
            self.known.clear()
            self.alive.clear()
        self.at += 1
        if self.at <= len(self.trace) and self.trace[self.at - 1][0] == call:
            return self.levels[self.trace[self.at - 1][1]]
        enters = next((t for t in tensors if t.is_floating_point() and id(t) not in self.names), None)
        place = self.known.get(id(enters)) if enters is not None else None
        if place is None:
            place = len(self.levels)
            self.levels.append(_Level())
        if enters is not None and id(enters) not in self.known:
            self.known[id(enters)] = place
            self.alive.append(enters)
        if self.at > len(self.trace):
            self.trace.append((call, place))
        return self.levels[place]

    def _replay(self, func: Any, args: Any, kwargs: Any, wanted: list[Tensor]) -> int:
        """What the gradients with respect to these inputs alone cost: the call is made once more, and its backward pass counted."""
        if not wanted:
            return 0
        kept = self.flops.forward, self.flops.backward
        ids = {id(t) for t in wanted}
        inputs: list[Tensor] = []

        def own(t: Any) -> Any:
            if not isinstance(t, Tensor):
                return t
            new = t.detach()
            if id(t) in ids:
                inputs.append(new.requires_grad_())
            return new

        devices = [t.device for t in wanted[:1] if t.device.type == "cuda"]
        # hooks of its own, so that a checkpoint around the call does not count what the replay saves
        own_hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
        with torch.enable_grad(), torch.random.fork_rng(devices=devices), own_hooks:
            out = func(*tree_map(own, args), **tree_map(own, kwargs))
            outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
            torch.autograd.grad(outputs, inputs, [torch.ones_like(t) for t in outputs], allow_unused=True)
        spent = self.flops.backward - kept[1]
        self.flops.forward, self.flops.backward = kept
        return spent

    def result(self) -> BackwardCosts:
        deepest = {n: place for place, level in reversed(list(enumerate(self.levels))) for n in level.dw}
        dw = {n: sum(level.dw.get(n, 0) for level in self.levels) for n in deepest}
        names = sorted(deepest, key=lambda n: -deepest[n])  # stable: within a level in the order of its calls
        above = [sum(level.dy for level in self.levels[deepest[n] + 1 :]) for n in names]
        whole = sum(level.dy for level in self.levels)
        dy = [b - a for a, b in pairwise([*above, whole])]
        fixed = self.flops.backward - sum(dw.values()) - sum(dy)
        return BackwardCosts(names, [dw[n] for n in names], dy, self.flops.forward, self.flops.backward, fixed)


_TENSOR: Any = Tensor
_LOOKS = frozenset({_TENSOR.requires_grad.__get__, _TENSOR.requires_grad_, _TENSOR.grad.__get__, _TENSOR.data.__get__, _TENSOR.detach})
"""What is done to a parameter without using its value."""


@contextmanager
def backward_costs(params: Mapping[str, nn.Parameter]) -> Iterator[Callable[[], BackwardCosts]]:
    """Measure forward and backward passes inside, and what each of these parameters adds to them; call what it yields for the result.

    Every operation with a price is done once more for each of its gradients, so a measured pass takes two to three times as long.
    Calls with the same input (query, key and value; gate and up) do not wait for each other. Where a network is no chain apart from
    that (attention beside the feed-forward layer, products of two activations, two towers), the order of the calls stands for one and the
    sum is an upper bound."""
    with Flops() as flops, _Calls(flops, params) as calls:
        yield calls.result
