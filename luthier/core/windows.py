"""Rows of a tensor in place of all of it, so that a merger whose formula goes entry by entry never holds a large tensor.

Inside `window(name, start, stop)` the sources at the bottom (files, state dicts, adapters) give rows [start, stop) of that one tensor,
and whatever is computed from them is about these rows. What needs the whole tensor (a threshold, a norm) reads it inside `whole()`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from torch import Tensor

BLOCK = 1 << 18
"""Entries of a block; a few blocks of as many models stay in the processor's cache."""


class Window(NamedTuple):
    """Rows [start, stop) of one tensor."""

    name: str
    start: int
    stop: int


_CURRENT: ContextVar[Window | None] = ContextVar("window", default=None)


@contextmanager
def window(name: str, start: int, stop: int) -> Iterator[None]:
    """Read only these rows of the tensor `name`; other tensors are read whole."""
    token = _CURRENT.set(Window(name, start, stop))
    try:
        yield
    finally:
        _CURRENT.reset(token)


@contextmanager
def whole() -> Iterator[None]:
    """Read whole tensors, whatever window is open around."""
    token = _CURRENT.set(None)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current(name: str) -> Window | None:
    """The window that is open on this tensor."""
    found = _CURRENT.get()
    return found if found is not None and found.name == name else None


def renamed(name: str, other: str, read: Callable[[str], Tensor]) -> Tensor:
    """Read `name` under the other name that it has elsewhere (a tied tensor's twin), with the window that is open on it."""
    found = current(name)
    if name == other or found is None:
        return read(other)
    with window(other, found.start, found.stop):
        return read(other)


def cut_out(name: str, tensor: Tensor) -> Tensor:
    """The rows of a whole tensor that are asked for."""
    found = current(name)
    return tensor if found is None else tensor[found.start : found.stop]


def shape_here(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of what is asked for, of a tensor of this shape."""
    found = current(name)
    return tuple(shape) if found is None else (found.stop - found.start, *shape[1:])


def offset(name: str, row: int) -> int:
    """Entries before what is asked for, in a tensor of which one row has `row`."""
    found = current(name)
    return 0 if found is None else found.start * row


def windows(name: str, shape: Sequence[int], block: int = BLOCK) -> list[Window]:
    """A tensor's rows in blocks of about `block` entries; nothing for one that is no larger than a block. A vector is one row."""
    size = math.prod(shape)
    if size <= block or len(shape) < 2 or shape[0] < 2:
        return []
    rows = max(1, block * shape[0] // size)
    return [Window(name, start, min(shape[0], start + rows)) for start in range(0, shape[0], rows)]
