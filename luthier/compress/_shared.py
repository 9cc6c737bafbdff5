"""What several compressors share: counting stored bits, and packing sparse signs into them."""

from __future__ import annotations

import math

import numpy as np

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
