"""What the tune cost in abilities that were there before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.catalog import register
from luthier.measure import Measure, Measures
from luthier.measure._shared import answer_table, answered, gold_nll, has_answers, wilson

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


def forgetting(before: float, after: float) -> float:
    """How much of a score was lost (positive: forgotten)."""
    return before - after


@register("forgetting")
@dataclass
class Forgetting(Measure):
    """General abilities before and after: score and log-likelihood on the `general` rows, and how far the model moved from the base there.

    The move is the mean KL(base || tuned) a token on the gold answers of the general rows (of the test rows where there are no
    general ones). Measured on the base as well, so that a report can show the difference."""

    verify: str = "contains"
    """Which verifier judges the answers to the general rows."""
    limit: int = 100
    """At most so many rows."""
    max_new_tokens: int = 24
    """An answer is cut here."""

    toy = {"max_new_tokens": 4}

    def measure(self, model: Family, rows: Any, ctx: Context | None = None) -> Measures:
        out = Measures()
        general = ctx.rows("general") if ctx is not None and ctx.has_rows("general") else None
        if general is None:
            out.notes.append("There are no general rows, so lost abilities were not measured; add `data: {general: FILE}`.")
        else:
            self._score(model, [general[i] for i in range(min(len(general), self.limit))], ctx, out)
        where = general if general is not None else rows
        if ctx is not None and "score" in model.verbs and ctx.has_model("base") and where is not None and len(where):
            out.numbers["kl_to_base"] = self._drift(model, [where[i] for i in range(min(len(where), self.limit))], ctx)
            out.better["kl_to_base"] = "lower"
        return out

    def _score(self, model: Family, rows: list[Any], ctx: Context | None, out: Measures) -> None:
        if "generate" not in model.verbs:
            batch = model.collate(rows)
            if "labels" in batch.tensors:
                hit = (model.classify(batch).argmax(-1).cpu() == batch.tensors["labels"].cpu()).float()
                out.numbers["general_score"] = float(hit.mean())
                out.better["general_score"] = "higher"
            return
        if not has_answers(rows):
            return
        answers = answered(model, rows, ctx, "general", self.verify, self.max_new_tokens)
        out.tables["general answers"] = answer_table(rows, answers)
        hits = sum(a["score"] for a in answers)
        low, high = wilson(hits, len(answers))
        out.numbers |= {"general_score": hits / len(answers), "general_score_low": low, "general_score_high": high}
        out.better["general_score"] = "higher"
        if "score" in model.verbs:
            out.numbers["general_nll"] = gold_nll(model, rows, ctx, self.limit)
            out.better["general_nll"] = "lower"

    def _drift(self, model: Family, rows: list[Any], ctx: Context) -> float | None:
        base = ctx.model("base")
        total = number = 0.0
        for start in range(0, len(rows), 16):
            batch = model.collate(rows[start : start + 16], train_on=ctx.train_on)
            with base.evaluating():
                reference = base.score(batch)
                values = model.score(batch).kl(reference)
            total, number = total + float(values.sum()), number + values.numel()
        return total / number if number else None
