"""InfoNCE with in-batch negatives: the contrastive loss that embedding models are tuned with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from luthier.catalog import register
from luthier.core.loss import Loss
from luthier.errors import RecipeError
from luthier.objective import Contrastive
from luthier.objective._contrastive import branches, cached, nce_rows, same

if TYPE_CHECKING:
    from luthier.core.batch import Batch
    from luthier.core.context import Context
    from luthier.core.families import Family


def info_nce(query: Tensor, key: Tensor, temperature: float = 0.05, positive: Tensor | None = None, exclude: Tensor | None = None) -> Tensor:
    """One value a query: -log softmax(q.k / temperature) at its positive (default: the key of the same index).

    `key` may hold more rows than `query`: the rest are negatives. `exclude` [queries, keys] leaves pairs out of the denominator."""
    logits = query.float() @ key.float().T / temperature
    if positive is None:
        positive = torch.eye(len(query), len(key), dtype=torch.bool, device=logits.device)
    return nce_rows(logits, positive, exclude)[0]


@register("info-nce")
@dataclass
class InfoNCE(Contrastive):
    """Pull each anchor to its positive and push it from all other rows' positives and hard negatives of the batch.

    L = -log exp(s(a_i, p_i)/t) / sum_j exp(s(a_i, k_j)/t) over all positives and negatives k of the batch; s is the cosine
    (`normalise`) or the dot product. Equal texts are never each other's negatives. `symmetric` adds the loss from positives to anchors.
    `chunk` bounds memory: gradients are cached and exact, so the batch may be as large as wished. With one positive a row, no excluded
    duplicates and `normalise` this is sentence-transformers' MultipleNegativesRankingLoss at scale 1/temperature."""

    temperature: float = 0.05
    """Divides the similarities."""
    normalise: bool = True
    """Cosine instead of dot product."""
    symmetric: bool = False
    """Also rank anchors for each positive, and take the mean."""
    exclude_duplicates: bool = True
    """Equal texts are no negatives of each other."""
    chunk: int = 0
    """Rows embedded at a time with cached gradients; 0 embeds the batch at once."""

    columns = (frozenset({"anchor", "positive"}), frozenset({"image", "text"}))

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.chunk < 0:
            raise RecipeError(f"info-nce needs temperature > 0 and chunk >= 0, not {self.temperature} and {self.chunk}.")

    def loss(self, model: Family, batch: Batch, ctx: Context | None = None) -> Loss | Iterator[Loss]:
        def embed(part: Batch) -> list[Tensor]:
            return branches(model, part, _branches(batch), self.normalise)

        def rank(*columns: Tensor) -> Loss:
            return self._rank(batch, *columns)

        if self.chunk and len(batch) > self.chunk:
            return cached(embed, batch, self.chunk, rank)
        return rank(*embed(batch))

    def _rank(self, batch: Batch, anchor: Tensor, positive: Tensor, negative: Tensor | None = None) -> Loss:
        keys = positive if negative is None else torch.cat([positive, negative])
        weights = batch.row_weights.to(anchor.device)
        exclude = self._duplicates(batch, len(keys)).to(anchor.device) if self.exclude_duplicates else None
        values = info_nce(anchor, keys, self.temperature, exclude=exclude)
        if self.symmetric:
            back = exclude[:, : len(positive)].T if exclude is not None else None
            values = (values + info_nce(positive, anchor, self.temperature, exclude=back)) / 2
        return Loss().add("info_nce", values * weights, per="row")

    def _duplicates(self, batch: Batch, keys: int) -> Tensor:
        """[rows, keys] bool: the key's text equals the row's own positive or anchor, or belongs to an equal anchor."""
        n = len(batch)
        left, right = ("anchor", "positive") if batch.rows and "anchor" in batch.rows[0] else ("text", "image")
        texts = [_key(r.get(left)) for r in batch.rows], [_key(r.get(right)) for r in batch.rows]
        negatives = [_key(t) for r in batch.rows for t in _negatives(r)]
        every = same([*texts[0], *texts[1], *negatives])
        out = torch.zeros(n, keys, dtype=torch.bool)
        candidates = slice(n, 2 * n + max(0, keys - n))
        out |= every[n : 2 * n, candidates] | every[:n, candidates]
        out[:, :n] |= every[:n, :n]
        return out


def _branches(batch: Batch) -> tuple[str, ...]:
    return ("anchor", "positive", "negative") if any(s.branch == "anchor" for s in batch.sequences) else ("text", "image")


def _negatives(row: object) -> list[object]:
    found = row.get("negatives", row.get("negative")) if hasattr(row, "get") else None
    return [] if found is None else found if isinstance(found, list) else [found]


def _key(value: object) -> str:
    return value if isinstance(value, str) else str(id(value))
