"""What the model makes of the rows: how long they are to it, how varied, which it doubts, how far they are from what it says itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.advise.data import Signal, drawn, examples, not_measured, of_all, percent
from luthier.core.dataset import Rows
from luthier.core.encode import ENCODERS
from luthier.core.estimate import estimate
from luthier.core.neighbours import knn
from luthier.core.preflight import EXAMINED, positions
from luthier.core.rows import answer_of, lengths
from luthier.errors import UserError
from luthier.measure._shared import answered, gold_nll, has_answers

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family

OPERATIONS, FEWEST, MOST = 2e12, 64, 2000
"""So many rows are read by the model as take about this many operations, within these bounds."""
ASKED = 32
"""Rows whose prompts the model answers itself."""
NEIGHBOURS = 10
VOTES_AGREE, MUST_TELL = 0.65, 0.85
"""The share of rows that neighbours' votes, or the model, must put right before their doubts about the others count. On rows of which a fifth had
another row's answer, a model that knew the task doubted a tenth and was right in 94 %; one that did not doubted 23 % and was right in 43 %."""
OUTLIER, AT_LEAST = 3.5, 1.0
"""Loss above the median in robust standard deviations, and in nats a token, of an answer that stands out."""


def read(rows: Rows, fitting: Rows, general: Rows | None, family: Family, ctx: Context, max_length: int | None = None) -> list[Signal]:
    """All that takes the model, on a fixed sample of the training rows; `fitting` are those that it reads whole."""
    part = drawn(fitting, readable(fitting, family))
    vectors = _vectors(part, family, ctx)
    doubts = [doubted_labels(part, vectors)] if rows.kind.endswith("-label") else doubted_answers(part, family, ctx)
    sampled = [Signal(s.name, s.said + of_all(part, rows), s.value, s.facts) if s.value is not None else s for s in (diversity(vectors), *doubts)]
    return [tokens(rows, family, ctx.train_on, max_length), *sampled, *likelihood(part, general, family, ctx)]


def readable(rows: Rows, family: Family) -> int:
    """How many rows the model reads: fewer of a large model, the same on every machine."""
    length = max(1, estimate(family, drawn(rows, 200), 1, 1, measure=False).tokens)
    parameters = sum(p.numel() for p in family.network.parameters())
    return int(np.clip(OPERATIONS / (2 * parameters * length), FEWEST, MOST))


def tokens(rows: Rows, family: Family, train_on: str = "completion", max_length: int | None = None) -> Signal:
    """How long rows are, and which share is longer than the model reads, or than the data's own limit."""
    tokenizer = getattr(family, "tokenizer", None)
    if tokenizer is None or rows.kind not in ENCODERS:
        return not_measured("tokens", f"a model of the family {family.kind} reads no tokens in rows of the kind {rows.kind}")
    part = drawn(rows, EXAMINED)
    sizes = lengths(part, tokenizer, train_on)
    limit = max_length or getattr(family, "max_length", None) or positions(family)
    longer = float((sizes > limit).mean()) if limit else 0.0
    reads = f"; {percent(longer)} are longer than the {limit:,} that are read" if limit else "; the model has no limit"
    said = f"{sizes.mean():.0f} a row, nine in ten have at most {np.quantile(sizes, 0.9):.0f}, the longest {sizes.max()}{reads}{of_all(part, rows)}"
    return Signal("tokens", said, float(sizes.mean()), {"longest": int(sizes.max()), "longer": longer, "reads": limit})


# -- variety -------------------------------------------------------------------------------------------------------------------


def _vectors(part: Rows, family: Family, ctx: Context) -> np.ndarray | str:
    """The rows' embeddings, or why there are none. Labels are left out: the model may not know them yet."""
    if part.kind.endswith("-label"):
        part = Rows([{k: v for k, v in row.items() if k != "label"} for row in part], part.ids, source=part.source)
    branch = {"branch": "image" if "image" in part.columns else "text"} if family.kind == "dual-encoder" else {}
    try:
        return np.asarray(ctx.signal("embedding", part, **branch), np.float64)
    except UserError as error:
        return str(error)


def vendi(vectors: np.ndarray) -> float:
    """exp of the entropy of the eigenvalues of the cosine kernel over n: how many unrelated rows would be as varied.

    About the mean: the vectors of a language model all point one way, and every row would be like every other."""
    x = vectors - vectors.mean(0)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    values = np.linalg.eigvalsh(x.T @ x if x.shape[1] <= len(x) else x @ x.T).clip(min=0)
    share = values[values > 0] / max(values.sum(), 1e-12)
    return float(np.exp(-(share * np.log(share)).sum()))


def diversity(vectors: np.ndarray | str) -> Signal:
    """The Vendi score, and how much of it an eighth of the rows has: what is varied goes on growing with more rows."""
    if isinstance(vectors, str):
        return not_measured("diversity", vectors)
    if len(vectors) < 64:
        return not_measured("diversity", f"{len(vectors)} rows are too few; 64 are needed")
    whole = vendi(vectors)
    part = np.random.default_rng(0).permutation(len(vectors))[: len(vectors) // 8]
    eighth = vendi(vectors[part]) / max(whole, 1e-12)
    said = f"as varied as {whole:.1f} unrelated rows (Vendi score of the model's embeddings, at most {min(vectors.shape)})"
    return Signal("diversity", f"{said}; an eighth of the rows has {percent(min(1.0, eighth))} of that", whole, {"eighth": eighth})


# -- doubts --------------------------------------------------------------------------------------------------------------------


def doubted_labels(part: Rows, vectors: np.ndarray | str) -> Signal:
    """Rows whose nearest neighbours agree on another label, and none of them has this row's.

    Where neighbours often disagree with good labels their votes say nothing; so they must be right about most rows."""
    name = "doubtful labels"
    if isinstance(vectors, str):
        return not_measured(name, vectors)
    label = np.unique([str(row["label"]) for row in part], return_inverse=True)[1]
    k = min(NEIGHBOURS, len(part) // 4)
    try:
        index = knn(vectors, max(1, k), distinct=True)[1]
    except ValueError:
        return not_measured(name, "there are too few different rows")
    votes = np.zeros((len(part), label.max() + 1))
    np.add.at(votes, (np.arange(len(part))[:, None], label[index]), 1 / index.shape[1])
    right = float((votes.argmax(1) == label).mean())
    common = float(np.bincount(label).max() / len(label))
    if k < 3 or right < max(VOTES_AGREE, common + 0.1):
        return not_measured(name, f"the votes of neighbours in the model's embedding agree with only {percent(right)} of the labels")
    own = votes[np.arange(len(part)), label]
    found = np.flatnonzero((own == 0) & (votes.max(1) >= 0.8))
    return Signal(name, f"{percent(len(found) / len(part))} of the rows have a label that no near row has, while most near rows agree on another"
                  f"{examples(part, found.tolist())}; such votes agree with {percent(right)} of all labels", len(found) / len(part), {"votes agree": right})  # fmt: skip


def doubted_answers(part: Rows, family: Family, ctx: Context) -> list[Signal]:
    """Rows whose answer is less likely after their own prompt than after another row's, and rows whose answer is much less likely than others'."""
    names = ("doubtful answers", "surprising answers")
    why = f"it takes a language model and rows with one answer; these are {part.kind} rows for a model of the family {family.kind}"
    if len(part) < 32:
        why = f"{len(part)} rows are too few; 32 are needed"
    if len(part) < 32 or "score" not in family.verbs or part.kind not in ("prompt-completion", "messages") or not has_answers(part):
        return [not_measured(name, why) for name in names]
    order = np.random.default_rng(0).permutation(len(part))
    other = np.empty(len(part), np.int64)
    other[order] = np.roll(order, 1)
    swapped = Rows([_with_answer(part[int(j)], answer_of(part[i]) or "") for i, j in enumerate(other)], name="swapped")
    try:
        own, elsewhere = (np.asarray(ctx.signal("loss", rows), float) for rows in (part, swapped))
    except UserError as error:
        return [not_measured(name, str(error)) for name in names]
    return [_swapped(part, elsewhere - own), _standing_out(part, own)]


def _swapped(part: Rows, gain: np.ndarray) -> Signal:
    """By what the own prompt adds to the answer's likelihood. About half of the answers that belong to other prompts show in this way."""
    found = np.argsort(gain)[: int((gain < 0).sum())].tolist()
    share = len(found) / len(part)
    if 1 - share < MUST_TELL:
        why = "the model knows too little of this to judge, or very many are wrong"
        return not_measured("doubtful answers", f"{percent(share)} of the answers are likelier after another row's prompt: {why}")
    said = f"{percent(share)} of the answers are likelier after another row's prompt than after their own{examples(part, found)}; about half of those that belong elsewhere show so"
    return Signal("doubtful answers", said, share, {"median gain": float(np.median(gain))})


def _standing_out(part: Rows, loss: np.ndarray) -> Signal:
    middle = float(np.median(loss))
    spread = 1.4826 * float(np.median(np.abs(loss - middle)))
    found = np.argsort(-loss)[: int((loss > middle + max(OUTLIER * spread, AT_LEAST)).sum())].tolist()
    said = f"{percent(len(found) / len(part))} of the answers cost the model far more than the usual {middle:.2f} nats a token{examples(part, found)}"
    return Signal("surprising answers", said, len(found) / len(part), {"median": middle})


def _with_answer(row: dict[str, Any], answer: str) -> dict[str, Any]:
    if "messages" in row:
        last = max(i for i, m in enumerate(row["messages"]) if m["role"] == "assistant")
        return {**row, "messages": [*row["messages"][:last], {"role": "assistant", "content": answer}]}
    return {**row, "completion": answer}


# -- likelihood ------------------------------------------------------------------------------------------------------------------


def likelihood(part: Rows, general: Rows | None, family: Family, ctx: Context) -> list[Signal]:
    """How surprising the answers are beside the model's own and those to general rows; how many the model gives already."""
    why = f"it takes a language model that answers; these are {part.kind} rows for a model of the family {family.kind}"
    if not {"score", "generate"} <= family.verbs or not has_answers(part) or part.kind not in ("prompt-completion", "messages"):
        return [not_measured("shift", why), not_measured("known already", why)]
    some = drawn(part, ASKED)
    longest = int(np.clip(np.quantile([len(family.tokenizer(answer_of(r) or "")["input_ids"]) for r in some], 0.9) + 4, 8, 48))  # type: ignore[attr-defined]
    with family.evaluating():
        given = gold_nll(family, some, ctx, len(some))
        found = answered(family, some, ctx, "advise", "exact", longest)
        elsewhere = gold_nll(family, drawn(general, ASKED), ctx, ASKED) if general is not None and has_answers(general) else None
    own = float(np.mean([-np.log(max(f["confidence"], 1e-12)) for f in found]))
    right = float(np.mean([f["score"] for f in found]))
    beside = f", those to the general rows {elsewhere:.2f}" if elsewhere is not None else ""
    shift = Signal("shift", f"the given answers cost the model {given:.2f} nats a token, its own {own:.2f}{beside} ({len(some)} rows)", (given or 0.0) - own,
                   {"given": given, "own": own, "general": elsewhere})  # fmt: skip
    return [shift, Signal("known already", f"the untuned model answers {percent(right)} of {len(some)} training rows rightly (exact match)", right)]
