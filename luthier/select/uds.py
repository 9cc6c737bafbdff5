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
from luthier.core.store import Queue
from luthier.errors import RecipeError
from luthier.select import Selector

if TYPE_CHECKING:
    from luthier.core.batch import Batch
    from luthier.core.context import Context


Kind = Literal["fft", "dct", "gaussian"]


def nuclear_norm(logits: Tensor) -> Tensor:
    """Sum of the singular values of [L, V] logits, by the eigenvalues of the smaller Gram matrix (float64)."""
    z = logits.double()
    gram = z @ z.T if z.shape[0] <= z.shape[1] else z.T @ z
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum().float()


class Sketch:
    """A fixed random two-sided subsampled transform of [L, V] logits to rows * columns numbers: s = A Z B.

    B flips the signs of the V columns, transforms along them, keeps `columns` random entries and scales by sqrt(V / columns); A does the same to
    the positions, a shorter Z counting as padded with zeros. "fft" is the release's: the real part of the *unnormalised* Fourier transform, so
    distances are about sqrt(T V) / 2 times those of Z, and the paper's alpha belongs to that size. "dct" (orthonormal cosine transform) and
    "gaussian" keep sizes: E||s||^2 = ||Z||_F^2. `signs` and `kept` (one each for positions and vocabulary) replace what is drawn from the seed."""

    def __init__(self, vocabulary: int, positions: int, rows: int = 8, columns: int = 128, kind: Kind = "fft", seed: int = 0, signs: Any = None, kept: Any = None) -> None:
        g = torch.Generator().manual_seed(seed_of(seed, "uds", vocabulary, positions, rows, columns, kind))
        self.kind, self.sizes = kind, (positions, vocabulary)
        if kind == "gaussian":
            self.left, self.right = (torch.randn(n, k, generator=g) / k**0.5 for n, k in zip(self.sizes, (rows, columns)))
            return
        drawn = [torch.randint(0, 2, (n,), generator=g) * 2.0 - 1 for n in self.sizes]
        self.signs = drawn if signs is None else [torch.as_tensor(x, dtype=torch.float32) for x in signs]
        drawn = [torch.randperm(n, generator=g)[:k] for n, k in zip(self.sizes, (rows, columns))]
        self.kept = drawn if kept is None else [torch.as_tensor(x) for x in kept]
        self.left = _transform(torch.diag(self.signs[0]), kind)[:, self.kept[0]] * (positions / len(self.kept[0])) ** 0.5

    def __call__(self, logits: Tensor) -> Tensor:
        z = logits.float()[: self.sizes[0]]
        if z.shape[1] != self.sizes[1]:
            raise ValueError(f"This sketch is of {self.sizes[1]} classes, not of {z.shape[1]}.")
        # A first: it leaves a few rows, so the transform along the vocabulary costs little
        z = self.left[: len(z)].T.to(z) @ z
        if self.kind == "gaussian":
            return (z @ self.right.to(z)).flatten()
        kept = self.kept[1].to(z.device)
        return (_transform(z * self.signs[1].to(z), self.kind)[:, kept] * (self.sizes[1] / len(kept)) ** 0.5).flatten()


def _transform(x: Tensor, kind: str) -> Tensor:
    """Along the last dimension: the real part of the Fourier transform, or the orthonormal cosine transform (DCT-II)."""
    if kind == "fft":
        return torch.fft.fft(x).real
    n = x.shape[-1]
    # the DCT of x from the Fourier transform of its even entries followed by its odd ones backwards
    phase = torch.exp(-1j * torch.pi * torch.arange(n, device=x.device) / (2 * n))
    out = (torch.fft.fft(torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], -1)) * phase).real * (2 / n) ** 0.5
    out[..., 0] /= 2**0.5
    return out


def uds(logits: SequenceOf[Tensor], memory: Tensor | None = None, sketch: Any = None, alpha: float = 2e-3, scale: Literal["none", "zscore"] = "none") -> tuple[Tensor, Tensor]:
    """(score of every row, its sketch): U_i + alpha D_i.

    U_i = ||Z_i||_*, the nuclear norm of the row's logits; D_i = mean Euclidean distance of its sketch to the memory's, 0 when that is empty.
    `scale` "zscore" standardises both over the rows first, since their sizes depend on vocabulary, length and model."""
    utility = torch.stack([nuclear_norm(z) for z in logits]).cpu()
    sketches = torch.stack([sketch(z) for z in logits]).cpu() if sketch is not None else torch.zeros(len(logits), 1)
    distance = torch.zeros(len(logits)) if memory is None or not len(memory) else torch.cdist(sketches, memory.to(sketches)).mean(1)
    if scale == "zscore":
        utility, distance = _standard(utility), _standard(distance)
    return utility + alpha * distance, sketches


def _standard(x: Tensor) -> Tensor:
    spread = x.std(unbiased=False)
    return (x - x.mean()) / spread if float(spread) > 0 else torch.zeros_like(x)


@register("uds", paper=13)
@dataclass
class UDS(Selector):
    """Show the model more rows than it learns from, and keep those whose logits are strong, varied and unlike what it learned from lately.

    Online, before the backward pass: `candidates` times the batch is scored in one forward pass without labels or gradient (in eval mode: dropout would
    make scores noisy; the release leaves train mode on). Utility is the nuclear norm of the row's logits at all positions, prompt included; diversity the
    mean distance of a random sketch of them to those of the last `memory` kept rows. The best 1 / `candidates` of each `group` are kept and trained on as usual.
    Padding never enters the logits (in the release it does); rows longer than `positions` are cut for the score. alpha 2e-3 is for 7B models and the `fft`
    sketch, whose distances grow with the square root of vocabulary and positions; with another model or sketch it must be retuned, or `scale: zscore` puts
    both parts on one scale, with alpha about 1. Long rows have larger norms: compare rows of like length."""

    candidates: float = 4.0
    """How many rows are scored for each one kept (B / K)."""
    alpha: float = 2e-3
    """Weight of diversity."""
    scale: Literal["none", "zscore"] = "none"
    """Standardise utility and diversity over the rows that are compared."""
    memory: int = 1024
    """Sketches of kept rows that are remembered, first in, first out."""
    group: int = 0
    """Rows that are compared with each other, the memory growing from group to group (the release: micro-batches of 4); 0: all candidates."""
    projection: Literal["fft", "dct", "gaussian"] = "fft"
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
    _own: Any = field(default=None, init=False, repr=False)

    toy: ClassVar[dict[str, Any]] = {"candidates": 2.0, "positions": 16, "sketch_columns": 8, "sketch_rows": 2}

    def __post_init__(self) -> None:
        if self.candidates < 1 or self.alpha < 0 or min(self.memory, self.sketch_rows, self.sketch_columns, self.positions) < 1:
            raise RecipeError("uds needs candidates >= 1, alpha >= 0, and memory, sketch_rows, sketch_columns and positions of at least 1.")
        if self.group < 0 or 0 < self.group < self.candidates or self.start < 0:
            raise RecipeError(f"uds.group is 0 or at least candidates ({self.candidates:g}) and uds.start at least 0, not {self.group} and {self.start}.")
        self.oversample = float(self.candidates)

    def pick(self, batch: Batch, row_scores: Mapping[str, Any], ctx: Context | None = None) -> Tensor:
        n = len(batch)
        weights = torch.zeros(n)
        if ctx is not None and ctx.clock.step < self.start:
            weights[: max(1, round(n / self.candidates))] = 1
            return weights
        logits = [z[: self.positions] for z in row_scores["logits"]]
        if self._own is None:
            self._own = Queue(self.memory)
        queue = self._own if ctx is None else ctx.queue("uds", self.memory)
        for start in range(0, n, self.group or n or 1):
            rows = np.arange(start, min(n, start + (self.group or n)))
            kept, sketches = self._best([logits[i] for i in rows], queue, ctx)
            weights[rows[kept]] = 1
            queue.push(np.asarray(batch.ids)[rows[kept]], sketch=sketches[kept])
        return weights

    def _best(self, logits: list[Tensor], queue: Queue, ctx: Context | None) -> tuple[Tensor, Tensor]:
        """Which of the rows are kept, in the batch's order, and all their sketches."""
        if self._sketch is None or self._sketch.sizes[1] != logits[0].shape[-1]:
            seed = 0 if ctx is None else ctx.seed
            self._sketch = Sketch(logits[0].shape[-1], self.positions, self.sketch_rows, self.sketch_columns, self.projection, seed)
        scores, sketches = uds(logits, queue["sketch"] if len(queue) else None, self._sketch, self.alpha, self.scale)
        kept = scores.argsort(descending=True, stable=True)[: max(1, round(len(logits) / self.candidates))]
        if ctx is not None:
            ctx.log(uds_utility=float(scores[kept].mean()))
        return kept.sort().values, sketches
