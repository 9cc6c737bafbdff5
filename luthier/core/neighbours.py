"""Clusters and neighbours of vectors: seeded, self excluded, empty clusters kept in the index."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

LARGE = 50_000
"""From so many points on, k-means runs on mini-batches and neighbours are searched by faiss where it is installed."""


def knn(x: Any, k: int, among: Any = None, metric: Literal["euclidean", "cosine"] = "euclidean", distinct: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(distances, indices) [n, k] of each point's nearest other points, nearest first.

    `among`: search in these points instead (then nothing is excluded). "cosine": 1 - cosine. `distinct`: only one of several equal points
    counts, and none that equals the point itself. Distances in fp64."""
    x = _unit(x, metric)
    pool = x if among is None else _unit(among, metric)
    kept = np.sort(np.unique(pool, axis=0, return_index=True)[1]) if distinct else np.arange(len(pool))
    spare = 1 if among is None or distinct else 0
    if len(kept) < k + (1 if among is None else 0):
        raise ValueError(f"{len(kept)} {'different ' if distinct else ''}points do not each have {k} neighbours.")
    found = _nearest(x, pool[kept], min(len(kept), k + spare))
    index = kept[found]
    distance = np.stack([np.linalg.norm(pool[column] - x, axis=1) for column in index.T], 1)
    if spare:
        # A duplicate may come before the point itself: drop the point wherever it stands, else the last.
        own = distance == 0 if distinct else index == np.arange(len(x))[:, None]
        own &= own.cumsum(1) == 1
        own[~own.any(1), -1] = index.shape[1] > k
        if index.shape[1] > k:
            distance, index = distance[~own].reshape(len(x), k), index[~own].reshape(len(x), k)
    return (distance**2 / 2 if metric == "cosine" else distance), index


def _unit(x: Any, metric: str) -> np.ndarray:
    x = np.ascontiguousarray(x, dtype=np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300) if metric == "cosine" else x


def _nearest(x: np.ndarray, pool: np.ndarray, k: int) -> np.ndarray:
    if len(pool) >= LARGE:
        try:
            import faiss
        except ImportError:
            pass
        else:
            index = faiss.IndexFlatL2(pool.shape[1])
            centre = pool.mean(0)  # fp32 loses what a common offset leaves of the differences
            index.add(np.ascontiguousarray(pool - centre, dtype=np.float32))
            return index.search(np.ascontiguousarray(x - centre, dtype=np.float32), k)[1]
    from sklearn.neighbors import NearestNeighbors

    return NearestNeighbors(n_neighbors=k).fit(pool).kneighbors(x, return_distance=False)


def kmeans(x: Any, k: int, seed: int = 0, restarts: int = 5, iterations: int = 300, fixed: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """(labels [n], centres [k, d]) by Lloyd's algorithm from k-means++ starts, the best of `restarts`.

    `fixed`: known centres, which stay as they are and come first. At most as many clusters are used as there are different points; labels run
    over 0..k-1, some may be empty, and the centres of clusters that never held a point are NaN."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    if not len(x):
        return np.zeros(0, np.int64), np.full((k, x.shape[-1]), np.nan, np.float32)
    if fixed is not None:
        return _with_fixed(x, k, np.asarray(fixed, np.float32), seed, restarts, iterations)
    from sklearn.cluster import KMeans, MiniBatchKMeans

    real = min(k, len(np.unique(x, axis=0)) if len(x) < LARGE else len(x))
    options = {"n_init": restarts, "max_iter": iterations, "random_state": seed}
    fitted = (KMeans(real, **options) if len(x) < LARGE else MiniBatchKMeans(real, batch_size=4096, **options)).fit(x)
    centres = np.full((k, x.shape[1]), np.nan, np.float32)
    centres[:real] = fitted.cluster_centers_
    return fitted.labels_.astype(np.int64), centres


def _with_fixed(x: np.ndarray, k: int, fixed: np.ndarray, seed: int, restarts: int, iterations: int) -> tuple[np.ndarray, np.ndarray]:
    if len(fixed) > k:
        raise ValueError(f"{len(fixed)} known centres do not fit into {k} clusters.")
    from sklearn.metrics import pairwise_distances_argmin_min

    best: tuple[float, np.ndarray, np.ndarray] | None = None
    for restart in range(restarts):
        rng = np.random.default_rng([seed, restart])
        centres = fixed
        while len(centres) < k:  # k-means++ from the known centres on
            far = pairwise_distances_argmin_min(x, centres)[1] ** 2 if len(centres) else np.ones(len(x))
            share = far / far.sum() if far.sum() > 0 else np.full(len(x), 1 / len(x))
            centres = np.concatenate([centres, x[rng.choice(len(x), p=share)][None]])
        labels = np.full(len(x), -1)
        for _ in range(iterations):
            new, distance = pairwise_distances_argmin_min(x, centres)
            if np.array_equal(new, labels):
                break
            labels, centres = new, centres.copy()
            for c in range(len(fixed), k):
                if (labels == c).any():
                    centres[c] = x[labels == c].mean(0)
        inertia = float((distance**2).sum())
        if best is None or inertia < best[0]:
            best = inertia, labels, centres
    assert best is not None
    return best[1].astype(np.int64), best[2]


def assign(cost: Any, maximise: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(rows, columns) of the one-to-one assignment of least (or largest) cost (Hungarian)."""
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(np.asarray(cost, float), maximize=maximise)


def cluster_accuracy(truth: Any, found: Any) -> float:
    """The share of points that are right when clusters are named one to one as well as possible."""
    truth, found = (np.unique(np.asarray(v), return_inverse=True)[1] for v in (truth, found))
    table = np.zeros((truth.max(initial=-1) + 1, found.max(initial=-1) + 1))
    np.add.at(table, (truth, found), 1)
    return float(table[assign(table, maximise=True)].sum() / max(1, len(truth)))
