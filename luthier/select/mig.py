"""MIG: rows that add the most information to a graph of tags."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from scipy import sparse

from luthier.catalog import register
from luthier.core.neighbours import kmeans
from luthier.errors import DataError, RecipeError
from luthier.select import Picks, Selector, budget_of
from luthier.select._shared import count, embeddings, generator, has_column, lazy_greedy, named_column, numbers

if TYPE_CHECKING:
    from luthier.core.context import Context

BLOCK = 256
"""Candidates whose gains are computed in one numpy call."""


def mig(
    tags: Any,
    quality: Any,
    budget: int,
    tag_embeddings: Any = None,
    threshold: float = 0.9,
    propagation: float = 1.0,
    power: float = 0.8,
    smoothing: float = 1e-6,
    phi: Literal["power", "exp"] = "power",
    rate: float = 1.0,
    normalise: bool = False,
    gain: Literal["gradient", "exact"] = "gradient",
    with_info: bool = False,
) -> Any:
    """Row indices in the order of the greedy choice; with `with_info` also a dict of facts.

    `tags`: a list of tag lists, or a rows x tags matrix (dense or scipy sparse; nonzero = has the tag). `quality`: one number
    >= 0 a row. `tag_embeddings`: one vector a tag, in the order of the matrix's columns or of the sorted tags, or a mapping
    from tag to vector; None: no tag is near another. Rows without tags or of quality 0 add nothing and are never chosen."""
    incidence, labels = _incidence(tags)
    quality = np.asarray(quality, dtype=np.float64).ravel()
    if len(quality) != incidence.shape[0]:
        raise DataError(f"There are {incidence.shape[0]} rows of tags and {len(quality)} qualities.")
    if not np.isfinite(quality).all() or (quality < 0).any():
        row = int(np.flatnonzero(~(quality >= 0) | ~np.isfinite(quality))[0])
        raise DataError(f"Row {row} has the quality {quality[row]}; a finite number of at least 0 is needed.")
    graph = None
    if tag_embeddings is not None:
        graph = propagation_matrix(_vectors(tag_embeddings, labels), threshold, propagation)
        if graph.nnz == graph.shape[0]:
            graph = None  # no two tags are near
    size = np.diff(incidence.indptr)
    weight = np.where(size > 0, quality / np.maximum(size, 1) if normalise else quality, 0.0)
    pool = _Pool(incidence, weight, graph, _Phi(phi, power, smoothing, rate), gain)
    chosen, gains = lazy_greedy(pool.best, pool.take, len(pool.parts), budget)
    indices = _when_saturated(np.asarray(chosen, dtype=np.int64), np.asarray(gains), weight)
    if not with_info:
        return indices
    facts = {
        "tags": incidence.shape[1], "edges": 0 if graph is None else int(graph.nnz - graph.shape[0]) // 2,
        "tag_sets": pool.groups, "unreachable": int((weight == 0).sum()), "without_tags": int((size == 0).sum()),
        "gains": gains, "information": pool.mass, "labels": labels,
    }  # fmt: skip
    return indices, facts


def propagation_matrix(tag_embeddings: Any, threshold: float = 0.9, propagation: float = 1.0) -> sparse.csr_matrix:
    """P: cosines of at least `threshold`, off the diagonal times `propagation`, every column divided by its sum."""
    if not 0 < threshold <= 1:
        raise RecipeError(f"threshold is {threshold}; a cosine above 0 and at most 1 is needed (below it tags are not near).")
    vectors = np.asarray(tag_embeddings, dtype=np.float64)
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(float).tiny)
    n, parts = len(vectors), []
    for start in range(0, n, 1024):
        cosine = vectors[start : start + 1024] @ vectors.T
        cosine[cosine < threshold] = 0.0
        cosine *= propagation
        cosine[np.arange(len(cosine)), np.arange(start, start + len(cosine))] = 1.0
        parts.append(sparse.csr_matrix(cosine))
    weights = sparse.vstack(parts, format="csr")
    total = np.asarray(weights.sum(axis=0)).ravel()
    weights.data /= total[weights.indices]
    weights.eliminate_zeros()
    weights.sort_indices()
    return weights


@dataclass(frozen=True)
class _Phi:
    """The concave worth of a tag's mass and its slope."""

    kind: str
    power: float
    smoothing: float
    rate: float

    def __call__(self, z: Any) -> Any:
        return (z + self.smoothing) ** self.power if self.kind == "power" else -np.expm1(-self.rate * z)

    def slope(self, z: Any) -> Any:
        if self.kind == "power":
            return self.power * (z + self.smoothing) ** (self.power - 1)
        return self.rate * np.exp(-self.rate * z)


class _Pool:
    """Rows of one tag set are one candidate, its best unused row: with equal tags the gain rises with the weight.

    gain = weight * sum_{a in tags} h_a, h = P phi'(X). A choice changes X, and so h, only near its own tags."""

    def __init__(self, incidence: sparse.csr_matrix, weight: np.ndarray, graph: Any, phi: _Phi, gain: str) -> None:
        self.phi, self.graph, self.exact = phi, graph, gain == "exact"
        self.near: Any = None if graph is None else graph.tocsc()
        rows = np.flatnonzero(weight > 0)
        group = _same_tags(incidence, rows)
        # rows of a group lie together, the heaviest first, equal ones by index
        order = np.lexsort((rows, -weight[rows], group))
        self.rows, group = rows[order], group[order]
        self.first = np.flatnonzero(np.diff(group, prepend=-1)) if len(group) else np.zeros(0, np.int64)
        self.end = np.append(self.first[1:], len(group))
        self.groups = len(self.first)
        # heavy candidates share a block, so that few blocks are near the top at any time
        heads = self.rows[self.first]
        arranged = np.argsort(-weight[heads] * np.diff(incidence.indptr)[heads], kind="stable")
        self.first, self.end = self.first[arranged], self.end[arranged]
        self.group_of = np.zeros(len(weight), dtype=np.int64)
        self.head = self.rows[self.first] if self.groups else np.zeros(0, np.int64)
        self.group_of[self.head] = np.arange(self.groups)
        self.all_weights = weight
        self.weight = weight[self.head]
        sets = incidence[self.head]
        self.tags, self.start = sets.indices.astype(np.int64), sets.indptr.astype(np.int64)
        self.parts = self._split()
        self.mass = np.zeros(incidence.shape[1])
        self.slope = phi.slope(self.mass)
        self.reach = self.slope.copy() if graph is None else graph @ self.slope
        if self.exact:
            self.pattern = sets.astype(np.float64) if graph is None else (sets.astype(np.float64) @ graph).tocsr()
            self.pattern.sort_indices()

    def _split(self) -> list[tuple[np.ndarray, ...]]:
        """Views of every block: its candidates' tags, where each one's begin, weights and rows."""
        found: list[tuple[np.ndarray, ...]] = []
        for low in range(0, self.groups, BLOCK):
            high = min(low + BLOCK, self.groups)
            start = self.start[low : high + 1]
            found.append((self.tags[start[0] : start[-1]], start[:-1] - start[0], self.weight[low:high], self.head[low:high]))
        return found

    def best(self, block: int) -> tuple[float, int]:
        tags, start, weight, head = self.parts[block]
        gains = self._exact(block, weight) if self.exact else np.add.reduceat(self.reach[tags], start) * weight
        bits = gains.view(np.int64)
        # rounded to 40 bits, so that sums which are equal but for the order of their terms tie; rounding keeps order, so bounds hold
        bits += 2048
        bits &= -4096
        top = gains.max()
        if top == 0:  # nothing left, or phi is saturated
            return (0.0, int(head[weight > 0].min())) if (weight > 0).any() else (-np.inf, -1)
        return float(top), int(head[gains == top].min())

    def _exact(self, block: int, weight: np.ndarray) -> np.ndarray:
        start = self.pattern.indptr[block * BLOCK : block * BLOCK + len(weight) + 1]
        at = slice(start[0], start[-1])
        added = self.pattern.data[at] * np.repeat(weight, np.diff(start))
        mass = self.mass[self.pattern.indices[at]]
        return np.maximum(np.add.reduceat(self.phi(mass + added) - self.phi(mass), start[:-1] - start[0]), 0.0)

    def take(self, block: int, row: int) -> None:
        group = self.group_of[row]
        self._spread(self.tags[self.start[group] : self.start[group + 1]], self.weight[group])
        self.first[group] += 1
        if self.first[group] < self.end[group]:
            following = self.rows[self.first[group]]
            self.head[group], self.weight[group] = following, self.all_weights[following]
            self.group_of[following] = group
        else:
            self.weight[group] = 0.0

    def _spread(self, tags: np.ndarray, weight: float) -> None:
        if self.graph is None:
            self.mass[tags] += weight
            self.slope[tags] = self.reach[tags] = self.phi.slope(self.mass[tags])
            return
        at, _ = _segments(self.graph.indptr, tags)
        touched, share = self.graph.indices[at], self.graph.data[at]
        np.add.at(self.mass, touched, weight * share)
        self.slope[touched] = self.phi.slope(self.mass[touched])
        at, _ = _segments(self.near.indptr, np.unique(touched))
        changed = np.unique(self.near.indices[at])
        at, offsets = _segments(self.graph.indptr, changed)
        self.reach[changed] = np.add.reduceat(self.graph.data[at] * self.slope[self.graph.indices[at]], offsets)


def _segments(indptr: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of some rows' entries in a compressed matrix, and where each row's begin among them."""
    length = indptr[rows + 1] - indptr[rows]
    offsets = np.cumsum(length) - length
    return np.arange(length.sum()) + np.repeat(indptr[rows] - offsets, length), offsets


def _same_tags(incidence: sparse.csr_matrix, rows: np.ndarray) -> np.ndarray:
    """A group number for every row; rows of one tag set share it. By a random 64-bit code a tag, summed, and then checked."""
    sub = incidence[rows]
    if not len(rows):
        return np.zeros(0, np.int64)
    for seed in range(8):
        code = np.random.default_rng(seed).integers(2**64, size=sub.shape[1], dtype=np.uint64)
        key = np.add.reduceat(code[sub.indices], sub.indptr[:-1])
        _, first, group = np.unique(key, return_index=True, return_inverse=True)
        same = sub[first[group]]
        if np.array_equal(same.indptr, sub.indptr) and np.array_equal(same.indices, sub.indices):
            return group
    raise RuntimeError("Tag sets could not be told apart.")


def _when_saturated(chosen: np.ndarray, gains: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Once no row adds anything (phi = exp underflows), every row ties and the lowest index comes first."""
    spent = np.flatnonzero(gains == 0)
    if not len(spent):
        return chosen
    before = chosen[: spent[0]]
    rest = np.setdiff1d(np.flatnonzero(weight > 0), before)
    return np.concatenate([before, rest[: len(chosen) - len(before)]])


def _incidence(tags: Any) -> tuple[sparse.csr_matrix, list[Any]]:
    """Rows x tags, and the tags in the order of its columns."""
    if sparse.issparse(tags) or (isinstance(tags, np.ndarray) and tags.ndim == 2):
        matrix = sparse.csr_matrix(tags, copy=True)
        matrix.eliminate_zeros()
        matrix.sum_duplicates()
        matrix.data = np.ones(matrix.nnz, dtype=np.int8)
        return matrix, list(range(matrix.shape[1]))
    sets = [_as_tags(t) for t in tags]
    labels = list(set(chain.from_iterable(sets)))
    try:
        labels.sort()
    except TypeError:
        labels.sort(key=lambda t: (type(t).__name__, str(t)))
    place = {label: i for i, label in enumerate(labels)}
    indptr = np.zeros(len(sets) + 1, dtype=np.int64)
    np.cumsum(np.fromiter(map(len, sets), np.int64, len(sets)), out=indptr[1:])
    indices = np.fromiter(map(place.__getitem__, chain.from_iterable(sets)), np.int64, indptr[-1])
    matrix = sparse.csr_matrix((np.ones(len(indices), np.int8), indices, indptr), shape=(len(sets), len(labels)))
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix, labels


def _as_tags(value: Any) -> Any:
    if value is None:
        return ()
    return value if isinstance(value, (list, tuple, set, frozenset, np.ndarray)) else (value,)


def _vectors(given: Any, labels: list[Any]) -> np.ndarray:
    """One row a tag, in the order of `labels`."""
    if isinstance(given, Mapping):
        missing = [label for label in labels if label not in given]
        if missing:
            raise DataError(f"The tag {missing[0]!r} has no embedding ({len(missing)} of {len(labels)} tags have none).")
        return np.asarray([np.asarray(given[label], np.float64) for label in labels])
    vectors = np.asarray(given, dtype=np.float64)
    if vectors.ndim != 2 or len(vectors) != len(labels):
        raise DataError(f"There are {len(labels)} tags, but the tag embeddings have the shape {vectors.shape}.")
    return vectors


@register("mig", paper=33)
@dataclass
class MIG(Selector):
    """Pick the rows that add most to the information spread over a graph of tags: quality and diversity in one number.

    v_ia = q_i for the tags a of row i (`normalise`: q_i over its number of tags), x_i = v_i P with P the graph of near tags (cosine >= `threshold`, neighbours
    times `propagation`, columns divided by their sums); F(S) = sum_a phi(sum_{i in S} x_ia), phi(z) = (z + smoothing)^power. Greedy by the
    first-order gain <x_i, phi'(X)>, as released; `gain: exact` takes the textbook's difference, which overestimates large rows less. Rows of one
    tag set are one candidate, gains never rise, so few are computed anew: the same picks as the dense greedy at a fraction of its cost.

    Tags come from the column `tags`; without one, rows are clustered by their embeddings and the clusters are the tags. Quality comes from a column,
    or is the same for all. Rows without tags can never be chosen: `why` counts them; if they are needed to fill the budget, they come last."""

    tags: str | None = None
    """Column with each row's tags (a list, or one tag); empty: clusters of embeddings."""
    quality: str | None = None
    """Column with each row's quality; `loss`: 1 / perplexity under the run's model, where no column has that name; empty: all alike."""
    tag_embeddings: str | None = None
    """A json file {tag: vector}; empty: by `embedder`, and without one no tag is near another (clusters: their centres)."""
    threshold: float = 0.9
    """Least cosine of near tags."""
    propagation: float = 1.0
    """Weight of what near tags receive."""
    power: float = 0.8
    """b of phi(z) = (z + a)^b; 1 is no diversity at all."""
    smoothing: float = 1e-6
    """a of phi."""
    phi: Literal["power", "exp"] = "power"
    """exp: phi(z) = 1 - exp(-rate z)."""
    rate: float = 1.0
    """Of phi = exp."""
    normalise: bool = False
    """Share a row's quality among its tags, so that rows of many tags do not win by that."""
    gain: Literal["gradient", "exact"] = "gradient"
    """First-order gain (the release) or the exact one."""
    clusters: int = 64
    """How many clusters stand in for tags."""
    embeddings: str | None = None
    """Column with vectors for the clusters; empty: the model's own embeddings."""
    embedder: str | None = None
    """A helper, one of `models:` or a model to load (minilm ...) that embeds the tags' words, or where there are no tags the rows' texts."""

    toy: ClassVar[dict[str, Any]] = {"clusters": 3}

    def __post_init__(self) -> None:
        if not 0 < self.power <= 1 or self.smoothing <= 0 or self.rate <= 0 or self.propagation < 0 or not 0 < self.threshold <= 1 or self.clusters < 1:
            raise RecipeError(
                "mig needs 0 < power <= 1, smoothing > 0, rate > 0, propagation >= 0, 0 < threshold <= 1 and clusters >= 1; "
                f"got {self.power}, {self.smoothing}, {self.rate}, {self.propagation}, {self.threshold} and {self.clusters}."
            )

    def select(self, rows: Any, budget: int | float | str, ctx: Context | None = None) -> Picks:
        n = count(rows)
        wanted = budget_of(budget, n)
        if not n:
            return Picks(np.zeros(0, np.int64))
        quality = self._quality(rows, n, ctx)
        tags, vectors = self._tags(rows, ctx)
        picked, facts = mig(
            tags, quality, wanted, vectors, self.threshold, self.propagation, self.power, self.smoothing, self.phi, self.rate,
            self.normalise, self.gain, with_info=True,
        )  # fmt: skip
        scores = np.full(n, np.nan)
        scores[picked[: len(facts["gains"])]] = facts["gains"]
        short = wanted - len(picked)
        if short > 0:
            rest = np.setdiff1d(np.arange(n), picked)
            picked = np.concatenate([picked, generator(ctx, "mig").permutation(rest)[:short]])
        why = {k: facts[k] for k in ("tags", "edges", "tag_sets", "without_tags", "unreachable")}
        return Picks(picked, scores=scores, why={**why, "filled by chance": max(0, short)})

    def _quality(self, rows: Any, n: int, ctx: Context | None) -> np.ndarray:
        if self.quality is None:
            return np.ones(n)
        if self.quality == "loss" and ctx is not None and not has_column(rows, "loss"):
            return np.exp(-np.asarray(ctx.signal("loss", rows), np.float64))
        return numbers(rows, self.quality, "quality")

    def _tags(self, rows: Any, ctx: Context | None) -> tuple[Any, Any]:
        """Each row's tags, and the vectors of the tags where there are any."""
        if self.tags is not None:
            vectors = None
            if self.tag_embeddings is not None:
                try:
                    vectors = json.loads(Path(self.tag_embeddings).read_text(encoding="utf-8"))
                except (OSError, ValueError) as error:
                    raise RecipeError(f"mig.tag_embeddings names {self.tag_embeddings}, which cannot be read as json: {error}") from error
            tags = named_column(rows, self.tags)
            if vectors is None and self.embedder is not None and ctx is not None:
                words = sorted({str(t) for row in tags for t in _as_tags(row)})
                found = ctx.signal("embedding", [{"text": w} for w in words], embedder=self.embedder)
                tags, vectors = [[str(t) for t in _as_tags(row)] for row in tags], dict(zip(words, found))
            return tags, vectors
        labels, centres = kmeans(embeddings(rows, ctx, self.embeddings, self.embedder), min(self.clusters, max(1, count(rows))), seed=0 if ctx is None else ctx.seed)
        # about their mean: the vectors of a language model all point one way, and every cluster would be near every other
        centres = centres - np.nanmean(centres, axis=0)
        return [[int(c)] for c in labels], {c: centres[c] for c in range(len(centres))}
