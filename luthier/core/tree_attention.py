"""Attention of sequences that share tokens, without the square of a whole bin.

A bin of a forest needs a mask over all pairs of its tokens, though a token sees only those of its own sequences. So the bin is taken
apart for the attention alone: each sequence's own tokens (all but those that an earlier one has computed) look at the whole path up to
them. Sequences that begin a bin are plain causal rows; the others bring a mask of their own tokens by their paths. Keys and values of
shared tokens are copied for it (on a CPU not even that, see `prefix_attention`); everything else in the layer is still computed once.

transformers hands every layer the attention mask as it was given, so the mask carries the tree: `attach` puts it there, and the
function registered as "sdpa" finds it. Any other implementation reads the mask itself, which says the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.core.prefix_attention import SharedPrefixes, possible

if TYPE_CHECKING:
    from luthier.core.batch import TokenForest

WORTH = 4_000_000
"""Products a layer that must be saved before taking a bin apart is worth its copies."""


@dataclass
class Part:
    """Rows of queries by rows of keys, as flat positions in the bins."""

    queries: Tensor
    """[rows, q]"""
    keys: Tensor
    """[rows, k]"""
    mask: Tensor | None
    """[rows, 1, q, k] to be added to the scores; None: causal."""


@dataclass
class Tree:
    """A forest's attention in parts."""

    parts: list[Part]
    place: Tensor
    """For each flat position in the bins where the parts' outputs, one after the other, hold its output. Padding points anywhere."""
    prefixes: SharedPrefixes | None = None
    """The same without copies or masks, where that is possible."""

    @classmethod
    def of(cls, forest: TokenForest, dtype: torch.dtype, width: int) -> Tree | None:
        """None where one mask over the whole bins is as good; `width`: of all heads together."""
        if forest.prefixes:
            return None
        length = forest.ids.shape[1]
        paths = [path + b * length for b, path in forest.slots]
        done = np.zeros(forest.ids.numel(), dtype=bool)
        roots: list[tuple[int, np.ndarray]] = []
        branches: list[tuple[int, np.ndarray]] = []
        for path in paths:
            known = int(done[path].sum())  # an earlier sequence has computed the first ones
            done[path] = True
            if known < len(path):
                (branches if known else roots).append((known, path))
        kinds = [kind for kind in (roots, branches) if kind]
        pairs = sum(len(kind) * max(len(p) - n for n, p in kind) * max(len(p) for _, p in kind) for kind in kinds)
        if (forest.ids.numel() * length - pairs) * width < WORTH:
            return None
        place, start, parts = np.zeros(forest.ids.numel(), dtype=np.int64), 0, []
        for kind in kinds:
            part, own = _part(kind, dtype)
            parts.append(part)
            rows, columns = np.nonzero(own)
            place[part.queries.numpy()[rows, columns]] = start + rows * own.shape[1] + columns
            start += own.size
        return cls(parts, torch.from_numpy(place), SharedPrefixes.of(roots, branches))

    def to(self, device: torch.device) -> Tree:
        if device.type == "cpu":
            return self
        parts = [Part(p.queries.to(device), p.keys.to(device), None if p.mask is None else p.mask.to(device)) for p in self.parts]
        return Tree(parts, self.place.to(device))

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, dropout: float, scale: float | None) -> Tensor:
        """[bins, heads, length, d] each, keys and values of fewer heads perhaps, to [bins, length, heads, d]."""
        if self.prefixes is not None and possible(query, key, value, dropout):
            return self.prefixes(query, key, value, scale)
        (bins, heads, length, _), d = query.shape, value.shape[-1]
        rows = [t.transpose(1, 2).flatten(0, 1).flatten(1) for t in (query, key, value)]
        found = []
        for part in self.parts:
            q, k, v = (
                r.index_select(0, index.flatten()).view(*index.shape, t.shape[1], t.shape[-1]).transpose(1, 2)
                for r, index, t in zip(rows, (part.queries, part.keys, part.keys), (query, key, value))
            )
            if part.mask is not None and k.shape[1] != heads:  # with a mask only equal numbers of heads have a fast kernel everywhere
                k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v))
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=part.mask, dropout_p=dropout, is_causal=part.mask is None, scale=scale, enable_gqa=k.shape[1] != heads,
            )  # fmt: skip
            found.append(out.transpose(1, 2).reshape(-1, heads * d))
        return torch.cat(found).index_select(0, self.place).view(bins, length, heads, d)


def _part(kind: list[tuple[int, np.ndarray]], dtype: torch.dtype) -> tuple[Part, np.ndarray]:
    """Sequences as one part, right padded, and which of its queries are real."""
    longest, most = max(len(path) - known for known, path in kind), max(len(path) for _, path in kind)
    queries, keys = np.zeros((len(kind), longest), dtype=np.int64), np.zeros((len(kind), most), dtype=np.int64)
    own, sees = np.zeros((len(kind), longest), dtype=bool), np.zeros((len(kind), longest, most), dtype=bool)
    for i, (known, path) in enumerate(kind):
        n = len(path) - known
        queries[i, :n], keys[i, : len(path)], own[i, :n] = path[known:], path, True
        sees[i] = np.arange(most)[None] <= known + np.arange(longest)[:, None]  # what lies behind a path lies behind its queries
    mask = None
    if kind[0][0]:
        mask = torch.zeros(1, dtype=dtype).masked_fill(~torch.from_numpy(sees), torch.finfo(dtype).min)[:, None]
    return Part(torch.from_numpy(queries), torch.from_numpy(keys), mask), own


def attach(mask: Tensor, forest: TokenForest, width: int) -> Tensor:
    """The mask of a forest, with its tree for those who can use it."""
    tree = Tree.of(forest, mask.dtype, width)
    return mask if tree is None else carry(mask, tree.to(mask.device))


def carry(mask: Tensor, attention: Callable[[Tensor, Tensor, Tensor, float, float | None], Tensor]) -> Tensor:
    """A mask that brings along who computes the same attention faster."""
    _register()
    mask.attention = attention  # type: ignore[attr-defined]
    return mask


@functools.cache
def _register() -> None:
    """Every "sdpa" attention of transformers looks first at what its mask carries."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    usual = ALL_ATTENTION_FUNCTIONS["sdpa"]

    @functools.wraps(usual)
    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, dropout: float = 0.0, scaling: float | None = None, **more: Any) -> Any:
        faster = getattr(attention_mask, "attention", None)
        if faster is None or key.shape[2] != query.shape[2] or any(more.get(k) is not None for k in ("position_bias", "softcap", "cache")):
            return usual(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more)
        return faster(query, key, value, dropout, scaling), None

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
