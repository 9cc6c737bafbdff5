"""Whether a merged model does better than the models it was merged from, as in the domain-adaptation study of paper 89."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from luthier.catalog import register
from luthier.core.verify import verifier
from luthier.errors import RecipeError
from luthier.measure import Measure, Measures
from luthier.measure._shared import answered, has_answers

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


def synergy(merged: Any, parents: SequenceOf[Any]) -> dict[str, float | None]:
    """From scores row by row of the merged model and its parents on the same rows:

    weak = mean(merged) - mean of the parents' means; strict = mean(merged) - the best parent's mean; each with a 95 % t-interval of the
    row-wise difference (None for a single row). The best parent is chosen on the same rows, which makes strict a little too low."""
    m = np.asarray(merged, float)
    p = np.stack([np.asarray(x, float) for x in parents])
    best = int(p.mean(1).argmax())
    out: dict[str, float | None] = {"merged": float(m.mean()), "expected": float(p.mean()), "best_parent": float(p[best].mean())}
    for name, other in (("weak", p.mean(0)), ("strict", p[best])):
        gap = m - other
        out[name] = float(gap.mean())
        half = _half(gap)
        out |= {f"{name}_low": None if half is None else float(gap.mean()) - half, f"{name}_high": None if half is None else float(gap.mean()) + half}
    return out


def _half(values: np.ndarray) -> float | None:
    """Half the width of the 95 % t-interval of the mean."""
    from scipy.stats import t

    n = len(values)
    return float(t.ppf(0.975, n - 1) * values.std(ddof=1) / n**0.5) if n > 1 else None


@register("synergy", paper=89)
@dataclass
class Synergy(Measure):
    """Compare a merged model with its parents, row by row: does it beat their mean (weak synergy), or even the better of them (strict)?

    For each stream of rows: weak = P(merged) - mean_i P(parent_i), which the study reports; strict = P(merged) - max_i P(parent_i), which
    "capabilities that neither parent has" needs. P is the share of greedy answers that the verifier accepts; intervals are of paired row
    differences. Name the parents under `models:`. A fair claim also compares with plain averaging at the same number of tries."""

    parents: list[str] = field(default_factory=lambda: ["general", "domain"])
    """The models that were merged, by their names under `models:` (or base)."""
    streams: list[str] = field(default_factory=lambda: ["test", "general"])
    """Which row streams are compared, where the data has them."""
    verify: str = "exact"
    """Which verifier judges answers."""
    limit: int = 200
    """At most so many rows of each stream."""
    max_new_tokens: int = 48
    """An answer is cut here."""

    compares = True
    families = frozenset({"causal-lm"})
    toy_models: ClassVar[tuple[str, ...]] = ("general", "domain")
    toy = {"max_new_tokens": 4}

    def __post_init__(self) -> None:
        if len(set(self.parents)) != len(self.parents) or len(self.parents) < 2:
            raise RecipeError(f"parents is {self.parents}; name at least two different models.")
        if self.limit < 1 or self.max_new_tokens < 1:
            raise RecipeError(f"limit {self.limit} and max_new_tokens {self.max_new_tokens} must be at least 1.")
        verifier(self.verify)
        known = ("base", "stage", "previous")
        self.needs = frozenset({"generation", *(p if p in known else f"model:{p}" for p in self.parents)})  # type: ignore[misc]

    def measure(self, model: Family, rows: Any, ctx: Context | None = None) -> Measures:
        out = Measures()
        missing = [p for p in self.parents if ctx is None or not ctx.has_model(p)]
        if ctx is None or missing:
            out.notes.append(f"There is no model '{missing[0]}' to compare with, so synergy was not measured; name the parents under `models:`.")
            return out
        for stream in self.streams:
            found = rows if stream == "test" else ctx.rows(stream) if ctx.has_rows(stream) else None
            part = [] if found is None else [found[i] for i in range(min(len(found), self.limit))]
            if not has_answers(part):
                continue
            merged = self._scores(model, part, ctx, stream, shared=True)
            parents = [self._scores(ctx.model(p), part, ctx, stream) for p in self.parents]
            prefix = "" if stream == "test" else f"{stream}_"
            told = synergy(merged, parents)
            out.numbers |= {f"{prefix}{k}": v for k, v in told.items()}
            out.numbers |= {f"{prefix}{name}": float(np.mean(p)) for name, p in zip(self.parents, parents)}
            out.better |= {f"{prefix}{k}": "higher" for k in ("weak", "strict")}
        if not out.numbers:
            out.notes.append("There are no rows with right answers, so synergy was not measured; add `data: {test: FILE}`.")
        return out

    def _scores(self, model: Any, rows: list[Any], ctx: Context, stream: str, shared: bool = False) -> list[float]:
        """Row by row; only the measured model's own answers are shared with other measures."""
        with model.evaluating():
            return [a["score"] for a in answered(model, rows, ctx if shared else None, stream, self.verify, self.max_new_tokens)]
