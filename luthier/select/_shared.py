"""What several selectors share: exact counts over groups, weighted draws, lazy greedy, columns and embeddings of rows."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.core.context import seed_of
from luthier.errors import DataError, RecipeError, nearest
from luthier.select import column

if TYPE_CHECKING:
    from luthier.core.context import Context


def spread(budget: int, sizes: Any, weights: Any = None) -> np.ndarray:
    """Share `budget` over groups in proportion to `weights` (default: their sizes), none above its size; the total is exact.

    Groups that would overflow are filled first, smallest first, and what they cannot take is handed on to the others; what
    is left after rounding down goes to the largest remainders (ties: the first group). Groups of weight 0 get rows only when
    all others are full."""
    sizes = np.asarray(sizes, dtype=np.int64)
    weights = sizes.astype(np.float64) if weights is None else np.asarray(weights, dtype=np.float64)
    if weights.shape != sizes.shape or (weights < 0).any() or not np.isfinite(weights).all():
        raise ValueError("One finite weight of at least 0 is needed for every group.")
    budget = int(min(budget, sizes.sum()))
    counts = np.zeros_like(sizes)
    for active in (weights > 0, weights == 0):
        if budget > counts.sum() and active.any():
            share = weights[active] if weights[active].any() else sizes[active].astype(np.float64)
            counts[active] = _fill(budget - int(counts.sum()), sizes[active], share)
    return counts


def _fill(budget: int, sizes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Counts of groups whose weights are positive (or sizes 0)."""
    counts = np.zeros_like(sizes)
    open_, left = weights > 0, min(budget, int(sizes[weights > 0].sum()))
    while True:
        share = np.where(open_, weights, 0.0)
        share = share / max(share.max(), 5e-324)  # tiny weights would overflow below
        share *= left / max(share.sum(), 1.0)
        full = open_ & (share >= sizes)
        if not full.any():
            break
        counts[full] = sizes[full]
        left -= int(sizes[full].sum())
        open_ &= ~full
        if not open_.any():
            return counts
    floor = np.floor(share + 1e-9).astype(np.int64)
    counts[open_] = floor[open_]
    rest = left - int(floor[open_].sum())
    room = np.where(open_, share - floor, -np.inf)
    counts[np.argsort(-room, kind="stable")[:rest]] += 1
    return counts


def gumbel_top_k(log_weights: Any, k: int, rng: np.random.Generator) -> np.ndarray:
    """`k` indices drawn one after the other without replacement, each with probability proportional to exp(log_weight).

    Adding standard Gumbel noise to the log-weights and keeping the k largest is that draw. Weights of 0 (-inf) come last."""
    log_weights = np.asarray(log_weights, dtype=np.float64)
    keys = log_weights + rng.gumbel(size=log_weights.shape)
    order = np.lexsort((rng.random(len(keys)), -keys))
    return order[: max(0, k)]


def stratified(scores: Any, budget: int, bins: int, rng: np.random.Generator, trim: float = 0.0) -> np.ndarray:
    """Coverage-enhanced draw: drop the `trim` share of largest scores, cut the range of the rest into `bins` groups of equal
    width, and give every group, smallest first, an equal part of the budget that is still left; uniform within a group."""
    scores = np.asarray(scores, dtype=np.float64)
    kept = np.argsort(scores, kind="stable")[: len(scores) - int(trim * len(scores))]
    kept = np.sort(kept)
    low, high = scores[kept].min(initial=np.inf), scores[kept].max(initial=-np.inf)
    width = (high - low) / bins if high > low else 1.0
    place = np.minimum(((scores[kept] - low) / width).astype(np.int64), bins - 1)
    groups = sorted((kept[place == b] for b in np.unique(place)), key=len)
    chosen: list[np.ndarray] = []
    left = min(budget, len(kept))
    for number, group in zip(range(len(groups), 0, -1), groups):
        # the last group takes what rounding down left over
        take = min(len(group), left // number)
        chosen.append(rng.choice(group, size=take, replace=False))
        left -= take
    return np.concatenate(chosen) if chosen else np.zeros(0, np.int64)


def lazy_greedy(
    best: Callable[[int], tuple[float, int]], take: Callable[[int, int], None], blocks: int, budget: int
) -> tuple[list[int], list[float]]:
    """Greedy choice when gains never rise: a block's last known best gain bounds its present one, so only blocks whose bound
    reaches the top are computed anew.

    `best(block)` gives the largest gain among the block's unused candidates and that candidate (ties: the lowest); gain
    -inf when none is left. `take(block, candidate)` updates the state after a choice. With one candidate a block this is the
    classical lazy greedy; larger blocks let numpy compute many gains at once. Ties go to the lowest candidate."""
    heap: list[tuple[float, int, int, int]] = []
    for block in range(blocks):
        gain, item = best(block)
        if gain > -np.inf:
            heap.append((-gain, item, block, 0))
    heapq.heapify(heap)
    chosen: list[int] = []
    gains: list[float] = []
    while heap and len(chosen) < budget:
        bound, item, block, known = heap[0]
        if known == len(chosen):
            take(block, item)
            chosen.append(item)
            gains.append(-bound)
            if len(chosen) == budget:
                break
        gain, item = best(block)
        if gain > -np.inf:
            heapq.heapreplace(heap, (-gain, item, block, len(chosen)))
        else:
            heapq.heappop(heap)
    return chosen, gains


def generator(ctx: Context | None, *parts: Any, seed: int | None = None) -> np.random.Generator:
    """A generator that depends on the run's seed (or a given one) and `parts` alone, so that a repeated call draws the same."""
    run = seed if seed is not None else 0 if ctx is None else ctx.seed
    return np.random.default_rng(seed_of(run, *parts))


def numbers(rows: Any, name: str, what: str = "number") -> np.ndarray:
    """A numeric column; a missing or non-numeric value is named."""
    values = named_column(rows, name)
    out = np.empty(len(values))
    for i, value in enumerate(values):
        try:
            out[i] = float(value)
        except (TypeError, ValueError):
            raise DataError(f"Row {i} has {value!r} in the column '{name}'; a {what} is needed there.") from None
    bad = np.flatnonzero(~np.isfinite(out))
    if len(bad):
        raise DataError(f"Row {bad[0]} has {values[bad[0]]!r} in the column '{name}'; a finite {what} is needed there.")
    return out


def named_column(rows: Any, name: str) -> list[Any]:
    """A column that the recipe names; one that no row has is answered with the nearest that is there."""
    known = list(rows) if isinstance(rows, dict) else sorted({k for row in _head(rows) for k in row})
    found = column(rows, name) if not isinstance(rows, dict) or name in rows else []
    if not any(value is not None for value in found) and count(rows):
        raise RecipeError(f"The rows have no column '{name}'.{nearest(name, known)} They have: {', '.join(map(str, known)) or 'none'}.")
    return found


def has_column(rows: Any, name: str) -> bool:
    """Whether some row has this column."""
    return name in rows if isinstance(rows, dict) else any(name in row for row in _head(rows))


def _head(rows: Any) -> list[Any]:
    return [rows[i] for i in range(min(50, len(rows)))]


def count(rows: Any) -> int:
    """How many rows there are, whether they are a list of dicts or a dict of columns."""
    if isinstance(rows, dict):
        return len(next(iter(rows.values()))) if rows else 0
    return len(rows)


def embeddings(rows: Any, ctx: Context | None, name: str | None, embedder: str | None = None, **options: Any) -> np.ndarray:
    """Vectors of the rows: a column of them if one is named, else the signal "embedding" of the run's model or of `embedder`."""
    if name is not None:
        return np.asarray([np.asarray(v, np.float32).ravel() for v in named_column(rows, name)])
    if ctx is None:
        raise RecipeError("Embeddings are needed: run this within a recipe, or name a column that holds them with `embeddings:`.")
    return ctx.signal("embedding", rows, **options, **({} if embedder is None else {"embedder": embedder}))
