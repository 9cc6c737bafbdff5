"""VB-LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.adapt._shared import Targeted
from luthier.catalog import register

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("vblora", wraps="peft.VBLoRAConfig")
@dataclass
class VbLora(Targeted):
    """All low-rank factors of all layers are composed from one shared bank of short vectors, each a mix of its top-k entries.

    B and A are cut into sub-vectors; each is sum of k bank vectors weighted by a softmax of learned logits (vector bank LoRA)."""

    rank: int = 4
    """Rank of the update."""
    vectors: int = 256
    """Vectors in the bank."""
    length: int = 256
    """Length of a vector (the largest divisor of every side up to this)."""
    topk: int = 2
    """Bank vectors mixed into one sub-vector."""
    dropout: float = 0.0
    """Dropout on the update's input."""

    positive = ("rank", "vectors", "length", "topk",)
    shares = ("dropout",)

    parallel = frozenset({"single", "ddp"})

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft import VBLoRAConfig

        return VBLoRAConfig(
            r=self.rank, num_vectors=self.vectors, vector_length=self.block(model, self.length), topk=self.topk, vblora_dropout=self.dropout,
            **self.common(model),
        )
