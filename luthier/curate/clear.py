"""Automated Data Curation for Robust Language Model Fine-Tuning (paper 24)."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from luthier.catalog import method, register
from luthier.curate import Curator
from luthier.errors import RecipeError

if TYPE_CHECKING:
    from luthier.core.context import Context

JUDGE = (
    "Question: {prompt}\nAnswer A: {a}\nAnswer B: {b}\nWhich answer is better? Say A, B or tie. Better answer: ",
    "Question: {prompt}\nFirst answer (A): {a}\nSecond answer (B): {b}\nCompare the two. The better one is (A, B or tie): ",
)


def clear(confidence: np.ndarray, gamma: float | None = None) -> np.ndarray:
    """Auto-Filter: indices of the rows with c_i > gamma, gamma the median by default (so floor(n/2) stay when all differ)."""
    c = np.asarray(confidence, float)
    return np.flatnonzero(c > (np.median(c) if gamma is None else gamma))


def corrected(rows: SequenceOf[dict[str, Any]], proposals: SequenceOf[str], better: np.ndarray, eta: float = 0.8) -> list[dict[str, Any]]:
    """Auto-Correct: the proposal replaces a row's answer where the judge is more than `eta` sure that it is better."""
    return [{**r, "completion": p, "corrected": True} if sure > eta else dict(r) for r, p, sure in zip(rows, proposals, better)]


@register("clear", paper=24)
@dataclass
class Clear(Curator):
    """Drop rows whose stored answer the model confidently doubts; after tuning, let the tuned model propose better ones and swap in what a judge is sure of.

    `stage: filter` keeps rows with confidence above gamma (the median over the set by default); the confidence of the STORED answer is
    the measure's, BSDetector by default. `stage: correct` runs after a tune (in the preset: filter, tune, correct, tune again from the base): the
    tuned model (`ctx.model("previous")` or the current one) answers every row; the judge, which is the base model and never the tuned one,
    compares stored and proposed answer in both orders and two wordings; the proposal is taken when judged better with confidence above
    eta = 0.8, else the row stays as it is (the paper leaves open whether undecided rows are dropped; `undecided` says). A median threshold throws away half of
    a clean set too: set `gamma` when you know the set is clean."""

    stage: Literal["filter", "correct"] = "filter"
    """Which half of CLEAR runs."""
    measure: str = "bs-detector"
    """The measure whose `confidence` is asked for each row's answer."""
    measure_options: dict[str, Any] = field(default_factory=dict)
    """Its fields."""
    gamma: float | None = None
    """Least confidence of a kept row; empty means the median."""
    eta: float = 0.8
    """Least confidence of the judge for a replacement."""
    judge: Literal["ask", "likelihood"] = "ask"
    """Ask the base model, or compare mean log-likelihoods under it (for models that cannot be asked)."""
    samples: int = 5
    """Verdicts sampled a question and order, for the judge's confidence."""
    undecided: Literal["keep", "drop"] = "keep"
    """What happens to rows whose judge is not sure either way."""
    max_new_tokens: int = 48
    """Length of a proposed answer."""
    report: dict[str, Any] = field(default_factory=dict, init=False)

    needs = frozenset({"generation"})
    families = frozenset({"causal-lm"})

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1 or (self.gamma is not None and not 0 <= self.gamma <= 1) or self.samples < 1:
            raise RecipeError("clear needs eta and gamma between 0 and 1 and samples >= 1.")

    def curate(self, rows: Any, ctx: Context | None = None) -> Any:
        if ctx is None:
            raise RecipeError("clear asks a model: give it a context with one.")
        given = [dict(r) for r in rows]
        return self._filter(rows, given, ctx) if self.stage == "filter" else self._correct(given, ctx)

    def _filter(self, rows: Any, given: list[dict[str, Any]], ctx: Context) -> Any:
        detector = method("measure", self.measure)(**self.measure_options)
        sure = detector.confidence(given, ctx)
        kept = clear(sure, self.gamma)
        self.report = {"rows": len(given), "kept": len(kept), "gamma": float(np.median(sure) if self.gamma is None else self.gamma)}
        return rows.take(kept) if hasattr(rows, "take") else [given[i] for i in kept]

    def _correct(self, given: list[dict[str, Any]], ctx: Context) -> list[dict[str, Any]]:
        from luthier.core.families import Decode
        from luthier.core.rows import answer_of, prompt_ids

        tuned = "previous" if ctx.has_model("previous") else None
        author: Any = ctx.model(tuned) if tuned else ctx.current
        stored = [answer_of(r) or "" for r in given]
        prompts = [prompt_ids(r, author.tokenizer) for r in given]
        proposed = [a[0].text for a in ctx.generate(prompts, Decode(max_new_tokens=self.max_new_tokens), 1, tuned)]
        better, worse = self._verdicts(given, stored, proposed, ctx)
        out = corrected(given, proposed, better, self.eta)
        if self.undecided == "drop":
            out = [r for r, b, w, s, p in zip(out, better, worse, stored, proposed) if s == p or b > self.eta or w > self.eta]
        self.report = {"rows": len(given), "proposals that differ": sum(s != p for s, p in zip(stored, proposed)), "replaced": int((better > self.eta).sum()), "kept": len(out)}
        return out

    def _verdicts(self, rows: list[dict[str, Any]], stored: list[str], proposed: list[str], ctx: Context) -> tuple[np.ndarray, np.ndarray]:
        """The judge's confidence that the proposal is better, and that the stored answer is. Equal answers: neither."""
        better, worse = np.zeros(len(rows)), np.zeros(len(rows))
        differ = [i for i in range(len(rows)) if stored[i].strip() != proposed[i].strip() and proposed[i].strip()]
        if not differ:
            return better, worse
        judge = self._asked if self.judge == "ask" else self._likelihood
        found = judge([rows[i] for i in differ], [stored[i] for i in differ], [proposed[i] for i in differ], ctx)
        better[differ], worse[differ] = found
        return better, worse

    def _likelihood(self, rows: list[dict[str, Any]], stored: list[str], proposed: list[str], ctx: Context) -> tuple[np.ndarray, np.ndarray]:
        base: Any = ctx.model("base")
        values = []
        with base.evaluating():
            for answers in (stored, proposed):
                batch = base.collate([_with_answer(r, a) for r, a in zip(rows, answers)], train_on=ctx.train_on)
                values.append(base.score(batch).rows("mean").double().cpu().numpy())
        p = 1 / (1 + np.exp(values[0] - values[1]))
        return p, 1 - p

    def _asked(self, rows: list[dict[str, Any]], stored: list[str], proposed: list[str], ctx: Context) -> tuple[np.ndarray, np.ndarray]:
        """Share of sampled verdicts for either side, both orders and two wordings, so that no position is favoured."""
        from luthier.core.families import Decode
        from luthier.core.rows import prompt_ids, prompt_text

        base: Any = ctx.model("base")
        votes = np.zeros((len(rows), 2))
        asked = 0
        for wording in JUDGE:
            for flipped in (False, True):
                prompts = []
                for r, s, p in zip(rows, stored, proposed):
                    a, b = (p, s) if flipped else (s, p)
                    prompts.append(prompt_ids({"prompt": wording.format(prompt=prompt_text(r), a=a, b=b)}, base.tokenizer))
                replies = ctx.generate(prompts, Decode(max_new_tokens=4, temperature=1.0), self.samples, "base")
                asked += self.samples
                for i, drawn in enumerate(replies):
                    for reply in drawn:
                        side = verdict(reply.text)
                        if side is not None:
                            votes[i, side if not flipped else 1 - side] += 1
        return votes[:, 1] / asked, votes[:, 0] / asked


def verdict(reply: str) -> int | None:
    """0 for A, 1 for B, None for a tie or anything else."""
    text = reply.strip().lstrip("(").upper()
    if text.startswith("TIE"):
        return None
    return 0 if text.startswith("A") and not text[1:2].isalpha() else 1 if text.startswith("B") and not text[1:2].isalpha() else None


def _with_answer(row: dict[str, Any], answer: str) -> dict[str, Any]:
    if "messages" in row:
        return {**row, "messages": [*row["messages"][:-1], {**row["messages"][-1], "content": answer}]}
    return {**row, "completion": answer}
