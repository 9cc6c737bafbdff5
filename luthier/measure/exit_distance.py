"""How far inner layers are from the last one, as the head reads them (the view behind paper 106, sorted fine-tuning)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from luthier.catalog import register
from luthier.core.exits import exit_depths
from luthier.core.scores import TokenScores, kl
from luthier.errors import RecipeError
from luthier.measure import Measure, Measures
from luthier.objective.sorted_exits import exit_scores

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family

COLUMNS = ("kl", "cosine", "agreement", "loss", "right")


def exit_distance(inner: TokenScores, last: TokenScores) -> dict[str, torch.Tensor]:
    """Per token: KL(last || inner) of the distributions, the cosine of the normed states, whether the likeliest tokens are one; and the
    loss and the rightness of the inner layer itself."""
    agreement = inner.map(lambda logits, at, final: logits.argmax(-1) == final.argmax(-1), last)
    divergence = inner.map(lambda logits, at, final: kl(final, logits), last)
    cosine = torch.nn.functional.cosine_similarity(inner.hidden.float(), last.hidden.float(), dim=-1)
    return dict(zip(COLUMNS, (divergence, cosine, agreement.float(), -inner.logp, inner.hit.float())))


@register("exit-distance", paper=106)
@dataclass
class ExitDistance(Measure):
    """Measure how much each further layer still changes: where inner layers already say what the last one says, the rest can be left out.

    For n in `exits`, the state after n blocks passes the final norm and the head. Over the supervised tokens of the test rows, a table holds
    the mean KL(last || n), cosine of the normed states, share of tokens on which both would choose the same, loss, and share of right
    tokens of each depth. Reported as numbers: the mean KL over the inner depths, and the depth from which on `agree` of the tokens are the last
    layer's (`depth_in_agreement`, in blocks): after plain tuning that is near the whole depth, after `objective: sorted-exits` far from it, and
    `decode: early-exit` gains as much."""

    exits: list[int] = field(default_factory=list)
    """Numbers of blocks; default: 30 % to 100 % of the depth in tenths, as sorted-exits has it."""
    agree: float = 0.95
    """The share of tokens on which a depth must agree with the last one."""
    limit: int = 200
    """At most so many test rows."""
    batch: int = 16
    """Rows at a time."""

    families = frozenset({"causal-lm"})

    def __post_init__(self) -> None:
        if any(n < 1 for n in self.exits) or not 0 < self.agree <= 1 or self.limit < 1 or self.batch < 1:
            raise RecipeError(f"exit-distance needs exits >= 1, 0 < agree <= 1, limit >= 1 and batch >= 1, not {self.exits}, {self.agree}, {self.limit} and {self.batch}.")

    def measure(self, model: Family, rows: Any, ctx: Context | None = None) -> Measures:
        depths = exit_depths(model, self.exits)  # type: ignore[arg-type]
        found = self._by_depth(model, [rows[i] for i in range(min(len(rows or ()), self.limit))], depths, ctx.train_on if ctx is not None else "completion")
        if not len(next(iter(found.values()))["kl"]):
            return Measures(notes=["No test row has a supervised token, so the depths were not compared."])
        table = [{"depth": n, **{k: float(v.mean()) for k, v in values.items()}} for n, values in found.items()]
        out = Measures(tables={"by depth": table}, plots={"by depth": {k: [row[k] for row in table] for k in table[0]}})
        if inner := table[:-1]:
            out.numbers["kl_to_last"] = float(np.mean([row["kl"] for row in inner]))
        out.numbers["depth_in_agreement"] = next(row["depth"] for i, row in enumerate(table) if all(later["agreement"] >= self.agree for later in table[i:]))
        out.better |= {"kl_to_last": "lower", "depth_in_agreement": "lower"}
        return out

    def _by_depth(self, model: Family, rows: list[Any], depths: list[int], train_on: str) -> dict[int, dict[str, torch.Tensor]]:
        kept: dict[int, list[dict[str, torch.Tensor]]] = {n: [] for n in depths}
        with model.evaluating():
            for start in range(0, len(rows), self.batch):
                scores = exit_scores(model, model.collate(rows[start : start + self.batch], train_on=train_on), depths)  # type: ignore[arg-type]
                for n in depths:
                    kept[n].append(exit_distance(scores[n], scores[depths[-1]]))
        return {n: {k: torch.cat([part[k] for part in parts]) if parts else torch.zeros(0) for k in COLUMNS} for n, parts in kept.items()}
