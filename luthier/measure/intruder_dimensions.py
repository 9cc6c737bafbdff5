"""LoRA vs Full Fine-tuning: An Illusion of Equivalence (paper 100)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from luthier.catalog import register
from luthier.core.modelmap import block_index
from luthier.errors import ModelError, RecipeError
from luthier.measure import Measure, Measures
from luthier.measure.weights import effective_rank

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


def intruder_dimensions(base: Tensor, tuned: Tensor, k: int = 10, epsilon: float = 0.5, side: Literal["left", "right"] = "left") -> tuple[Tensor, Tensor]:
    """(ranks of the intruders among the top `k`, best match of each of the top `k`).

    With W0 = U0 S0 V0^T and W1 = U1 S1 V1^T: m_i = max_j |<u1_i, u0_j>| over ALL singular vectors of W0; the i-th is an intruder when
    m_i < epsilon. `side` "right" compares the right singular vectors."""
    u0, _, v0 = torch.linalg.svd(base.detach().float(), full_matrices=False)
    u1, _, v1 = torch.linalg.svd(tuned.detach().float(), full_matrices=False)
    old, new = (u0.T, u1.T) if side == "left" else (v0, v1)
    match = (new[:k] @ old.T).abs().max(dim=1).values
    return torch.nonzero(match < epsilon).flatten(), match


def scale_intruders(base: Tensor, tuned: Tensor, factor: float, k: int = 10, epsilon: float = 0.5) -> Tensor:
    """W1 + (factor - 1) * sum over intruders of s_i u_i v_i^T: 1 leaves the weight as it is, 0 removes the intruders."""
    found, _ = intruder_dimensions(base, tuned, k, epsilon)
    u, s, v = torch.linalg.svd(tuned.detach().float(), full_matrices=False)
    part = (u[:, found] * s[found]) @ v[found]
    return (tuned.detach().float() + (factor - 1) * part).to(tuned.dtype)


@register("intruder-dimensions", paper=100)
@dataclass
class IntruderDimensions(Measure):
    """Count the leading singular vectors of tuned weights that resemble none of the base's: LoRA's intruders, which go with forgetting.

    For each adapted matrix W1 and its base W0 (fp32, adapters merged): C_ij = |<u1_i, u0_j>|, m_i = max_j C_ij over all j, and
    intruders = #{i <= k : m_i < epsilon}. Reported: their sum over matrices, the mean a matrix, the depth profile, the effective rank of
    the change, and the same count for right vectors. Embeddings, heads and matrices that did not move are left out. Near-equal singular
    values rotate freely, so in tiny nets compare counts with a full fine-tune's. `scale_intruders` is the paper's causal check."""

    k: int = 10
    """How many leading singular vectors of the tuned weight are looked at."""
    epsilon: float = 0.5
    """A vector that matches no old one better than this is an intruder."""
    min_size: int = 4
    """Matrices with a shorter side than this are left out."""

    compares = True

    def __post_init__(self) -> None:
        if self.k < 1 or not 0 < self.epsilon <= 1:
            raise RecipeError(f"intruder-dimensions needs k >= 1 and 0 < epsilon <= 1, not k {self.k} and epsilon {self.epsilon}.")

    def measure(self, model: Family, rows: Any, ctx: Context | None = None) -> Measures:
        if ctx is None or not ctx.has_model("base"):
            return Measures(notes=["There is no base to compare with, so intruder dimensions were not measured."])
        return self.compare(ctx.model("base").network.state_dict(), model.base_network.state_dict())

    def compare(self, base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> Measures:
        """The measure on two state dicts."""
        table: list[dict[str, Any]] = []
        for name, after in tuned.items():
            block = block_index(name)[0]
            if name not in base or after.ndim != 2 or block is None or min(after.shape) < self.min_size or torch.equal(base[name], after):
                continue
            if base[name].shape != after.shape:
                raise ModelError(f"'{name}' is {list(base[name].shape)} in the base and {list(after.shape)} in the tuned model, so their singular vectors cannot be compared.")
            left, match = intruder_dimensions(base[name], after, self.k, self.epsilon)
            right, _ = intruder_dimensions(base[name], after, self.k, self.epsilon, "right")
            delta = after.float() - base[name].float()
            table.append(
                {"name": name, "block": block, "intruders": len(left), "ranks": (left + 1).tolist(), "right": len(right),
                 "lowest_match": float(match.min()), "effective_rank": effective_rank(delta)}
            )  # fmt: skip
        if not table:
            return Measures({"intruders": 0.0, "matrices": 0.0}, notes=["No matrix inside a block moved."])
        total = sum(r["intruders"] for r in table)
        out = Measures(
            {
                "intruders": float(total), "matrices": float(len(table)), "intruders_per_matrix": total / len(table),
                "right_intruders": float(sum(r["right"] for r in table)), "effective_rank": sum(r["effective_rank"] for r in table) / len(table),
            },
            {"by matrix": table},
        )  # fmt: skip
        depth: dict[int, int] = {}
        for row in table:
            depth[row["block"]] = depth.get(row["block"], 0) + row["intruders"]
        out.plots["by depth"] = {"block": sorted(depth), "intruders": [depth[b] for b in sorted(depth)]}
        out.better = {"intruders": "lower", "intruders_per_matrix": "lower"}
        return out
