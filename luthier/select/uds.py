"""Utility-Diversity Aware Online Batch Selection for LLM Supervised Fine-tuning (paper 13)."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from luthier.catalog import register
from luthier.core.context import seed_of
from luthier.errors import RecipeError
from luthier.select import Selector

if TYPE_CHECKING:
    from luthier.core.batch import Batch
    from luthier.core.context import Context


def nuclear_norm(logits: Tensor) -> Tensor:
    """Sum of the singular values of [L, V] logits, by the eigenvalues of the smaller Gram matrix (float64)."""
    z = logits.double()
    gram = z @ z.T if z.shape[0] <= z.shape[1] else z.T @ z
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum().float()


class Sketch:
    """A fixed random two-sided subsampled transform: [L, V] logits -> rows * columns numbers with E||s||^2 about ||Z||_F^2.

    Columns times random signs, an orthonormal transform along the vocabulary, `columns` random entries, scaled by sqrt(V / columns); then
    the same along the positions. "dct" is the orthonormal cosine transform; "fft" the real part of the Fourier transform as in the release (not
    an exact isometry); "gaussian" a Gaussian matrix on either side."""

    def __init__(self, vocabulary: int, positions: int, rows: int = 8, columns: int = 128, kind: Literal["dct", "fft", "gaussian"] = "dct", seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed_of(seed, "uds", vocabulary, positions, rows, columns, kind))
        self.positions, self.kind = positions, kind
        self.right = _side(vocabulary, min(columns, vocabulary), kind, g)
        self.left = _side(positions, min(rows, positions), kind, g)

    def __call__(self, logits: Tensor) -> Tensor:
        z = logits.float().cpu()[: self.positions]
        z = self.right(z)
        padded = torch.zeros(self.positions, z.shape[1])
        padded[: len(z)] = z
        return self.left(padded.T).T.flatten()


def _side(size: int, keep: int, kind: str, g: torch.Generator) -> Any:
    """A map of the last dimension from `size` to `keep` numbers."""
    if kind == "gaussian":
        matrix = torch.randn(size, keep, generator=g) / keep**0.5
        return lambda x: x @ matrix
    signs = torch.randint(0, 2, (size,), generator=g).float() * 2 - 1
    chosen = torch.randperm(size, generator=g)[:keep]
    scale = (size / keep) ** 0.5
    if kind == "fft":
        return lambda x: torch.fft.fft(x * signs, norm="ortho").real[..., chosen] * scale

    def cosine(x: Tensor) -> Tensor:
        from scipy.fft import dct

        return torch.from_numpy(np.ascontiguousarray(dct((x * signs).numpy(), norm="ortho", axis=-1)[..., chosen.numpy()])) * scale

    return cosine


def uds(logits: SequenceOf[Tensor], memory: Tensor | None = None, sketch: Any = None, alpha: float = 2e-3, scale: Literal["none", "zscore"] = "none") -> tuple[Tensor, Tensor]:
    """(score of every row, its sketch): U_i + alpha D_i.

    U_i = ||Z_i||_*, the nuclear norm of the row's logits; D_i = mean Euclidean distance of its sketch to the memory's, 0 when that is empty.
    `scale` "zscore" standardises both over the rows first, since their sizes depend on vocabulary, length and model."""
    utility = torch.stack([nuclear_norm(z) for z in logits])
    sketches = torch.stack([sketch(z) for z in logits]) if sketch is not None else torch.zeros(len(logits), 1)
    distance = torch.zeros(len(logits)) if memory is None or not len(memory) else torch.cdist(sketches, memory.to(sketches)).mean(1)
    if scale == "zscore":
        utility, distance = _standard(utility), _standard(distance)
    return utility.cpu() + alpha * distance, sketches


def _standard(x: Tensor) -> Tensor:
    spread = x.std(unbiased=False)
    return (x - x.mean()) / spread if float(spread) > 0 else torch.zeros_like(x)


@register("uds", paper=13)
@dataclass
class UDS(Selector):
    """Show the model more rows than it learns from, and keep those whose logits are strong, varied and unlike what it learned from lately.

    Online, before the backward pass: `candidates` times the batch is scored in one forward pass without labels or gradient (in eval mode: dropout would
    make scores noisy; the release leaves train mode on). Utility is the nuclear norm of the row's logits, diversity the mean distance of a
    random sketch of them to those of the last `memory` kept rows. The best batch-sized share is kept and trained on as usual. Padding never enters the logits
    (in the release it does); rows longer than `positions` are cut for the score. alpha 2e-3 is for 7B models at V = 32,000 and must be retuned:
    `scale: zscore` puts both parts on one scale, with alpha about 1. Long rows have larger norms: compare rows of like length."""

    candidates: float = 4.0
    """How many rows are scored for each one kept (B / K)."""
    alpha: float = 2e-3
    """Weight of diversity."""
    scale: Literal["none", "zscore"] = "none"
    """Standardise utility and diversity over the candidates."""
    memory: int = 1024
    """Sketches of kept rows that are remembered, first in, first out."""
    projection: Literal["dct", "fft", "gaussian"] = "dct"
    """How logits are sketched; fft is the release's."""
    sketch_rows: int = 8
    """r1 of the sketch, along positions."""
    sketch_columns: int = 128
    """r2 of the sketch, along the vocabulary."""
    positions: int = 512
    """Longest row that is scored whole."""
    start: int = 0
    """First step at which rows are chosen; before it the first of the candidates are taken."""
    _sketch: Any = field(default=None, init=False, repr=False)

    toy: ClassVar[dict[str, Any]] = {"candidates": 2.0, "positions": 16, "sketch_columns": 8, "sketch_rows": 2}

    def __post_init__(self) -> None:
        if self.candidates < 1 or self.alpha < 0 or min(self.memory, self.sketch_rows, self.sketch_columns, self.positions) < 1:
            raise RecipeError("uds needs candidates >= 1, alpha >= 0, and memory, sketch_rows, sketch_columns and positions of at least 1.")
        self.oversample = float(self.candidates)

    def pick(self, batch: Batch, row_scores: Mapping[str, Any], ctx: Context | None = None) -> Tensor:
        logits = [z[: self.positions] for z in row_scores["logits"]]
        queue = None if ctx is None else ctx.queue("uds", self.memory)
        if self._sketch is None:
            self._sketch = Sketch(logits[0].shape[-1], self.positions, self.sketch_rows, self.sketch_columns, self.projection, 0 if ctx is None else ctx.seed)
        known = queue["sketch"] if queue is not None and len(queue) else None
        scores, sketches = uds(logits, known, self._sketch, self.alpha, self.scale)
        kept = scores.argsort(descending=True, stable=True)[: max(1, round(len(logits) / self.candidates))]
        weights = torch.zeros(len(logits))
        weights[kept] = 1
        if queue is not None:
            chosen = kept.sort().values
            queue.push(np.asarray(batch.ids)[chosen.numpy()], sketch=sketches[chosen])
            ctx.log(uds_utility=float(scores[kept].mean()))  # type: ignore[union-attr]
        return weights
