"""How well the model does what it was tuned for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.catalog import register
from luthier.measure import Measure, Measures
from luthier.measure._shared import answer_table, answered, gold_nll, has_answers, shown_prompt, wilson

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


def task(scores: Any) -> tuple[float, float, float]:
    """Mean score of some rows with its 95 % Wilson interval: (mean, low, high)."""
    scores = np.asarray(scores, float)
    low, high = wilson(float(scores.sum()), len(scores))
    return (float(scores.mean()) if len(scores) else float("nan"), low, high)


@register("task")
@dataclass
class Task(Measure):
    """The share of test rows answered rightly, with its interval, on the test rows and on each out-of-domain stream.

    Language models answer greedily and a verifier judges (exact match by default); classifiers are measured by accuracy, encoders by
    how often a row's own partner is the nearest of all (recall@1), preference rows by how often the better answer is the likelier one. Language models are also given the mean negative log-likelihood
    of the gold answers. A row's score is in [0, 1]."""

    verify: str = "exact"
    """Which verifier judges answers: exact, normalised, number, label, regex, contains, json or lab."""
    limit: int = 200
    """At most so many rows of each stream."""
    max_new_tokens: int = 48
    """An answer is cut here."""
    streams: tuple[str, ...] = ("test", "ood")
    """Which row streams are measured, where the data has them."""

    toy = {"max_new_tokens": 4}

    def measure(self, model: Family, rows: Any, ctx: Context | None = None) -> Measures:
        out = Measures()
        for stream in self.streams:
            found = rows if stream == "test" else (ctx.rows(stream) if ctx and ctx.has_rows(stream) else None)
            if found is not None and len(found):
                part = found[: self.limit] if isinstance(found, list) else [found[i] for i in range(min(self.limit, len(found)))]
                self._stream(model, part, ctx, stream, out)
        if not out.numbers:
            out.notes.append("There are no test rows, so the task was not measured; add `data: {test: FILE}`.")
        return out

    def _stream(self, model: Family, rows: list[Any], ctx: Context | None, stream: str, out: Measures) -> None:
        prefix = "" if stream == "test" else f"{stream}_"
        scores: np.ndarray | list[Any]
        if "chosen" in rows[0] and "score" in model.verbs:
            scores, name = _preferred(model, rows), "pair_accuracy"
        elif "generate" in model.verbs:
            if not has_answers(rows):
                return
            answers = answered(model, rows, ctx, stream, self.verify, self.max_new_tokens)
            scores, name = [a["score"] for a in answers], "exact_match" if self.verify == "exact" else "score"
            out.tables[f"{stream} answers"] = answer_table(rows, answers)
            if "score" in model.verbs:
                out.numbers[f"{prefix}nll"] = gold_nll(model, rows, ctx, self.limit)
                out.better[f"{prefix}nll"] = "lower"
        else:
            scores, name = self._direct(model, rows)
            out.tables[f"{stream} answers"] = [{"row": i, "prompt": shown_prompt(r), "score": float(s)} for i, (r, s) in enumerate(zip(rows, scores))]
        mean, low, high = task(scores)
        out.numbers |= {f"{prefix}{name}": mean, f"{prefix}{name}_low": low, f"{prefix}{name}_high": high, f"{prefix}rows": float(len(rows))}
        out.better[f"{prefix}{name}"] = "higher"

    def _direct(self, model: Family, rows: list[Any]) -> tuple[np.ndarray, str]:
        batch = model.collate(rows)
        if "labels" in batch.tensors:
            return (model.classify(batch).argmax(-1).cpu() == batch.tensors["labels"].cpu()).numpy().astype(float), "accuracy"
        left, right = ("anchor", "positive") if "anchor" in rows[0] else ("text", "image")
        a, b = model.embed(batch, left), model.embed(batch, right)
        nearest = (a / a.norm(dim=-1, keepdim=True) @ (b / b.norm(dim=-1, keepdim=True)).T).argmax(-1).cpu().numpy()
        return (nearest == np.arange(len(rows))).astype(float), "recall_at_1"


def _preferred(model: Family, rows: list[Any]) -> np.ndarray:
    """Whether log p (summed over tokens) of the chosen answer is above the rejected one's, row by row."""
    batch = model.collate(rows)
    summed = model.score(batch).rows("sum").cpu().numpy()
    found = {(s.row, s.branch): summed[i] for i, s in enumerate(batch.sequences)}
    return np.array([float(found[i, "chosen"] > found[i, "rejected"]) for i in range(len(rows))])
