"""Whether the model knows when it is right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from luthier.catalog import register
from luthier.errors import RecipeError
from luthier.measure import Measure, Measures
from luthier.measure._shared import answered, auroc, bins_of_equal_mass, brier, ece, has_answers, risk_coverage

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


def calibration(confidence: Any, correct: Any, bins: int = 10) -> dict[str, float | None]:
    """ECE (equal-mass bins), Brier score, AUROC of confidence against correctness, area under risk-coverage."""
    confidence, correct = np.asarray(confidence, float), np.asarray(correct, float)
    _, risk = risk_coverage(confidence, correct)
    return {
        "ece": ece(confidence, correct, bins),
        "brier": brier(confidence, correct),
        "auroc": auroc(confidence, correct > 0.5),
        "aurc": float(risk.mean()) if len(risk) else None,
    }


@register("calibration")
@dataclass
class Calibration(Measure):
    """Compare how sure the model is with how often it is right: ECE, Brier, AUROC and risk at each coverage.

    A language model's confidence in its greedy answer is exp(mean log p) of the answer's tokens; a classifier's is its largest
    probability. Suggests the confidence under which to abstain so that at most `risk` of the given answers are wrong."""

    verify: str = "exact"
    """Which verifier judges answers; the same as of the measure `task`, so that answers are shared."""
    limit: int = 200
    """At most so many test rows."""
    max_new_tokens: int = 48
    """An answer is cut here."""
    bins: int = 10
    """Bins of equal mass."""
    risk: float = 0.1
    """The share of wrong answers that the suggested abstention allows."""

    toy = {"max_new_tokens": 4}

    def __post_init__(self) -> None:
        if self.bins < 1 or not 0 <= self.risk < 1:
            raise RecipeError(f"calibration needs bins >= 1 and 0 <= risk < 1, not bins {self.bins} and risk {self.risk}.")

    def measure(self, model: Family, rows: Any, ctx: Context | None = None) -> Measures:
        out = Measures()
        found = self._answers(model, rows, ctx)
        if found is None:
            out.notes.append("There are no test rows with answers, so calibration was not measured.")
            return out
        confidence, correct = found
        out.numbers |= calibration(confidence, correct, self.bins)
        out.better |= {"ece": "lower", "brier": "lower", "auroc": "higher", "aurc": "lower"}
        out.tables["reliability"] = [
            {"confidence": float(confidence[b].mean()), "accuracy": float(correct[b].mean()), "rows": len(b)} for b in bins_of_equal_mass(confidence, self.bins)
        ]
        coverage, risk = risk_coverage(confidence, correct)
        out.plots["risk_coverage"] = {"coverage": coverage.tolist(), "risk": risk.tolist()}
        safe = np.flatnonzero(risk <= self.risk)
        if len(safe):
            threshold = float(np.sort(confidence)[::-1][safe[-1]])
            out.numbers |= {"abstain_below": threshold, "coverage_at_risk": float(coverage[safe[-1]])}
        return out

    def _answers(self, model: Family, rows: Any, ctx: Context | None) -> tuple[np.ndarray, np.ndarray] | None:
        rows = [rows[i] for i in range(min(len(rows), self.limit))] if rows is not None else []
        if not rows:
            return None
        if "generate" in model.verbs:
            if not has_answers(rows):
                return None
            answers = answered(model, rows, ctx, "test", self.verify, self.max_new_tokens)
            pair = np.array([a["confidence"] for a in answers]), np.array([float(a["score"] > 0.5) for a in answers])
            return None if np.isnan(pair[0]).any() else pair
        batch = model.collate(rows)
        if "labels" not in batch.tensors:
            return None
        p = torch.softmax(model.classify(batch).float(), -1).cpu()
        return p.max(-1).values.numpy(), (p.argmax(-1) == batch.tensors["labels"].cpu()).float().numpy()
