"""The processes of one run: which rows are whose, what they tell one another, and who writes.

A launcher (torchrun, accelerate launch) starts the same command several times; each process learns from its share of every batch,
and sums over all of them make the step the one that a single process would take. The first process alone prepares rows, measures
and writes. In a run of one process everything here does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from luthier.errors import RecipeError, TrainingError

T = TypeVar("T")
Mode = Literal["single", "ddp", "fsdp"]
BUCKET = 25 << 20
"""Bytes of gradients that are summed in one go."""

_alone = 0
_spreading = False


def launched() -> int:
    """How many processes a launcher started; 1 without one."""
    return max(1, int(os.environ.get("WORLD_SIZE") or 1))


def start() -> None:
    """Join the other processes of this run. The first thing a run does, and nothing if there is only one."""
    if launched() == 1 or dist.is_initialized():
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    # One process may measure or prepare rows for hours while the others wait; a launcher ends those whose peer died.
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(days=7))


def size() -> int:
    return 1 if _alone or not dist.is_initialized() else dist.get_world_size()


def rank() -> int:
    return 0 if size() == 1 else dist.get_rank()


def first() -> bool:
    """Whether this is the process that prepares, measures and writes."""
    return rank() == 0


@contextmanager
def alone() -> Iterator[None]:
    """Work of one process, during which it is a run of one: what it runs inside does not wait for the others."""
    global _alone
    _alone += 1
    try:
        yield
    finally:
        _alone -= 1


def mode(parallel: str, processes: int | None = None) -> Mode:
    """How a run of so many processes (default: this one) is spread out. `auto` is FSDP where `accelerate launch` was asked for it, else DDP."""
    if (processes or size()) == 1:
        return "single"
    if parallel == "auto":
        return "fsdp" if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true") else "ddp"
    return "fsdp" if parallel == "fsdp" else "ddp"


# -- telling one another -------------------------------------------------------------------------------------------------


def gather(value: T) -> list[T]:
    """Every process's value, in the order of ranks."""
    if size() == 1:
        return [value]
    found: list[Any] = [None] * size()
    with peers():
        dist.all_gather_object(found, value)
    return found


def from_first(value: T) -> T:
    """The first process's value."""
    if size() == 1:
        return value
    box = [value]
    with peers():
        dist.broadcast_object_list(box)
    return box[0]


def summed(values: dict[str, float]) -> dict[str, float]:
    """Numbers by name, added up over all processes."""
    if size() == 1:
        return values
    total: dict[str, float] = {}
    for part in gather(values):
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


def wait() -> None:
    """Until every process is here."""
    gather(None)


@contextmanager
def by_first() -> Iterator[bool]:
    """Work of the first process alone, True there; the others wait at the end, and hear if it failed."""
    if size() == 1:
        yield True
    elif first():
        try:
            with alone():
                yield True
        except BaseException as error:
            from_first(f"{type(error).__name__}: {error}")
            raise
        from_first(None)
    else:
        yield False
        if from_first(None) is not None:
            raise PeerFailed("The first process of this run failed; its message says why.")


class PeerFailed(TrainingError):
    """Another process failed; that one tells the user why."""


@contextmanager
def peers() -> Iterator[None]:
    """A lost connection, said in a sentence."""
    try:
        yield
    except RuntimeError as error:  # DistBackendError derives from it
        if not any(word in str(error) for word in ("onnection", "closed by peer", "NCCL", "gloo", "Gloo", "imed out")):
            raise
        raise PeerFailed("Another process of this run ended, so this one stops, too. Start the run again with --resume; it continues from the last checkpoint.") from error


def share(n: int) -> range:
    """Which of a batch's `n` rows are this process's."""
    return range(rank(), n, size())


# -- losses of the whole batch -------------------------------------------------------------------------------------------


@contextmanager
def spreading(on: bool) -> Iterator[None]:
    """All processes hold the same batch, and `spread` shares the work on it."""
    global _spreading
    before, _spreading = _spreading, on
    try:
        yield
    finally:
        _spreading = before


def spread(items: Sequence[Any], vectors: Callable[[Sequence[Any]], torch.Tensor]) -> torch.Tensor:
    """`vectors(items)`, one row an item. While `spreading`, each process computes those of its share and gets the others'.

    A gradient comes back to the process that computed the row, summed over what all processes made of it."""
    if size() == 1 or not _spreading:
        return vectors(items)
    mine = vectors([items[i] for i in share(len(items))] or items[:1])
    return _Everyones.apply(mine, len(items))  # type: ignore[no-any-return, no-untyped-call]


class _Everyones(torch.autograd.Function):
    """The rows of all processes, in the order of the items."""

    @staticmethod
    def forward(ctx: Any, mine: torch.Tensor, n: int) -> torch.Tensor:
        ctx.n, ctx.own, ctx.shape = n, len(share(n)), mine.shape
        padded = mine.new_zeros(-(-n // size()), *mine.shape[1:])
        padded[: ctx.own] = mine[: ctx.own]
        parts = [torch.empty_like(padded) for _ in range(size())]
        with peers():
            dist.all_gather(parts, padded)
        return torch.stack(parts, 1).flatten(0, 1)[:n]  # the k-th row of each process, in turn: as `share` deals them out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        grad = grad.contiguous()
        with peers():
            dist.all_reduce(grad)
        mine = grad.new_zeros(ctx.shape)
        mine[: ctx.own] = grad[rank() :: size()]
        return mine, None


# -- gradients and weights -----------------------------------------------------------------------------------------------


def sum_gradients(params: Sequence[torch.nn.Parameter]) -> None:
    """Add up the gradients of all processes. One that nobody has stays None, so that no optimizer moves its weight."""
    if size() == 1 or not params:
        return
    with peers():
        present = torch.tensor([p.grad is not None for p in params], dtype=torch.uint8, device=params[0].device)
        dist.all_reduce(present, dist.ReduceOp.MAX)
        shared = [p for p, some in zip(params, present.tolist()) if some]
        for p in shared:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        for bucket in _buckets([p.grad for p in shared if p.grad is not None]):
            flat = torch._utils._flatten_dense_tensors(bucket)
            dist.all_reduce(flat)
            for grad, whole in zip(bucket, torch._utils._unflatten_dense_tensors(flat, bucket)):
                grad.copy_(whole)


def _buckets(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Tensors of one type, about BUCKET bytes at a time."""
    waiting: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for t in tensors:
        mine = waiting.setdefault((t.dtype, t.device), [])
        mine.append(t)
        if sum(x.nbytes for x in mine) >= BUCKET:
            yield waiting.pop((t.dtype, t.device))
    yield from waiting.values()


def same_weights(tensors: Iterable[torch.Tensor]) -> None:
    """Let all processes begin with the first one's."""
    if size() > 1:
        with torch.no_grad(), peers():
            for tensor in tensors:
                dist.broadcast(tensor.data, 0)


def refuse(mode: Mode, plugins: Iterable[Any]) -> None:
    """Methods that several processes cannot share."""
    for plugin in plugins:
        able = modes(plugin)
        if mode not in able:
            other = "`train.parallel: ddp`" if "ddp" in able else "one process, without a launcher"
            raise RecipeError(f"{plugin.axis.capitalize()} '{plugin.name}' does not work in {size()} processes with {mode.upper()}; use {other}.")


def modes(plugin: Any) -> frozenset[str]:
    """In which modes a method, or its class, works: those it declares, less those its hooks rule out.

    A gradient that is taken as it appears is not yet everybody's.
    Processes that generate answers of their own would call sharded layers a different number of times."""
    from luthier.core.plugin import defines

    cls, able = plugin if isinstance(plugin, type) else type(plugin), frozenset(plugin.parallel)
    if defines(cls, "on_grad"):
        able -= {"ddp", "fsdp"}
    return able - {"fsdp"} if defines(cls, "rollout") else able
