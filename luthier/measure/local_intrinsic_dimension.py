"""Less is More: Local Intrinsic Dimensions of Contextual Language Models (paper 39)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.catalog import register
from luthier.core.batch import TokenForest
from luthier.errors import RecipeError
from luthier.measure import Measure, Measures

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


def two_nn(r1: np.ndarray, r2: np.ndarray, discard: float = 0.1) -> np.ndarray:
    """TwoNN dimension of each row of nearest and second-nearest distances [clouds, points].

    mu = r2 / r1, sorted; the largest `discard` are dropped; the slope through the origin of -log(1 - F) against log mu, F = i / n for i = 1, 2, ..."""
    n = r1.shape[1]
    mu = np.sort(r2 / r1, axis=1)
    keep = min(int(n * (1 - discard)), n - 1)  # F = 1 has no logarithm
    x = np.log(mu[:, :keep])
    y = -np.log(1 - np.arange(1, keep + 1) / n)
    return (x * y).sum(1) / np.maximum((x * x).sum(1), 1e-300)


def local_intrinsic_dimension(points: np.ndarray, neighbours: int = 128, discard: float = 0.1) -> np.ndarray:
    """The TwoNN dimension of the cloud of each point's `neighbours` nearest neighbours (the point itself not among them).

    Euclidean, in float64; points should be distinct. Distances inside a neighbourhood are taken within it."""
    x = np.asarray(points, np.float64)
    x = x - x.mean(0)
    if len(x) <= neighbours:
        raise ValueError(f"{len(x)} points cannot each have {neighbours} neighbours.")
    from sklearn.neighbors import NearestNeighbors

    nearest = NearestNeighbors(n_neighbors=neighbours + 1).fit(x).kneighbors(x, return_distance=False)
    # The query point comes back as its own nearest neighbour; with rounding it may not come first.
    out = np.empty(len(x))
    for i, found in enumerate(nearest):
        cloud = x[found[found != i][:neighbours]]
        out[i] = _cloud_dimension(cloud, discard)
    return out


def _cloud_dimension(cloud: np.ndarray, discard: float) -> float:
    centred = cloud - cloud.mean(0)
    square = (centred * centred).sum(1)
    distance = square[:, None] + square[None] - 2 * centred @ centred.T
    np.fill_diagonal(distance, np.inf)
    two = np.sqrt(np.maximum(np.partition(distance, 1, axis=1)[:, :2], 0))
    return float(two_nn(two[None, :, 0], two[None, :, 1], discard)[0])


@register("local-intrinsic-dimension", paper=39)
@dataclass
class LocalIntrinsicDimension(Measure):
    """The mean local dimension of token embeddings, a label-free monitor: it falls as a model starts to generalise and rises as it overfits.

    Token vectors of a hidden layer (the last by default) of `sequences` rows are pooled, exact duplicates removed, `tokens` of them drawn
    with a fixed seed; each one's `neighbours` nearest neighbours form a small cloud whose dimension TwoNN estimates (largest 10 % of mu
    discarded). Values depend on `tokens` and `neighbours`: compare only equal settings. With `every` set the monitor's rules speak
    (their thresholds are ours): `exhausted`, less than 1 % change over 5 measurements; `overfitting`, rising for 3 after the minimum;
    `generalising`, 15 % below the plateau. A fall may also be a collapse of the representation: read it beside accuracy."""

    sequences: int = 512
    """Rows sampled."""
    tokens: int = 500
    """Token vectors in the point cloud."""
    neighbours: int = 64
    """Neighbours that form each local cloud (the paper's large studies use 128 with 60,000 tokens)."""
    layer: int = -1
    """Hidden layer, -1 the last, as the head sees it."""
    stream: str = "test"
    """Which rows: test, train, val ..."""
    every: int = 0
    """Measure every so many steps while training; 0 only at the end."""
    seed: int = 0
    """Draws the same rows and tokens at every measurement."""
    history: list[float] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.neighbours < 4 or self.tokens <= self.neighbours:
            raise RecipeError(f"local-intrinsic-dimension needs tokens > neighbours >= 4, not tokens {self.tokens} and neighbours {self.neighbours}.")

    def measure(self, model: Family, rows: Any, ctx: Context | None = None) -> Measures:
        if self.stream != "test" and ctx is not None and ctx.has_rows(self.stream):
            rows = ctx.rows(self.stream)
        if rows is None or not len(rows) or "score" not in model.verbs:
            return Measures(notes=["There are no rows to embed, so the local dimension was not measured."])
        rng = np.random.default_rng(self.seed)
        chosen = [rows[int(i)] for i in sorted(rng.permutation(len(rows))[: self.sequences])]
        points = np.unique(self._vectors(model, chosen), axis=0)
        if len(points) <= self.neighbours:
            return Measures(notes=[f"Only {len(points)} distinct token vectors: too few for neighbourhoods of {self.neighbours}."])
        points = points[np.sort(rng.permutation(len(points))[: self.tokens])]
        if len(points) <= self.neighbours:
            return Measures(notes=[f"Only {len(points)} token vectors: too few for neighbourhoods of {self.neighbours}."])
        local = local_intrinsic_dimension(points, self.neighbours)
        self.history.append(float(local.mean()))
        out = Measures({"mean": float(local.mean()), "std": float(local.std()), "global": _cloud_dimension(points, 0.1)})
        out.notes = monitor(self.history)
        return out

    def _vectors(self, model: Any, rows: list[Any]) -> np.ndarray:
        from luthier.core.hooks import tap

        found = []
        for start in range(0, len(rows), 32):
            sequences = model.collate(rows[start : start + 32]).sequences
            forest = TokenForest.pack(sequences, share=False, pad=model.pad_id)
            if self.layer == -1:
                hidden = model.hidden(forest)
            else:
                site = _block_name(model, self.layer)
                with tap(model.network, [site]) as seen:
                    model.hidden(forest)
                hidden = seen[site]
            real = (forest.nodes >= 0).ravel()
            found.append(hidden.detach().flatten(0, 1).float().cpu().numpy()[real])
        return np.concatenate(found)

    def state_dict(self) -> dict[str, Any]:
        return {"history": list(self.history)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = list(state["history"])


def monitor(history: list[float]) -> list[str]:
    """What the course of the mean local dimension says; thresholds are ours."""
    said = []
    if len(history) >= 6 and abs(history[-1] - history[-6]) < 0.01 * abs(history[-6]):
        said.append("exhausted: the local dimension changed by less than 1 % over five measurements.")
    low = int(np.argmin(history))
    tail = history[low:]
    if len(tail) >= 4 and all(b > a for a, b in zip(tail[-4:], tail[-3:])):
        said.append("overfitting: the local dimension has risen three times since its minimum.")
    if len(history) >= 3 and history[-1] < 0.85 * float(np.median(history[:-1])):
        said.append("generalising: the local dimension fell 15 % below its plateau.")
    return said


def _block_name(model: Any, layer: int) -> str:
    from luthier.core.modelmap import ModelMap

    return ModelMap(model.network).blocks[layer][0]
