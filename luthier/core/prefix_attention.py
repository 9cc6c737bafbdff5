"""Attention of sequences that begin alike, on a CPU, with keys and values of the beginning in place.

What a token sees falls into two: its own sequence's tokens (plain causal rows) and the beginning that other sequences have computed (all
of it, so no mask is needed, and all sequences behind it ask together). The two softmaxes are joined by their log-sum-exps:

    lse = log(exp(lse_1) + exp(lse_2)),    out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2.

Given the joint `out` and `lse`, the backward pass of either part alone is already its share of the whole gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Place = slice | Tensor
"""Flat positions in the bins; neighbours as a slice, which copies nothing."""
CALL = 60_000
"""Pairs of a query and a key of a beginning that are worth a call of their own; of fewer, keys and values are copied faster."""


@dataclass
class Own:
    """Rows of a sequence's own tokens each, right padded."""

    rows: Place
    """[rows * length] positions, padding pointing at the first."""
    count: int
    real: Tensor | None
    """Which of them are tokens; None: all."""
    places: Place
    """The positions of those that are."""


@dataclass
class Beginning:
    """Tokens that several sequences begin with, and all those behind it."""

    queries: Place
    keys: Place


@dataclass
class SharedPrefixes:
    """How the bins fall into parts."""

    own: list[Own]
    beginnings: list[Beginning]

    @classmethod
    def of(cls, roots: Sequence[tuple[int, np.ndarray]], branches: Sequence[tuple[int, np.ndarray]]) -> SharedPrefixes | None:
        """Of paths as flat positions, each with how many of its tokens an earlier one has computed; None where the beginnings are small."""
        behind: dict[bytes, list[tuple[int, np.ndarray]]] = {}
        for known, path in branches:
            behind.setdefault(path[:known].tobytes(), []).append((known, path))
        if not behind or sum(known * (len(path) - known) for known, path in branches) < CALL * len(behind):
            return None
        own = [_own([path[known:] for known, path in kind]) for kind in (roots, branches)]
        beginnings = [Beginning(_place(np.concatenate([path[n:] for n, path in kind])), _place(kind[0][1][: kind[0][0]])) for kind in behind.values()]
        return cls(own, beginnings)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """[bins, heads, length, d] each, keys and values of fewer heads perhaps, to [bins, length, heads, d]."""
        return _Attention.apply(query, key, value, scale, self)


def possible(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether the kernel that tells its log-sum-exp may be called by hand."""
    from luthier.core.lean import watched

    alike = query.device.type == "cpu" and query.dtype == key.dtype == value.dtype and query.shape[-1] == value.shape[-1]
    return alike and not dropout and torch.backends.cuda.flash_sdp_enabled() and not watched()


def _own(paths: list[np.ndarray]) -> Own:
    longest = max(len(path) for path in paths)
    rows, real = np.zeros((len(paths), longest), dtype=np.int64), np.zeros((len(paths), longest), dtype=bool)
    for i, path in enumerate(paths):
        rows[i, : len(path)], real[i, : len(path)] = path, True
    return Own(_place(rows.reshape(-1)), len(paths), None if real.all() else torch.from_numpy(real.reshape(-1)), _place(rows[real]))


def _place(index: np.ndarray) -> Place:
    if len(index) and (np.diff(index) == 1).all():
        return slice(int(index[0]), int(index[-1]) + 1)
    return torch.from_numpy(np.ascontiguousarray(index))


def _at(x: Tensor, place: Place) -> Tensor:
    """[heads, positions, ...] at a place."""
    return x[:, place] if isinstance(place, slice) else x.index_select(1, place)


def _put(x: Tensor, place: Place, values: Tensor, add: bool = False) -> None:
    if isinstance(place, slice):
        there = x[:, place]
        there.add_(values) if add else there.copy_(values)
    elif add:
        x.index_add_(1, place, values)
    else:
        x.index_copy_(1, place, values)


def _rows(x: Tensor, own: Own, times: int = 1) -> Tensor:
    """[heads, positions, ...] as [rows, heads * times, length, ...]."""
    found = _at(x, own.rows).unflatten(1, (own.count, -1)).transpose(0, 1)
    return found.repeat_interleave(times, 1) if times > 1 else found


def _flat(x: Tensor, own: Own, times: int = 1) -> Tensor:
    """Back again, tokens alone; of heads that were repeated the sum."""
    found = x.transpose(0, 1)
    if times > 1:
        found = found.unflatten(0, (-1, times)).sum(1)
    found = found.flatten(1, 2)
    return found if own.real is None else found[:, own.real]


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[heads, n, ...] as [groups, heads / groups, n, ...]: query heads beside those that read the same keys."""
    return x.unflatten(0, (-1, groups)).transpose(0, 1)


def _flattened(x: Tensor) -> Tensor:
    """[bins, heads, length, d] as [heads, positions, d]."""
    return x.transpose(0, 1).flatten(1, 2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float | None, parts: SharedPrefixes) -> Tensor:
        bins, heads, length, d = query.shape
        q, k, v = _flattened(query), _flattened(key), _flattened(value)
        groups, call = heads // len(k), torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = q.new_zeros(heads, bins * length, d), q.new_zeros(heads, bins * length, dtype=torch.promote_types(q.dtype, torch.float32))
        for own in parts.own:
            found, sums = call(_rows(q, own), _rows(k, own, groups), _rows(v, own, groups), 0.0, True, scale=scale)
            _put(out, own.places, _flat(found, own))
            _put(lse, own.places, _flat(sums, own))
        for one in parts.beginnings:
            asked = _grouped(_at(q, one.queries), groups)
            found, sums = call(asked, *(_at(t, one.keys).expand(groups, -1, -1, -1) for t in (k, v)), 0.0, False, scale=scale)
            first, before = _grouped(_at(out, one.queries), groups), _grouped(_at(lse, one.queries), groups)
            both = torch.logaddexp(before, sums)
            joint = (first * (before - both).exp_().unsqueeze(-1)).addcmul_(found, (sums - both).exp_().unsqueeze(-1).to(found.dtype))
            _put(out, one.queries, joint.transpose(0, 1).flatten(0, 1))
            _put(lse, one.queries, both.transpose(0, 1).flatten(0, 1))
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.scale, ctx.parts = scale, parts
        return out.unflatten(1, (bins, length)).permute(1, 2, 0, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, out, lse = ctx.saved_tensors
        grad = grads[0].permute(2, 0, 1, 3).flatten(1, 2)
        q, k, v = _flattened(query), _flattened(key), _flattened(value)
        groups, call = len(q) // len(k), torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        of_q, of_k, of_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for own in ctx.parts.own:
            asked = _rows(grad, own)
            if own.real is not None:
                asked = asked * own.real.view(own.count, 1, -1, 1)
            found = call(asked, _rows(q, own), _rows(k, own, groups), _rows(v, own, groups), _rows(out, own), _rows(lse, own), 0.0, True, scale=ctx.scale)
            for into, part, times in zip((of_q, of_k, of_v), found, (1, groups, groups)):
                _put(into, own.places, _flat(part, own, times))
        for one in ctx.parts.beginnings:
            asked, above, known, sums = (_grouped(_at(t, one.queries), groups) for t in (q, grad, out, lse))
            keys, values = (_at(t, one.keys).expand(groups, -1, -1, -1) for t in (k, v))
            dq, dk, dv = call(above, asked, keys, values, known, sums, 0.0, False, scale=ctx.scale)
            _put(of_q, one.queries, dq.transpose(0, 1).flatten(0, 1), add=True)
            _put(of_k, one.keys, dk.sum(0), add=True)
            _put(of_v, one.keys, dv.sum(0), add=True)
        bins = len(query)
        return *(t.unflatten(1, (bins, -1)).transpose(0, 1) for t in (of_q, of_k, of_v)), None, None
