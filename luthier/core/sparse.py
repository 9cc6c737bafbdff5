"""Sparse updates and masks: exact top-k over many tensors, index/value updates, and masks on what an optimizer did.

`top_k` and `Cut` select exactly k entries; among equal scores the first by index win. A `Cut` over all tensors is found by counting
(a radix selection over the scores' bits, two passes) unless they are few, so neither a concatenated vector nor a sort of it ever exists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.core.source import TensorSource
from luthier.core.tensorfile import open_checkpoint, write_file
from luthier.core.windows import offset
from luthier.errors import ModelError

SparseDelta = dict[str, tuple[Tensor, Tensor]]
"""An update: for each tensor the flat positions (int64, sorted) and what is added there."""
CHUNK = 1 << 20
IN_MEMORY = 1 << 22
"""So many scores are held at once; of more only counts are."""


# which entries ----------------------------------------------------------------------------------------------------------
@dataclass
class Cut:
    """The k largest scores of several tensors: all above a threshold, and of those equal to it as many as each tensor may keep."""

    threshold: float
    """-inf: everything passes; nan: nothing does."""
    equal: dict[str, int] = field(default_factory=dict)
    """How many scores equal to the threshold pass, where not all do."""
    until: dict[str, int] = field(default_factory=dict)
    """The flat position after the last of these."""

    def mask(self, name: str, scores: Tensor) -> Tensor:
        """Which entries of one tensor (or of the rows of it that are being read) pass, in its shape."""
        values = scores.detach().reshape(-1).float()
        if name in self.equal:
            passed = values > self.threshold
            before = offset(name, math.prod(scores.shape[1:]))
            left = max(0, self.until[name] - before)
            passed[:left] |= values[:left] == self.threshold
        else:
            passed = values >= self.threshold
        return passed.reshape(scores.shape)

    def trim(self, name: str, tensor: Tensor) -> Tensor:
        """A copy of a tensor (or of the rows of it that are being read) in which the entries whose size does not pass are 0."""
        if tensor.dtype not in (torch.float32, torch.float64) or not 0 < self.threshold < math.inf:
            return tensor.masked_fill(~self.mask(name, tensor.abs()), 0)
        kept = F.hardshrink(tensor.contiguous(), self._below(tensor.dtype))  # one pass, where a mask takes five
        if name in self.equal:
            left = max(0, self.until[name] - offset(name, math.prod(tensor.shape[1:])))
            flat = kept.view(-1)[left:]
            flat[(flat.abs().float() == self.threshold).nonzero()[:, 0]] = 0
        return kept

    def _below(self, dtype: torch.dtype) -> float:
        """The largest number of a type that is less than the threshold in fp32."""
        less = np.nextafter(np.float32(self.threshold), np.float32(0))
        if dtype == torch.float32:
            return float(less)
        middle = (float(less) + self.threshold) / 2
        return middle if np.float32(middle) < self.threshold else float(np.nextafter(middle, 0.0))


def cut(scores: Mapping[str, Tensor], k: int) -> Cut:
    """Find the k largest of all scores (compared in fp32). Tensors are read one by one, three times at most; integer ones are left out."""
    if k <= 0:
        return Cut(float("nan"))
    known = list(_chunks(scores)) if 0 < _entries(scores) <= IN_MEMORY else None
    found = _counted(scores, k) if known is None else _sorted(known, k)
    if isinstance(found, Cut):
        return found
    threshold, left = found
    equal: dict[str, int] = {}
    until: dict[str, int] = {}
    seen: dict[str, int] = {}
    for name, values in _chunks(scores) if known is None else known:
        start, same = seen.get(name, 0), values == threshold
        taken = min(left, int(same.sum()))
        equal[name] = equal.get(name, 0) + taken
        until[name] = start + int(same.nonzero()[taken - 1, 0]) + 1 if taken else until.get(name, 0)
        seen[name] = start + len(values)
        left -= taken
    return Cut(threshold, equal, until)


def _sorted(known: list[tuple[str, Tensor]], k: int) -> Cut | tuple[float, int]:
    """The cut of scores in memory, or the threshold and how many of those equal to it pass, where not all do."""
    for name, values in known:
        if bool(values.sum().isnan()) and bool(values.isnan().any()):  # infinities of both signs add up to NaN as well
            raise _damaged(name)
    vector = torch.cat([values for _, values in known]).cpu().numpy()
    if k >= len(vector):
        return Cut(float("-inf"))
    first = len(vector) - k
    vector.partition(first)
    left = k - int(np.count_nonzero(vector[first:] > vector[first]))
    return Cut(float(vector[first])) if left == np.count_nonzero(vector == vector[first]) else (float(vector[first]), left)


def _counted(scores: Mapping[str, Tensor], k: int) -> Cut | tuple[float, int]:
    """The same of any number of scores, by counting the upper and then the lower halves of their bits."""
    high = torch.zeros(1 << 16, dtype=torch.int64)
    for name, values in _chunks(scores):
        keys = (_keys(values) >> 16).add_(1 << 15)
        counts = torch.bincount(keys, minlength=1 << 16).cpu()
        # The bit patterns above infinity's (and below minus infinity's) are NaN.
        if bool(counts[_TOP:].any() or counts[: _BOTTOM + 1].any()) and bool(values.isnan().any()):
            raise _damaged(name)
        high += counts
    if k >= int(high.sum()):
        return Cut(float("-inf"))
    upper, left = _bucket(high, k)
    low = torch.zeros(1 << 16, dtype=torch.int64)
    for _, values in _chunks(scores):
        keys = _keys(values)
        low += torch.bincount(keys[keys >> 16 == upper - (1 << 15)] & 0xFFFF, minlength=1 << 16).cpu()
    lower, left = _bucket(low, left)
    threshold = _value(((upper - (1 << 15)) << 16) + lower)
    return Cut(threshold) if left == int(low[lower]) else (threshold, left)


def _damaged(name: str) -> ModelError:
    return ModelError(f"'{name}' holds NaN, so its entries cannot be ranked; the checkpoint is damaged or its training diverged.")


def _entries(scores: Mapping[str, Tensor]) -> int:
    """How many scores there are, as far as that is known without reading them; 0 where it is not."""
    if not isinstance(scores, TensorSource):
        return sum(tensor.numel() for tensor in scores.values())
    known = [scores.meta(name) for name in scores]
    return 0 if any(meta is None for meta in known) else sum(math.prod(meta[0]) for meta in known if meta is not None)


_TOP, _BOTTOM = 0xFF80, 0x80
"""The buckets of plus and minus infinity."""


def _bucket(counts: Tensor, k: int) -> tuple[int, int]:
    """The bucket that holds the k-th largest, and how many of it are among the k."""
    above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(above, k))
    bucket = len(counts) - 1 - place
    return bucket, k - (int(above[place]) - int(counts[bucket]))


def _chunks(scores: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name in scores:
        parts = scores.pieces(name, CHUNK) if isinstance(scores, TensorSource) else iter([scores[name]])
        for tensor in parts:
            if tensor.is_floating_point():
                flat = tensor.detach().reshape(-1)
                for start in range(0, flat.numel(), CHUNK):
                    yield name, flat[start : start + CHUNK].float().contiguous()


def _keys(values: Tensor) -> Tensor:
    """fp32 bits as integers that sort like the numbers (both zeros are 0)."""
    bits = values.view(torch.int32)
    negative = bits < 0
    return torch.where(negative, -(bits & 0x7FFFFFFF), bits) if bool(negative.any()) else bits


def _value(key: int) -> float:
    """The number whose key this is."""
    value = torch.tensor(abs(key), dtype=torch.int32).view(torch.float32)
    return float(-value if key < 0 else value)


def count_of(k: int | float, n: int) -> int:
    """How many of n a count (int) or a share (float) means; a share is rounded down."""
    return min(n, int(k * n) if isinstance(k, float) else int(k))


def _between(scores: Mapping[str, Tensor], first: int, number: int) -> Callable[[str, Tensor], Tensor]:
    """Masks of the ranks [first, first + number) of all scores."""
    outer = cut(scores, first + number)
    if first == 0:
        return outer.mask
    inner = cut(scores, first)
    return lambda name, tensor: outer.mask(name, tensor) & ~inner.mask(name, tensor)


def band_mask(scores: Tensor, first: int | float, number: int | float, rows: bool = False) -> Tensor:
    """The entries whose rank (0: the largest) lies in [first, first + number), of a tensor or of each of its rows.

    Both are counts (int) or shares (float, rounded down each)."""
    if scores.ndim == 0:
        scores = scores.reshape(1)
        return band_mask(scores, first, number)[0]
    if not rows:
        n = scores.numel()
        start = count_of(first, n)
        one = {"scores": scores}
        return _between(one, start, count_of(number, n))("scores", scores)
    n = scores.shape[-1]
    start, stop = count_of(first, n), count_of(first, n) + count_of(number, n)
    order = (scores.detach().float() + 0.0).sort(dim=-1, descending=True, stable=True).indices[..., start:stop]
    return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter_(-1, order, True)


def top_k(
    scores: Mapping[str, Tensor], k: int | float, scope: Literal["all", "tensor", "row"] = "all", band: int | float | None = None
) -> dict[str, Tensor]:
    """Flat positions (int64, sorted) of the k largest scores of all tensors together, of each tensor, or of each row.

    `k` is a count (int) or a share (float); `band` passes over that many of the largest first. Exactly k are chosen (fewer only
    where there are not as many); equal scores by index. A tensor without picks has an empty index."""
    first = 0 if band is None else band
    if scope == "all":
        n = sum(scores[name].numel() for name in scores)
        start = count_of(first, n)
        mask = _between(scores, start, count_of(k, n))
        masks = {name: mask(name, scores[name]) for name in scores}
    elif scope in ("tensor", "row"):
        masks = {name: band_mask(scores[name], first, k, rows=scope == "row") for name in scores}
    else:
        raise ValueError(f"A scope is 'all', 'tensor' or 'row', not {scope!r}.")
    return {name: mask.reshape(-1).nonzero()[:, 0] for name, mask in masks.items()}


# index/value updates ----------------------------------------------------------------------------------------------------
def take(tensors: Mapping[str, Tensor], indices: Mapping[str, Tensor]) -> SparseDelta:
    """The update that holds the tensors' values at the given positions."""
    return {name: (index, tensors[name].detach().reshape(-1)[index].clone()) for name, index in indices.items()}


def scatter(base: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """base with values added at flat positions; gradients flow to the values (gathered) and to the base."""
    return base.reshape(-1).index_add(0, index, values.to(base.dtype)).reshape(base.shape)


@torch.no_grad()
def apply(tensors: MutableMapping[str, Tensor] | Mapping[str, Tensor], update: SparseDelta, scale: float = 1.0) -> SparseDelta:
    """Add an update to the tensors in place. Returns the values that were there, for `revert`."""
    old: SparseDelta = {}
    for name, (index, values) in update.items():
        if name not in tensors:
            raise ModelError(f"The sparse update changes '{name}', which the model does not have.")
        target = tensors[name]
        if len(index) and int(index.max()) >= target.numel():
            raise ModelError(f"The sparse update of '{name}' reaches beyond its {target.numel()} entries; it belongs to another model.")
        flat = target.view(-1)
        old[name] = (index, flat[index].clone())
        flat[index] = (flat[index].float() + scale * values.float()).to(flat.dtype)
    return old


@torch.no_grad()
def revert(tensors: Mapping[str, Tensor], old: SparseDelta) -> None:
    """Put back, bit for bit, what `apply` replaced."""
    for name, (index, values) in old.items():
        tensors[name].view(-1)[index] = values


def add(a: SparseDelta, b: SparseDelta, scale: float = 1.0) -> SparseDelta:
    """a + scale * b on the union of their positions."""
    total: SparseDelta = {}
    for name in dict.fromkeys([*a, *b]):
        empty = (torch.zeros(0, dtype=torch.int64), torch.zeros(0))
        (i, x), (j, y) = a.get(name, empty), b.get(name, empty)
        index, place = torch.cat([i, j]).unique(return_inverse=True)
        values = torch.cat([x.float(), scale * y.float()])
        total[name] = (index, values.new_zeros(len(index)).index_add(0, place, values))
    return total


def save(update: SparseDelta, path: str | Path) -> None:
    """Write an update as a safetensors file."""
    tensors = {f"{name}:{part}": t for name, pair in update.items() for part, t in zip(("indices", "values"), pair)}
    write_file(Path(path), tensors, {"format": "sparse-delta"})


def load(path: str | Path) -> SparseDelta:
    """Read an update that `save` wrote."""
    files = open_checkpoint(Path(path))
    names = dict.fromkeys(key.rpartition(":")[0] for key in files.where)
    if any(f"{n}:{part}" not in files.where for n in names for part in ("indices", "values")):
        raise ModelError(f"{path} is not a sparse update.")
    return {name: (files.read(f"{name}:indices"), files.read(f"{name}:values")) for name in names}


# what an optimizer may do -----------------------------------------------------------------------------------------------
class UpdateFilter:
    """Multiplies every finished update, w_new - w_old, by a mask: decay and momentum are covered as well as the gradient.

    Masks (bool or numbers) broadcast to their parameters and may be replaced between steps in `masks`. A parameter whose mask is
    all zero has its gradient taken away, so that the optimizer leaves its moments alone too."""

    def __init__(self, masks: Mapping[Tensor, Tensor]) -> None:
        self.masks: dict[Tensor, Tensor] = dict(masks)
        self._old: dict[Tensor, Tensor] = {}
        self._handles: list[Any] = []

    def install(self, optimizer: torch.optim.Optimizer) -> UpdateFilter:
        self._handles += [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]
        return self

    def remove(self) -> None:
        """Take the filter off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def installed(self, optimizer: torch.optim.Optimizer) -> Iterator[UpdateFilter]:
        self.install(optimizer)
        try:
            yield self
        finally:
            self.remove()

    @torch.no_grad()
    def _before(self, *_: Any) -> None:
        self._old.clear()
        for param, mask in self.masks.items():
            if not bool(mask.any()):
                param.grad = None
            if param.grad is not None:
                self._old[param] = param.detach().clone()

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        for param, old in self._old.items():
            mask = self.masks[param].to(param.device)
            if mask.dtype == torch.bool:
                param.copy_(torch.where(mask, param, old))
            else:
                param.copy_(torch.lerp(old, param.detach(), mask.to(param.dtype).expand_as(param)))
        self._old.clear()
