"""Clusters and neighbours of vectors: seeded, self excluded, empty clusters kept in the index."""

from __future__ import annotations

from typing import Any

import numpy as np

LARGE = 50_000
"""From so many points on, k-means runs on mini-batches."""


def knn(x: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(distances, indices) [n, k] of each point's nearest other points, Euclidean, nearest first."""
    from sklearn.neighbors import NearestNeighbors

    x = np.ascontiguousarray(x, dtype=np.float64)
    if len(x) <= k:
        raise ValueError(f"{len(x)} points do not each have {k} neighbours.")
    distance, index = NearestNeighbors(n_neighbors=k + 1).fit(x).kneighbors(x)
    # A duplicate may come before the point itself: drop the point wherever it stands, else the last.
    own = index == np.arange(len(x))[:, None]
    own[~own.any(1), -1] = True
    return distance[~own].reshape(len(x), k), index[~own].reshape(len(x), k)


def kmeans(x: Any, k: int, seed: int = 0, restarts: int = 5, iterations: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """(labels [n], centres [k, d]) by Lloyd's algorithm from k-means++ starts, the best of `restarts`. At most n clusters are used;
    labels run over 0..k-1 and some may be empty."""
    from sklearn.cluster import KMeans, MiniBatchKMeans

    x = np.ascontiguousarray(x, dtype=np.float32)
    real = min(k, len(np.unique(x, axis=0)) if len(x) < LARGE else len(x))
    kind = KMeans if len(x) < LARGE else MiniBatchKMeans
    fitted = kind(real, n_init=restarts, max_iter=iterations, random_state=seed).fit(x)
    centres = np.full((k, x.shape[1]), np.nan, np.float32)
    centres[:real] = fitted.cluster_centers_
    return fitted.labels_.astype(np.int64), centres


def assign(cost: Any) -> tuple[np.ndarray, np.ndarray]:
    """(rows, columns) of the one-to-one assignment of least cost (Hungarian)."""
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(np.asarray(cost, float))
