"""How well an old base's patch would serve the new base, against a patch trained on it (PortLLM, paper 91)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from luthier.catalog import register
from luthier.core.at_weights import at_weights, merit
from luthier.core.linalg import effective_rank
from luthier.core.modelmap import category
from luthier.errors import RecipeError
from luthier.measure import Measure, Measures

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


def subspace_overlap(one: Tensor, other: Tensor, r: int) -> float:
    """||U1^T U2||_F^2 / r of the top-r left singular vectors: 1 for the same subspace, r / m on average for random ones."""
    r = min(r, *one.shape)
    u1, u2 = (torch.linalg.svd(x.float(), full_matrices=False)[0][:, :r] for x in (one, other))
    return float((u1.T @ u2).square().sum() / r)


def portability(old: Mapping[str, Tensor], new: Mapping[str, Tensor], patched: Mapping[str, Tensor], retrained: Mapping[str, Tensor], rank: int = 8) -> Measures:
    """Naive update and residual of theta'_i = theta + (Delta + Delta_i) + (Delta'_i - Delta_i), by matrix and over all.

    Delta = new - old, Delta_i = patched - old, Delta'_i = retrained - new. Norms run over every floating tensor; spectral norms, ranks and
    subspaces over the matrices inside blocks that a patch changed."""
    sums = dict.fromkeys(("naive", "residual", "patch", "retrained", "evolution", "along", "between"), 0.0)
    table: list[dict[str, Any]] = []
    for name in old:
        if any(name not in m or m[name].shape != old[name].shape for m in (new, patched, retrained)) or not old[name].is_floating_point():
            continue
        o, n, p, t = (m[name].detach().double().cpu() for m in (old, new, patched, retrained))
        moved, ours, theirs = n - o, p - o, t - n
        parts = {"naive": moved + ours, "residual": theirs - ours, "patch": ours, "retrained": theirs, "evolution": moved}
        for key, value in parts.items():
            sums[key] += float(value.square().sum())
        sums["along"] += float((moved * ours).sum())
        sums["between"] += float((theirs * ours).sum())
        if o.ndim == 2 and category(name) not in ("embedding", "head") and bool(ours.any() or theirs.any()):
            table.append(_matrix(name, parts, rank))
    return _summary(sums, table)


def _matrix(name: str, parts: Mapping[str, Tensor], rank: int) -> dict[str, Any]:
    naive, residual = (torch.linalg.svdvals(parts[k]) for k in ("naive", "residual"))
    row: dict[str, Any] = {
        "name": name, "residual_over_naive": _ratio(float(residual.norm()), float(naive.norm())), "spectral_over_naive": _ratio(float(residual[0]), float(naive[0])),
        "naive_rank": effective_rank(naive), "residual_rank": effective_rank(residual), "cosine": _cosine(parts["evolution"], parts["patch"]), "overlap": None,
    }  # fmt: skip
    if bool(parts["evolution"].any()) and bool(parts["patch"].any()):
        row["overlap"] = subspace_overlap(parts["evolution"], parts["patch"], rank)
    return row


def _summary(sums: Mapping[str, float], table: list[dict[str, Any]]) -> Measures:
    size = {k: v**0.5 for k, v in sums.items() if k not in ("along", "between")}
    out = Measures(
        {
            "residual_over_naive": _ratio(size["residual"], size["naive"]), "residual_over_patch": _ratio(size["residual"], size["patch"]),
            "evolution": size["evolution"], "patch": size["patch"], "retrained_patch": size["retrained"], "residual": size["residual"],
            "cosine_to_evolution": _ratio(sums["along"], size["evolution"] * size["patch"]), "cosine_of_patches": _ratio(sums["between"], size["retrained"] * size["patch"]),
        },
        {"by matrix": table},
    )  # fmt: skip
    for key in ("spectral_over_naive", "residual_rank", "naive_rank", "overlap"):
        known = [row[key] for row in table if row[key] is not None]
        out.numbers[key] = sum(known) / len(known) if known else None
    out.better = {"residual_over_naive": "lower", "residual_over_patch": "lower", "cosine_of_patches": "higher"}
    return out


def _ratio(a: float, b: float) -> float | None:
    return a / b if b else None


def _cosine(a: Tensor, b: Tensor) -> float | None:
    return _ratio(float((a * b).sum()), float(a.norm() * b.norm()))


@register("portability", paper=91)
@dataclass
class Portability(Measure):
    """Would the old base's patch have done? Compares the patch that was carried over with the one just trained on the new base, in weights and in scores.

    The run trains on the new base theta' and gives theta'_i. The recipe's `models:` name the old base theta and its own fine-tune theta_i. With
    Delta = theta' - theta, Delta_i = theta_i - theta, Delta'_i = theta'_i - theta': the naive update Delta + Delta_i, the residual Delta'_i -
    Delta_i, the ratios of their norms (Frobenius over all, spectral a matrix), effective ranks (a low rank does not mean small: look at the norms), the
    cosine and the overlap of the top-`rank` subspaces of Delta and Delta_i. Scores on the test rows (accuracy, or mean log p a token) of the
    new base as it is, of theta' + Delta_i, and of theta'_i. Train both LoRA patches from the same seed, else the residual holds the
    difference of their starts. Rank 8 is the paper's patches', as far as we know."""

    old: str = "old"
    """The old base, by its name under `models:`."""
    patched: str = "patched"
    """The old base's fine-tune, by its name under `models:` (a LoRA folder will do)."""
    rank: int = 8
    """How many leading directions of each update are compared."""
    limit: int = 200
    """At most so many test rows."""

    compares = True
    toy_models: ClassVar[tuple[str, ...]] = ("old", "patched")

    def __post_init__(self) -> None:
        if self.rank < 1 or self.limit < 1:
            raise RecipeError(f"portability needs rank >= 1 and limit >= 1, not rank {self.rank} and limit {self.limit}.")

    def measure(self, model: Family, rows: Any, ctx: Context | None = None) -> Measures:
        if ctx is None or not ctx.has_model("base"):
            return Measures(notes=["There is no base to compare with, so portability was not measured."])
        missing = [name for name in (self.old, self.patched) if not ctx.has_model(name)]
        if missing:
            return Measures(notes=[f"Portability compares with an old base and its fine-tune; add `models: {{{missing[0]}: MODEL}}`."])
        base = ctx.model("base")
        states = [dict(_plain(f)) for f in (ctx.model(self.old), base, ctx.model(self.patched), model)]
        old, new, patched, tuned = states
        out = portability(old, new, patched, tuned, self.rank)
        if rows is not None and len(rows) and {"score", "classify"} & model.verbs:
            self._scores(states, base, model, rows, ctx, out)
        return out

    def _scores(self, states: list[dict[str, Tensor]], base: Family, model: Family, rows: Any, ctx: Context, out: Measures) -> None:
        old, new, patched, _ = states
        some = [rows[i] for i in range(min(len(rows), self.limit))]
        batches = [base.collate(some[at : at + 32], train_on=ctx.train_on) for at in range(0, len(some), 32)]
        if "score" not in base.verbs and "labels" not in batches[0].tensors:
            return
        out.numbers["new_base_score"] = merit(base, batches)
        ported = {n: t + (patched[n] - old[n]).to(t.device) for n, t in new.items() if n in patched and n in old and t.is_floating_point() and t.shape == old[n].shape}
        with at_weights(base.network, ported):
            out.numbers["ported_score"] = merit(base, batches)
        out.numbers["retrained_score"] = merit(model, batches)
        out.numbers["retraining_gains"] = out.numbers["retrained_score"] - out.numbers["ported_score"]  # type: ignore[operator]
        out.better |= {"new_base_score": "higher", "ported_score": "higher", "retrained_score": "higher"}


def _plain(family: Family) -> Mapping[str, Tensor]:
    """Tensors under the names of the plain model, adapters merged in."""
    from luthier.core.source import TensorSource

    return TensorSource.of(family)
