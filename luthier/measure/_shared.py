"""What measures share: intervals, calibration statistics, and answers that several measures read but are generated once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.core.families import Decode
from luthier.core.rows import answer_of, prompt_ids, prompt_text
from luthier.core.verify import verifier

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


def wilson(hits: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a share."""
    if n == 0:
        return (0.0, 1.0)
    p = hits / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return (max(0.0, centre - half), min(1.0, centre + half))


def bins_of_equal_mass(confidence: np.ndarray, bins: int) -> list[np.ndarray]:
    """Indices of `bins` groups of like confidence and (nearly) equal size; ties stay in order."""
    return [part for part in np.array_split(np.argsort(confidence, kind="stable"), min(bins, len(confidence))) if len(part)]


def ece(confidence: np.ndarray, correct: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error over bins of equal mass: sum_b n_b/n |accuracy_b - confidence_b|."""
    confidence, correct = np.asarray(confidence, float), np.asarray(correct, float)
    if not len(confidence):
        return float("nan")
    return float(sum(len(b) * abs(correct[b].mean() - confidence[b].mean()) for b in bins_of_equal_mass(confidence, bins)) / len(confidence))


def brier(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Mean squared difference between the confidence and what happened."""
    return float(np.mean((np.asarray(confidence, float) - np.asarray(correct, float)) ** 2))


def auroc(score: np.ndarray, positive: np.ndarray) -> float | None:
    """Probability that a positive scores above a negative, ties counted half. None with one class only."""
    score, positive = np.asarray(score, float), np.asarray(positive, bool)
    n1, n0 = int(positive.sum()), int((~positive).sum())
    if not n1 or not n0:
        return None
    from scipy.stats import rankdata

    return float((rankdata(score)[positive].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))


def risk_coverage(confidence: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coverage and the error among the rows covered, most confident first."""
    order = np.argsort(-np.asarray(confidence, float), kind="stable")
    wrong = 1 - np.asarray(correct, float)[order]
    n = np.arange(1, len(order) + 1)
    return n / max(1, len(order)), np.cumsum(wrong) / n


def answered(model: Family, rows: Any, ctx: Context | None, stream: str, verify: Any, max_new_tokens: int) -> list[dict[str, Any]]:
    """Greedy answers to rows with a gold answer: text, score by the verifier, confidence. Kept in `ctx.answers` for other measures."""
    key = f"{stream}/{verify}/{max_new_tokens}"
    if ctx is not None and key in ctx.answers:
        return ctx.answers[key]
    check = verifier(verify)
    prompts = [prompt_ids(r, model.tokenizer) for r in rows]  # type: ignore[attr-defined]
    replies = model.generate(prompts, Decode(max_new_tokens=max_new_tokens))
    confidence = _confidence(model, prompts, [a[0].ids for a in replies])
    found = []
    for row, reply, sure in zip(rows, replies, confidence):
        gold = answer_of(row)
        verdict = check(reply[0].text, row)
        found.append({"gold": gold, "answer": reply[0].text, "score": float(verdict.score), "finished": reply[0].finished, "confidence": sure})
    if ctx is not None:
        ctx.answers[key] = found
    return found


def answer_table(rows: Any, answers: SequenceOf[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line a row, the same rows before and after tuning, so that a report can lay them side by side."""
    return [{"row": i, "prompt": shown_prompt(row), **{k: found[k] for k in ("gold", "answer", "score", "confidence")}} for i, (row, found) in enumerate(zip(rows, answers))]


def shown_prompt(row: Any) -> str:
    """The end of a row's prompt, which says the most."""
    return prompt_text(row)[-300:]


def _confidence(model: Family, prompts: SequenceOf[np.ndarray], answers: SequenceOf[np.ndarray]) -> list[float]:
    """exp(mean log p) of each answer under the model that gave it."""
    from luthier.core.batch import Sequence

    if "score" not in model.verbs:
        return [float("nan")] * len(prompts)
    sequences = []
    for prompt, answer in zip(prompts, answers):
        mask = np.zeros(len(prompt) + len(answer), bool)
        mask[len(prompt) :] = True
        sequences.append(Sequence(np.concatenate([prompt, answer]), mask))
    found: list[float] = []
    for start in range(0, len(sequences), 32):
        found += model.score(sequences[start : start + 32]).rows("mean").exp().tolist()
    return found


def gold_nll(model: Family, rows: Any, ctx: Context | None, limit: int) -> float | None:
    """Mean negative log-likelihood a supervised token, over at most `limit` rows."""
    rows = list(rows)[:limit]
    total = number = 0.0
    for start in range(0, len(rows), 32):
        batch = model.collate(rows[start : start + 32], train_on=ctx.train_on if ctx else "completion")
        logp = model.score(batch).logp
        total, number = total - float(logp.sum()), number + len(logp)
    return total / number if number else None


def has_answers(rows: Any) -> bool:
    """Whether rows have one right answer each; of a pair of answers neither need be the only right one."""
    return bool(rows) and len(rows) > 0 and isinstance(rows[0], Mapping) and "chosen" not in rows[0] and answer_of(rows[0]) is not None
