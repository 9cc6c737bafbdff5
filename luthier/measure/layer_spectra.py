"""How heavy the tail of every layer's spectrum is (the view behind paper 77, OwLore)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from luthier.catalog import register
from luthier.core.modelmap import depth
from luthier.errors import RecipeError
from luthier.measure import Measure, Measures

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


def hill(values: Tensor, share: float = 0.5) -> float | None:
    """Hill's estimate of the exponent of a density p(x) ~ x^-alpha: 1 + k / sum_{i <= k} ln(x_i / x_{k+1}) over the k largest values.

    k is `share` of the positive values; None where fewer than three are positive or the tail has no spread."""
    x = values.double().flatten()
    x = x[x > 0].sort(descending=True).values
    k = min(len(x) - 1, max(1, int(share * len(x))))
    if len(x) < 3:
        return None
    spread = float((x[:k] / x[k]).log().sum())
    return 1 + k / spread if spread > 0 else None


def layer_spectra(weights: Mapping[str, Tensor], share: float = 0.5, min_size: int = 4) -> list[dict[str, Any]]:
    """For every matrix inside a block: alpha of the eigenvalues of W^T W, the largest eigenvalue, the stable rank ||W||_F^2 / ||W||_2^2."""
    places = depth(weights)
    table: list[dict[str, Any]] = []
    for name, tensor in weights.items():
        place = places[name]
        if place is None or tensor.ndim != 2 or not tensor.is_floating_point() or min(tensor.shape) < min_size:
            continue
        eigenvalues = torch.linalg.svdvals(tensor.detach().float()).square()
        top = float(eigenvalues[0])
        table.append({"name": name, "block": place[0], "alpha": hill(eigenvalues, share), "largest": top, "stable_rank": float(eigenvalues.sum()) / top if top else None})
    return table


@register("layer-spectra", paper=77)
@dataclass
class LayerSpectra(Measure):
    """Estimate how heavy-tailed every layer's spectrum is: a small exponent is the mark of a layer that training has shaped most.

    Of every matrix inside a block, the eigenvalues of W^T W are taken as draws from p(x) ~ x^-alpha, and alpha = 1 + k / sum_{i <= k}
    ln(x_i / x_{k+1}) (Hill) over their largest half. Reported: the mean over matrices, a table with stable ranks, and alpha by depth; with
    a base beside it how far the mean moved. Where rows are at hand for it (stream `calibration`, else the test rows), the outlier ratios
    that `owlore` draws layers by are set against alpha: their rank correlation, negative where heavy tails and outliers go together. Needs
    no training; on tiny matrices the estimate is rough."""

    share: float = 0.5
    """The tail: the largest share of the eigenvalues."""
    min_size: int = 4
    """Matrices with a shorter side than this are left out."""
    threshold: float = 5.0
    """An activation-weighted weight that exceeds its layer's mean this often is an outlier (13 for Llama-2, 3 to 13 elsewhere)."""
    samples: int = 64
    """Rows that activations are taken from; 0: no outlier ratios."""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or self.threshold <= 0 or self.samples < 0:
            raise RecipeError(f"layer-spectra needs 0 < share < 1, threshold > 0 and samples >= 0, not {self.share}, {self.threshold} and {self.samples}.")

    def measure(self, model: Family, rows: Any, ctx: Context | None = None) -> Measures:
        table = layer_spectra(model.base_network.state_dict(), self.share, self.min_size)
        depths = _by_depth(table)
        if not depths:
            return Measures(notes=["No matrix inside a block has a spectrum to look at."])
        out = Measures({"alpha": float(np.mean(list(depths.values())))}, {"by matrix": table})
        out.plots["by depth"] = {"block": list(depths), "alpha": list(depths.values())}
        if ctx is not None and ctx.has_model("base"):
            before = _by_depth(layer_spectra(ctx.model("base").base_network.state_dict(), self.share, self.min_size))
            if before.keys() == depths.keys():
                out.numbers["alpha_moved"] = out.numbers["alpha"] - float(np.mean(list(before.values())))  # type: ignore[operator]
        self._outliers(model, rows, ctx, depths, out)
        return out

    def _outliers(self, model: Family, rows: Any, ctx: Context | None, depths: dict[int, float], out: Measures) -> None:
        """Outlier ratios by layer, and how they go with alpha."""
        from luthier.adapt.owlore import outlier_ratio
        from luthier.core.collect import collect
        from luthier.core.modelmap import ModelMap

        some = list(ctx.rows("calibration") if ctx is not None and ctx.has_rows("calibration") else rows or ())[: self.samples]
        if not some:
            return
        where = ModelMap(model.base_network)
        layers = [where.linears(b) for b in range(len(where.blocks))]
        stats = collect(model, some, {"column_norm"}, {n: m for found in layers for n, m in found.items()})
        ratios: dict[int, float] = {}
        for block, found in enumerate(layers):
            seen = {n: m for n, m in found.items() if n in stats}
            matrices = [m.weight.detach() if isinstance(m, torch.nn.Linear) else m.weight.detach().T for m in seen.values()]  # type: ignore[operator]
            ratios[block] = outlier_ratio(matrices, [stats[n]["column_norm"].to(m.weight.device) for n, m in seen.items()], self.threshold)  # type: ignore[arg-type]
        out.plots["outliers by depth"] = {"block": list(ratios), "outlier_ratio": list(ratios.values())}
        out.numbers["outlier_ratio"] = float(np.mean(list(ratios.values())))
        out.numbers["outliers_with_alpha"] = _rank_correlation([depths[b] for b in depths if b in ratios], [ratios[b] for b in depths if b in ratios])


def _by_depth(table: list[dict[str, Any]]) -> dict[int, float]:
    found: dict[int, list[float]] = {}
    for row in table:
        if row["alpha"] is not None:
            found.setdefault(row["block"], []).append(row["alpha"])
    return {block: float(np.mean(found[block])) for block in sorted(found)}


def _rank_correlation(x: list[float], y: list[float]) -> float | None:
    """Spearman's; None where one side does not vary or fewer than three layers are there."""
    if len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    from scipy.stats import spearmanr

    return float(spearmanr(x, y).statistic)
