"""Where the weights moved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from luthier.catalog import register
from luthier.core.modelmap import block_index
from luthier.errors import RecipeError
from luthier.measure import Measure, Measures

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


def effective_rank(matrix: Tensor) -> float:
    """exp of the entropy of the normalised singular values; 0 for a matrix of zeros."""
    s = torch.linalg.svdvals(matrix.float())
    if float(s.sum()) == 0:
        return 0.0
    p = s / s.sum()
    p = p[p > 0]
    return float(torch.exp(-(p * p.log()).sum()))


def weights(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], ranks: int = 0) -> list[dict[str, Any]]:
    """For every floating tensor: ||delta||, ||delta|| / ||base||, share of entries changed, and for up to `ranks` of the most moved
    matrices the effective rank of delta. Names must agree; tensors that exist on one side only are skipped."""
    table: list[dict[str, Any]] = []
    for name in tuned:
        if name not in base or not torch.is_floating_point(tuned[name]) or base[name].shape != tuned[name].shape:
            continue
        before, after = base[name].float().cpu(), tuned[name].float().cpu()
        delta = after - before
        norm, size = float(delta.norm()), float(before.norm())
        table.append(
            {"name": name, "block": block_index(name)[0], "move": norm, "relative": norm / size if size else None, "changed": float((delta != 0).float().mean())}
        )
    moved = sorted((r for r in table if tuned[r["name"]].ndim == 2 and r["move"] > 0), key=lambda r: -r["move"])
    for row in moved[:ranks]:
        row["effective_rank"] = effective_rank(tuned[row["name"]].float().cpu() - base[row["name"]].float().cpu())
    return table


@register("weights")
@dataclass
class Weights(Measure):
    """Compare every weight tensor with the base's: how far it moved, in which block, over how many directions.

    Reports the relative size of the whole update, the share of weights that changed, the mean effective rank of the most moved
    matrices (exp of the entropy of the normalised singular values of the change), and a table by block for the report's heat map."""

    ranks: int = 8
    """For how many of the most moved matrices the effective rank is computed."""

    compares = True

    def __post_init__(self) -> None:
        if self.ranks < 0:
            raise RecipeError(f"weights.ranks is a number of matrices, not {self.ranks}.")

    def measure(self, model: Family, rows: Any, ctx: Context | None = None) -> Measures:
        if ctx is None or not ctx.has_model("base"):
            return Measures(notes=["There is no base to compare with, so weights were not measured."])
        base = ctx.model("base").network.state_dict()
        tuned = model.base_network.state_dict()
        table = weights(base, tuned, self.ranks)
        if not table:
            return Measures(notes=["The tuned model's tensors have other names than the base's, so weights were not measured."])
        whole = sum(r["move"] ** 2 for r in table) ** 0.5 / max(1e-30, sum(float(base[r["name"]].float().norm()) ** 2 for r in table) ** 0.5)
        count = sum(tuned[r["name"]].numel() for r in table)
        changed = sum(r["changed"] * tuned[r["name"]].numel() for r in table) / count
        ranks = [r["effective_rank"] for r in table if "effective_rank" in r]
        out = Measures({"relative_move": whole, "share_changed": changed, "effective_rank": sum(ranks) / len(ranks) if ranks else None})
        out.better = {"relative_move": "lower", "share_changed": "lower"}
        out.tables["by tensor"] = sorted(table, key=lambda r: -r["move"])
        return out
