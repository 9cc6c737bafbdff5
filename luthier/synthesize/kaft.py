"""Large Language Models with Controllable Working Memory (paper 131)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from luthier.catalog import register
from luthier.core.context import seed_of
from luthier.errors import RecipeError
from luthier.synthesize import Synthesizer
from luthier.synthesize._shared import listed, mentions, need, replacement, swap

if TYPE_CHECKING:
    from luthier.core.context import Context


def kaft(
    rows: SequenceOf[Mapping[str, Any]],
    memory: SequenceOf[str | None],
    rng: np.random.Generator,
    counterfactual: float = 1.0,
    irrelevant: float = 1.0,
    empty: float = 1.0,
    same_type: Callable[[Mapping[str, Any]], SequenceOf[str]] | None = None,
    hard: float = 0.5,
) -> list[dict[str, Any]]:
    """The rows with their counterfactual, irrelevant and empty-context versions, each with the column `kind`.

    A row has `question`, `context`, `answer` and perhaps `subject` and `type`. `memory` is the base model's closed-book answer to each
    question (None: the gold answer stands in). Shares are extra rows a given row. Each counterfactual context names a' and no longer a;
    each irrelevant one contains neither the answer nor the subject; a `hard` share of these comes from the most similar question."""
    given = [dict(r) for r in rows]
    out = [{**r, "kind": "relevant"} for r in given]
    pools = [list(same_type(r)) if same_type else _pool(given, r) for r in given]
    for i in _draw(len(given), counterfactual, rng):
        row = given[i]
        other = replacement(row["answer"], pools[i], [g["answer"] for g in given if g["question"] == row["question"]], rng)
        if other is not None and mentions(row["context"], row["answer"]):
            out.append({**row, "context": swap(row["context"], row["answer"], other), "answer": other, "gold": row["answer"], "kind": "counterfactual"})
    for i in _draw(len(given), irrelevant, rng):
        context = _other_context(given, i, rng, similar=rng.random() < hard)
        if context is not None:
            out.append({**given[i], "context": context, "answer": memory[i] or given[i]["answer"], "gold": given[i]["answer"], "kind": "irrelevant"})
    for i in _draw(len(given), empty, rng):
        out.append({**given[i], "context": "", "answer": memory[i] or given[i]["answer"], "gold": given[i]["answer"], "kind": "empty"})
    return out


def _draw(n: int, share: float, rng: np.random.Generator) -> list[int]:
    """`round(share * n)` indices: whole passes over the rows, then a random rest."""
    whole, rest = divmod(round(share * n), max(1, n))
    return [*(list(range(n)) * whole), *sorted(rng.permutation(n)[:rest].tolist())]


def _pool(rows: SequenceOf[Mapping[str, Any]], row: Mapping[str, Any]) -> list[str]:
    """Answers of the same type; of any type where rows have none."""
    return [r["answer"] for r in rows if r.get("type") == row.get("type")]


def _other_context(rows: SequenceOf[Mapping[str, Any]], i: int, rng: np.random.Generator, similar: bool) -> str | None:
    """Another row's context that names neither this row's answer nor its subject. `similar`: of the question that shares most words."""
    row = rows[i]
    banned = [row["answer"], *([row["subject"]] if row.get("subject") else [])]
    fits = [j for j, r in enumerate(rows) if j != i and r["context"] and not any(mentions(r["context"], b) for b in banned)]
    if not fits:
        return None
    if similar:
        words = set(row["question"].casefold().split())
        overlap = [len(words & set(rows[j]["question"].casefold().split())) for j in fits]
        fits = [j for j, o in zip(fits, overlap) if o == max(overlap)]
    return str(rows[int(rng.choice(fits))]["context"])


@register("kaft", paper=131)
@dataclass
class KAFT(Synthesizer):
    """Teach when to believe the context: add counterfactual contexts with changed answers, and irrelevant or absent ones with the model's own memory.

    Four kinds of rows from question, context, answer: relevant (C, q -> a); counterfactual (every mention of a becomes a' of the same type -> a');
    irrelevant (another question's context -> m(q)); empty (q -> m(q)). m(q) is what the base model answers closed book before any tuning,
    greedy; the gold answer where there is no model. Kinds are mixed in equal shares by default (the paper leaves this open), and half of the
    irrelevant contexts are of the most similar question. `note` appends the kind of context to the target, a variant. Rows without an
    answer of the same type to swap in, or whose context does not name the answer, get no counterfactual; `report` counts them."""

    counterfactual: float = 1.0
    """Counterfactual rows a given row."""
    irrelevant: float = 1.0
    """Irrelevant-context rows a given row."""
    empty: float = 1.0
    """Empty-context rows a given row."""
    hard: float = 0.5
    """Share of irrelevant contexts taken from the most similar question."""
    template: str = "context: {context} question: {question} answer:"
    """The prompt; {context} and {question} are filled in."""
    template_empty: str = "question: {question} answer:"
    """The prompt without context."""
    question: str = "question"
    """Column of the question."""
    context: str = "context"
    """Column of the context."""
    answer: str = "answer"
    """Column of the answer."""
    memory: Literal["base", "gold"] = "base"
    """Where the targets of irrelevant and empty rows come from."""
    note: bool = False
    """Append the kind of context to the target."""
    max_new_tokens: int = 24
    """Length of a closed-book answer."""
    report: dict[str, Any] = field(default_factory=dict, init=False)

    families = frozenset({"causal-lm"})
    columns = (frozenset({"question", "context", "answer"}),)
    toy = {"max_new_tokens": 4}

    def __post_init__(self) -> None:
        if min(self.counterfactual, self.irrelevant, self.empty) < 0 or not 0 <= self.hard <= 1:
            raise RecipeError("kaft's shares are not negative and `hard` is between 0 and 1.")
        if "{question}" not in self.template or "{context}" not in self.template or "{question}" not in self.template_empty:
            raise RecipeError("kaft.template must name {context} and {question}, kaft.template_empty {question}.")

    def synthesize(self, rows: Any, ctx: Context | None = None) -> Any:
        given = listed(rows)
        # In a loaded data set `question` and `answer` have become `prompt` and `completion`, the standard columns.
        wanted = {"question": (self.question, "prompt"), "context": (self.context,), "answer": (self.answer, "completion")}
        found = {k: next((n for n in names if given and n in given[0]), names[0]) for k, names in wanted.items()}
        for i, row in enumerate(given):
            need(row, list(found.values()), "kaft", i)
        plain = [{**r, **{k: r[n] for k, n in found.items()}} for r in given]
        rng = np.random.default_rng(seed_of(0 if ctx is None else ctx.seed, "kaft"))
        made = kaft(plain, self._memories(plain, ctx), rng, self.counterfactual, self.irrelevant, self.empty, hard=self.hard)
        self.report = {kind: sum(r["kind"] == kind for r in made) for kind in ("relevant", "counterfactual", "irrelevant", "empty")}
        return [self._row(r) for r in made]

    def _memories(self, rows: list[dict[str, Any]], ctx: Context | None) -> list[str | None]:
        if self.memory == "gold" or ctx is None or not (self.irrelevant or self.empty) or not ctx.has_model("base"):
            return [None] * len(rows)
        from luthier.core.families import Decode
        from luthier.core.rows import prompt_ids

        base = ctx.model("base")
        prompts = [prompt_ids({"prompt": self.template_empty.format(question=r["question"])}, base.tokenizer) for r in rows]  # type: ignore[attr-defined]
        return [a[0].text or None for a in base.generate(prompts, Decode(max_new_tokens=self.max_new_tokens))]

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        template = self.template if row["context"] else self.template_empty
        target = row["answer"] + (f" ({row['kind']} context)" if self.note else "")
        # Columns of another kind of rows belong to the question as it was; they would be learned instead.
        row = {k: v for k, v in row.items() if k not in ("messages", "chosen", "rejected", "anchor", "positive", "negative")}
        return {**row, "prompt": template.format(context=row["context"], question=row["question"]), "completion": target}
