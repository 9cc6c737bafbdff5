"""Crop pairs: two random crops of a passage are a question and its answer (paper 154, Contriever)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from luthier.catalog import register
from luthier.core.context import seed_of
from luthier.errors import RecipeError
from luthier.objective.contriever import crop
from luthier.synthesize import Synthesizer
from luthier.synthesize._shared import listed, need

if TYPE_CHECKING:
    from luthier.core.context import Context


def crop_pairs(words: list[str], rng: np.random.Generator, low: float = 0.05, high: float = 0.5, delete: float = 0.1, mode: str = "crop") -> tuple[str, str]:
    """(anchor, positive) of one passage. crop: two independent spans of floor(r n) words, r ~ U(low, high), each word then deleted with
    probability `delete`; inverse-cloze: a span, and the passage without it."""
    places = np.arange(len(words))
    if mode == "crop":
        views = [crop(places, rng, low, high, delete) for _ in range(2)]
    else:
        span = crop(places, rng, low, high, 0.0)
        rest = np.setdiff1d(places, span)
        views = [span, rest if len(rest) else span]
    anchor, positive = (" ".join(words[i] for i in view) for view in views)
    return anchor, positive


@register("crop-pairs", paper=154)
@dataclass
class CropPairs(Synthesizer):
    """Make pairs for a retriever out of plain text: two independent random crops of the same passage belong together.

    A passage is cut into chunks of `chunk` words from a random offset; each gives `views` pairs: two contiguous spans of floor(r n) words,
    r ~ U(low, high), uniform start, then each word is deleted with probability `delete` (at least one stays). The spans may overlap, which
    is nearer to how questions share words with answers than the inverse cloze task (`mode: inverse-cloze`), where the span is taken out.
    Words, not tokens, are cropped, so that any objective on pairs can follow (`info-nce` gives the in-batch variant); the pairs are made
    once. `objective: contriever` draws fresh crops at every visit and adds the momentum queue. Text shorter than two words is left out."""

    views: int = 1
    """Pairs a chunk."""
    chunk: int = 256
    """Words of a chunk."""
    low: float = 0.05
    """Shortest crop, as a share of the chunk."""
    high: float = 0.5
    """Longest crop."""
    delete: float = 0.1
    """Probability that a word of a crop is deleted."""
    mode: Literal["crop", "inverse-cloze"] = "crop"
    """What belongs together."""
    column: str = "text"
    """Column of the text."""
    report: dict[str, Any] = field(default_factory=dict, init=False)

    columns = (frozenset({"text"}),)

    def __post_init__(self) -> None:
        if self.views < 1 or self.chunk < 2 or not 0 < self.low <= self.high <= 1 or not 0 <= self.delete < 1:
            raise RecipeError(
                f"crop-pairs needs views >= 1, chunk >= 2, 0 < low <= high <= 1 and 0 <= delete < 1; got {self.views}, {self.chunk}, {self.low}, {self.high} and {self.delete}."
            )
        if self.mode not in ("crop", "inverse-cloze"):
            raise RecipeError(f"crop-pairs.mode is 'crop' or 'inverse-cloze', not {self.mode!r}.")

    def synthesize(self, rows: Any, ctx: Context | None = None) -> Any:
        rng = np.random.default_rng(seed_of(0 if ctx is None else ctx.seed, "crop-pairs"))
        made, short = [], 0
        for i, row in enumerate(listed(rows)):
            need(row, [self.column], "crop-pairs", i)
            words = row[self.column].split()
            if len(words) < 2:
                short += 1
                continue
            rest = {k: v for k, v in row.items() if k != self.column}
            start = int(rng.integers(0, self.chunk)) if len(words) > self.chunk else 0
            cuts = sorted({0, *range(start, len(words), self.chunk), len(words)})
            for a, b in itertools.pairwise(cuts):
                if b - a < 2:
                    continue
                for _ in range(self.views):
                    anchor, positive = crop_pairs(words[a:b], rng, self.low, self.high, self.delete, self.mode)
                    made.append({**rest, "anchor": anchor, "positive": positive})
        self.report = {"pairs": len(made), "too short": short}
        return made
