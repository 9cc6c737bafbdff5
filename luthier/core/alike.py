"""Sequences that begin alike: how much two have in common, and rows cut into micro-batches in which that counts once."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from luthier.core.batch import Sequence


def ids_key(sequence: Sequence) -> bytes:
    """Sorts sequences so that neighbours have most in common."""
    return sequence.ids.astype(">i8").tobytes()


def common_beginning(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def neighbours(groups: list[list[int]], sequences: Iterable[Sequence], widest: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """An order of groups in which those that begin alike are neighbours, and of each how many different tokens it has and how many of them the one before has."""
    rows: dict[int, list[Sequence]] = {}
    for s in sequences:
        rows.setdefault(s.row, []).append(s)
    known = [sorted((s for row in group for s in rows.get(row, [])), key=ids_key) for group in groups]
    lexical = sorted((g for g in range(len(groups)) if known[g]), key=lambda g: (ids_key(known[g][0]), g))
    clusters = [[g] for g in range(len(groups)) if not known[g]] + [[g] for g in lexical[:1]]
    for a, b in pairwise(lexical):
        if 2 * common_beginning(known[a][-1].ids, known[b][0].ids) >= min(widest[a], widest[b]):
            clusters[-1].append(b)
        else:
            clusters.append([b])
    order = [g for cluster in sorted(clusters, key=lambda c: (max(widest[g] for g in c), min(c))) for g in cluster]
    last: list[Sequence] = []
    own = []
    for g in order:
        different = sum(map(len, known[g])) - sum(common_beginning(a.ids, b.ids) for a, b in pairwise(known[g]))
        own.append((different, common_beginning(last[0].ids, known[g][0].ids) if last and known[g] else 0))
        last = known[g][-1:]
    return order, own


def fewest(groups: list[list[int]], order: list[int], own: list[tuple[int, int]], width: np.ndarray, number: np.ndarray, tokens: int) -> list[list[int]]:
    """Groups in their order as few micro-batches of at most `tokens` tokens each: padded, or if that is a tenth less, the different ones (`own`, see `neighbours`).

    Of all limits that need no more micro-batches the lowest is taken: four rows that do not fit become two and two, not three and one."""

    def filled(limit: int) -> list[list[int]]:
        micro: list[list[int]] = [[]]
        packed = 0
        for g, (different, common) in zip(order, own):
            merged, packed = micro[-1] + groups[g], packed + different - (common if micro[-1] else 0)
            padded = max(width[i] for i in merged) * sum(number[i] for i in merged)
            if micro[-1] and (packed if 0 < packed < 0.9 * padded else padded) > limit:
                micro.append(list(groups[g]))
                packed = different
            else:
                micro[-1] = merged
        return micro

    needed, low, high = len(filled(tokens)), tokens // 2, tokens
    while high - low > 1 and needed > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if len(filled(middle)) == needed else (middle, high)
    return filled(high)
