"""Retrieval: does the model find the documents that belong to a question?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.catalog import register
from luthier.errors import RecipeError
from luthier.measure import Measure, Measures
from luthier.measure._shared import wilson

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


def retrieval(ranked: SequenceOf[int], relevant: Mapping[int, float], k: int = 10) -> dict[str, float]:
    """Of one question's ranking (documents, best first) against its relevant documents and their grades (1 for plain relevance).

    recall@k: relevant documents among the first k, over min(k, relevant); ndcg@k: sum of (2^grade - 1) / log2(rank + 1) over the best
    possible one; mrr@k: 1 / rank of the first relevant document, 0 beyond k."""
    first = list(ranked[:k])
    gain = sum((2 ** relevant.get(d, 0.0) - 1) / math.log2(i + 2) for i, d in enumerate(first))
    ideal = sum((2**g - 1) / math.log2(i + 2) for i, g in enumerate(sorted(relevant.values(), reverse=True)[:k]))
    hits = [i for i, d in enumerate(first) if relevant.get(d, 0.0) > 0]
    number = sum(g > 0 for g in relevant.values())
    return {
        "recall": len(hits) / min(k, number) if number else 0.0,
        "ndcg": gain / ideal if ideal else 0.0,
        "mrr": 1 / (hits[0] + 1) if hits else 0.0,
    }


@torch.no_grad()
def ranking(questions: Tensor, documents: Tensor, k: int, cosine: bool = True, block: int = 256) -> Tensor:
    """[questions, k] the nearest documents, best first, by exact search in blocks of questions."""
    if cosine:
        questions, documents = F.normalize(questions.float(), dim=-1), F.normalize(documents.float(), dim=-1)
    k = min(k, len(documents))
    found = [(part.float() @ documents.float().T).topk(k, dim=1).indices for part in questions.split(block)]
    return torch.cat(found)


@register("retrieval")
@dataclass
class Retrieval(Measure):
    """Search a collection with every test question and count how well its own documents rank: recall@k, nDCG@10 and MRR@10.

    Rows are pairs (`anchor`, `positive`, or `text`, `image` for a dual encoder). The collection is what the stream `corpus` holds (column
    `text`), and all positives and negatives of the rows; equal texts are one document. A document is relevant to every row whose anchor
    it was given for. Exact search by cosine (`cosine: false`: dot product). The more documents, the harder: figures of
    different collections do not compare."""

    k: list[int] = field(default_factory=lambda: [1, 10, 100])
    """Depths of recall."""
    cosine: bool = True
    """Normalise embeddings."""
    limit: int = 1000
    """At most so many questions."""

    families = frozenset({"text-encoder", "dual-encoder", "causal-lm"})
    columns = (frozenset({"anchor", "positive"}), frozenset({"text", "image"}))

    def __post_init__(self) -> None:
        if not self.k or min(self.k) < 1 or self.limit < 1:
            raise RecipeError(f"retrieval needs depths `k` of 1 or more and a positive limit, not {self.k} and {self.limit}.")

    def measure(self, model: Family, rows: Any, ctx: Context | None = None) -> Measures:
        rows = list(rows or ())[: self.limit]
        left, right = ("anchor", "positive") if rows and "anchor" in rows[0] else ("text", "image")
        if not rows or any(left not in r or right not in r for r in rows):
            return Measures(notes=["Retrieval needs test rows with 'anchor' and 'positive' (or 'text' and 'image'), so it was not measured."])
        documents, relevant = collection(rows, left, right, list(ctx.rows("corpus")) if ctx is not None and ctx.has_rows("corpus") else [])
        questions = list(relevant)
        with torch.no_grad(), model.evaluating():
            asked = model.embed(questions, "text" if right == "image" else None)
            known = model.embed(documents, "image" if right == "image" else None)
        ranked = ranking(asked, known, max(10, *self.k), self.cosine).tolist()
        numbers: dict[str, float | None] = {}
        for k in self.k:
            numbers[f"recall@{k}"] = _mean([retrieval(found, relevant[q], k)["recall"] for q, found in zip(questions, ranked)])
        at_ten = [retrieval(found, relevant[q]) for q, found in zip(questions, ranked)]
        numbers |= {"ndcg@10": _mean([m["ndcg"] for m in at_ten]), "mrr@10": _mean([m["mrr"] for m in at_ten])}
        out = Measures({**numbers, "documents": float(len(documents)), "questions": float(len(questions))})
        low, high = wilson(len(questions) * (numbers[f"recall@{self.k[0]}"] or 0.0), len(questions))
        out.notes.append(f"recall@{self.k[0]} lies between {low:.3f} and {high:.3f} (95 %, {len(questions)} questions, {len(documents)} documents).")
        out.better = dict.fromkeys(numbers, "higher")
        return out


def collection(rows: SequenceOf[Mapping[str, Any]], left: str, right: str, more: SequenceOf[Mapping[str, Any]] = ()) -> tuple[list[Any], dict[str, dict[int, float]]]:
    """The documents, equal texts once, and for every question which of them are relevant."""
    documents: list[Any] = []
    places: dict[Any, int] = {}

    def place(item: Any) -> int:
        key = item if isinstance(item, str) else id(item)
        if key not in places:
            places[key] = len(documents)
            documents.append(item)
        return places[key]

    relevant: dict[str, dict[int, float]] = {}
    for row in rows:
        relevant.setdefault(row[left], {})[place(row[right])] = 1.0
    for row in rows:
        given = row.get("negatives", row.get("negative"))
        for negative in [] if given is None else given if isinstance(given, list) else [given]:
            place(negative)
    for row in more:
        if "text" in row:
            place(row["text"])
    return documents, relevant


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
