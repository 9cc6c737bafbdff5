"""AdaMSS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.adapt._shared import Targeted
from luthier.catalog import register

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("adamss", wraps="peft.AdamssConfig")
@dataclass
class Adamss(Targeted):
    """Cluster the weight's singular directions into subspaces and train a tiny low-rank update in each.

    Top-R SVD of W; its right directions fall into K clusters; each trains B_k A_k of rank `subspace_rank` (adaptive multi-subspaces;
    the pruning of subspaces while training is not switched on)."""

    rank: int = 100
    """R: singular directions used (at most a layer's smaller side)."""
    subspaces: int = 5
    """K: clusters."""
    subspace_rank: int = 1
    """Rank in each."""
    seed: int = 0
    """Seed of the clustering."""

    positive = ("rank", "subspaces", "subspace_rank",)

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft import AdamssConfig

        rank = min([self.rank, *(min(size) for size in self.sizes(model))])
        return AdamssConfig(
            r=rank, num_subspaces=self.subspaces, subspace_rank=self.subspace_rank, random_seed=self.seed,
            **self.common(model),
        )
