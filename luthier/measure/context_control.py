"""Controllability and robustness of a model's working memory (paper 131)."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.catalog import method, register
from luthier.core.families import Decode
from luthier.measure import Measure, Measures
from luthier.measure._shared import wilson

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


def context_control(kinds: SequenceOf[str], answers: SequenceOf[str], targets: SequenceOf[str], gold: SequenceOf[str], known: SequenceOf[bool]) -> dict[str, float | None]:
    """Shares of rows, by kind.

    `controllability`: of the counterfactual rows whose question the pretrained model answers rightly closed book (`known`), how many answers
    are the context's a'. `robustness`: of the irrelevant-context rows with `known`, how many keep the right answer. `relevant` and
    `closed_book`: exact answers with the true context, and without any. None where there is no such row."""

    def share(kind: str, right: SequenceOf[str], only_known: bool) -> float | None:
        hits = [_same(a, r) for k, a, r, s in zip(kinds, answers, right, known) if k == kind and (s or not only_known)]
        return float(np.mean(hits)) if hits else None

    return {
        "controllability": share("counterfactual", targets, True),
        "robustness": share("irrelevant", gold, True),
        "relevant": share("relevant", targets, False),
        "closed_book": share("empty", gold, False),
    }


def _same(a: str, b: str) -> bool:
    return " ".join(a.casefold().split()).strip(".") == " ".join(b.casefold().split()).strip(".")


@register("context-control", paper=131)
@dataclass
class ContextControl(Measure):
    """Does the model obey a context that contradicts its memory, and ignore one that is beside the point?

    Test rows are question, context and answer (as for the synthesizer `kaft`, which builds the four kinds from them), or rows that
    already carry `kind`. Only questions that the base model answers rightly closed book count, since without a conflict controllability
    is overestimated. Entities of the test rows must not occur in training."""

    builder: str = "kaft"
    """The synthesizer that makes the four kinds of rows."""
    limit: int = 200
    """At most so many test questions."""
    max_new_tokens: int = 24
    """Length of an answer."""

    families = frozenset({"causal-lm"})
    needs = frozenset({"generation"})
    toy = {"max_new_tokens": 4}

    def measure(self, model: Family, rows: Any, ctx: Context | None = None) -> Measures:
        if rows is None or not len(rows) or not {"question", "context", "answer"} <= set(rows[0]):
            return Measures(notes=["context-control needs test rows with question, context and answer."])
        given = [dict(rows[i]) for i in range(min(self.limit, len(rows)))]
        built: SequenceOf[Mapping[str, Any]] = given if "kind" in given[0] else self._build(given)
        known = self._known(built, model, ctx)
        answers = self._answers(model, [r["prompt"] for r in built])
        gold = [r.get("gold", r["answer"]) for r in built]
        numbers = context_control([r["kind"] for r in built], answers, [r["answer"] for r in built], gold, known)
        out = Measures({**numbers, "known_questions": float(sum(k for k, r in zip(known, built) if r["kind"] == "empty"))})
        out.better = dict.fromkeys(numbers, "higher")
        for name, kind in (("controllability", "counterfactual"), ("robustness", "irrelevant")):
            n = sum(k and r["kind"] == kind for k, r in zip(known, built))
            if numbers[name] is not None:
                out.numbers[f"{name}_low"], out.numbers[f"{name}_high"] = wilson(float(numbers[name] or 0) * n, n)
        return out

    def _build(self, rows: list[dict[str, Any]]) -> list[Mapping[str, Any]]:
        return list(method("synthesize", self.builder)(memory="gold").synthesize(rows))

    def _known(self, built: SequenceOf[Mapping[str, Any]], model: Family, ctx: Context | None) -> list[bool]:
        """Whether the base answers each question rightly without context."""

        base = ctx.model("base") if ctx is not None and ctx.has_model("base") else model
        questions = sorted({r["question"] for r in built})
        template = method("synthesize", self.builder)().template_empty
        replies = dict(zip(questions, self._answers(base, [template.format(question=q) for q in questions])))
        return [_same(replies[r["question"]], r.get("gold", r["answer"])) for r in built]

    def _answers(self, model: Any, prompts: SequenceOf[str]) -> list[str]:
        from luthier.core.rows import prompt_ids

        ids = [prompt_ids({"prompt": p}, model.tokenizer) for p in prompts]
        return [a[0].text for a in model.generate(ids, Decode(max_new_tokens=self.max_new_tokens))]
