"""What several compressors share: counting stored bits, and packing sparse signs into them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luthier.core.tensorfile import DTYPES, open_checkpoint, write_file
from luthier.errors import ModelError

GOLDEN = (math.sqrt(5) + 1) / 2


def entropy_bits(density: float) -> float:
    """Bits an entry of an independent ternary vector holds: -(1 - k) log2(1 - k) - k log2(k / 2)."""
    k = density
    empty = (1 - k) * math.log2(1 - k) if k < 1 else 0.0
    return -empty - (k * math.log2(k / 2) if k > 0 else 0.0)


def rice_parameter(density: float) -> int:
    """How many low bits of a gap are stored as they are: 1 + floor(log2(ln(phi - 1) / ln(1 - k))), at least 0."""
    if not 0 < density < 1:
        return 0
    return max(0, 1 + math.floor(math.log2(math.log(GOLDEN - 1) / math.log(1 - density))))


def rice_encode(gaps: np.ndarray, low: int) -> tuple[np.ndarray, np.ndarray]:
    """Golomb-Rice code of numbers >= 0, as two packed bit streams: each number's high part in unary (ones, then a zero), and its
    `low` low bits, highest first. Two streams take as many bits as one and can be decoded at once."""
    gaps = np.asarray(gaps, dtype=np.int64)
    high = gaps >> low
    unary = np.ones(int(high.sum()) + len(gaps), dtype=np.uint8)
    unary[np.cumsum(high + 1) - 1] = 0
    rest = (gaps[:, None] >> np.arange(low - 1, -1, -1)) & 1
    return np.packbits(unary), np.packbits(rest.astype(np.uint8))


def rice_decode(unary: np.ndarray, rest: np.ndarray, low: int, count: int) -> np.ndarray:
    """The `count` numbers that `rice_encode` was given."""
    ends = np.flatnonzero(np.unpackbits(unary) == 0)[:count]
    if len(ends) < count or len(rest) * 8 < count * low:
        raise ValueError("The coded gaps are cut short.")
    high = np.diff(ends, prepend=-1) - 1
    bits = np.unpackbits(rest, count=count * low).reshape(count, low).astype(np.int64)
    return (high << low) + bits @ (1 << np.arange(low - 1, -1, -1, dtype=np.int64))


def rice_bits(gaps: np.ndarray, low: int) -> int:
    """The length of the code, without packing."""
    return int((np.asarray(gaps, dtype=np.int64) >> low).sum()) + len(gaps) * (1 + low)


def vector_of(update: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The floating tensors in alphabetical order: what counts as one long vector."""
    return {n: update[n] for n in sorted(update) if update[n].is_floating_point()}


@dataclass
class Packed:
    """A ternary update in few bits: Golomb-Rice coded gaps between its non-zeros, one sign bit each, one magnitude."""

    names: list[str]
    shapes: list[tuple[int, ...]]
    dtypes: list[str]
    magnitude: float
    count: int
    """Non-zero entries."""
    low: int
    """The code's parameter: low bits of every gap."""
    unary: np.ndarray
    rest: np.ndarray
    signs: np.ndarray
    code_bits: int
    """Bits of gaps and signs before padding to bytes."""

    @property
    def total(self) -> int:
        """Entries, zeros included."""
        return sum(math.prod(s) for s in self.shapes)

    @property
    def bits(self) -> int:
        """Gaps, signs and the magnitude (as 16 bits, the way the paper counts)."""
        return self.code_bits + 16

    @property
    def entropy_bound(self) -> float:
        """Bits that an independent ternary vector of this density and length needs, and 16 for the magnitude."""
        return entropy_bits(self.count / self.total) * self.total + 16 if self.total else 16.0


def encode(update: Mapping[str, Tensor]) -> Packed:
    """Pack an update whose entries are all -a, 0 or a. `decode` gives it back bit for bit."""
    vector = vector_of(update)
    size = _magnitude(vector)
    places, signs, at = [], [], 0
    for name, tensor in vector.items():
        flat = tensor.detach().cpu().reshape(-1)
        index = flat.nonzero()[:, 0]
        values = flat[index]
        if bool((values.abs() != torch.tensor(size, dtype=torch.float64).to(flat.dtype)).any()):
            raise ModelError(f"'{name}' holds more than one magnitude, so it is not a ternary update; compress it first.")
        places.append(index.numpy() + at)
        signs.append((values < 0).numpy())
        at += flat.numel()
    place = np.concatenate(places) if places else np.zeros(0, np.int64)
    gaps = np.diff(place, prepend=-1) - 1
    low = rice_parameter(len(place) / at if at else 0.0)
    unary, rest = rice_encode(gaps, low)
    return Packed(
        list(vector), [tuple(t.shape) for t in vector.values()], [_CODES[t.dtype] for t in vector.values()], size, len(place), low,
        unary, rest, np.packbits(np.concatenate(signs) if signs else np.zeros(0, bool)), rice_bits(gaps, low) + len(place),
    )  # fmt: skip


def decode(packed: Packed) -> dict[str, Tensor]:
    """The update that was packed."""
    gaps = rice_decode(packed.unary, packed.rest, packed.low, packed.count)
    place = np.cumsum(gaps + 1) - 1
    if len(packed.signs) * 8 < packed.count or (packed.count and int(place[-1]) >= packed.total):
        raise ValueError("The coded positions reach beyond the tensors.")
    negative = np.unpackbits(packed.signs, count=packed.count).astype(bool)
    update, at = {}, 0
    for name, shape, code in zip(packed.names, packed.shapes, packed.dtypes):
        n = math.prod(shape)
        first, last = np.searchsorted(place, [at, at + n])
        flat = torch.zeros(n, dtype=DTYPES[code])
        size = torch.tensor(packed.magnitude, dtype=torch.float64).to(flat.dtype)
        flat[torch.from_numpy(place[first:last] - at)] = torch.where(torch.from_numpy(negative[first:last]), -size, size)
        update[name] = flat.reshape(shape)
        at += n
    return update


def _magnitude(vector: Mapping[str, Tensor]) -> float:
    """The one magnitude, read where it is stored most precisely."""
    found = [(t.dtype.itemsize, float(t.abs().max())) for t in vector.values() if t.numel() and bool(t.any())]
    return max(found, key=lambda f: f[0])[1] if found else 0.0


_CODES = {dtype: code for code, dtype in DTYPES.items()}


def save_packed(packed: Packed, path: str | Path, extra: Mapping[str, Tensor] | None = None) -> None:
    """Write a packed update as a safetensors file; `extra` are tensors to store beside it as they are."""
    about = {k: getattr(packed, k) for k in ("names", "shapes", "dtypes", "magnitude", "count", "low", "code_bits")}
    streams = {f"packed.{k}": torch.from_numpy(getattr(packed, k)) for k in ("unary", "rest", "signs")}
    write_file(Path(path), {**streams, **{f"raw.{n}": t for n, t in (extra or {}).items()}}, {"format": "compeft", "about": json.dumps(about)})


def load_packed(path: str | Path) -> dict[str, Tensor]:
    """The update in a file that `save_packed` wrote, and what was stored beside it."""
    files = open_checkpoint(Path(path))
    try:
        about = json.loads(files.metadata()["about"])
        streams = {k: files.read(f"packed.{k}").numpy() for k in ("unary", "rest", "signs")}
        parts: dict[str, Any] = {**about, **streams, "shapes": [tuple(map(int, s)) for s in about["shapes"]]}
        packed = Packed(**parts)
        update = decode(packed)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{path} is not a packed update: {error}.") from error
    return update | {name.removeprefix("raw."): files.read(name) for name in files.where if name.startswith("raw.")}


@dataclass
class Masks:
    """A ternary update as two bit masks, for products of updates without unpacking them."""

    plus: np.ndarray
    minus: np.ndarray
    magnitude: float

    @classmethod
    def of(cls, update: Mapping[str, Tensor]) -> Masks:
        vector = vector_of(update)
        flat = torch.cat([t.detach().cpu().reshape(-1).sign().to(torch.int8) for t in vector.values()]).numpy()
        return cls(np.packbits(flat > 0), np.packbits(flat < 0), _magnitude(vector))

    def dot(self, other: Masks) -> float:
        """The inner product, by AND and counting bits."""
        agree = _ones(self.plus & other.plus) + _ones(self.minus & other.minus)
        return (agree - _ones(self.plus & other.minus) - _ones(self.minus & other.plus)) * self.magnitude * other.magnitude

    def differing(self, other: Masks) -> int:
        """How many entries have another sign, by XOR and counting bits."""
        return _ones((self.plus ^ other.plus) | (self.minus ^ other.minus))


def _ones(bits: np.ndarray) -> int:
    return int(np.bitwise_count(bits).sum(dtype=np.int64))
