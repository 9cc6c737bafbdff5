"""BD-LoRA."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from luthier.adapt._shared import LoraLike
from luthier.catalog import register

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("bd-lora", wraps="peft.LoraConfig")
@dataclass
class BdLora(LoraLike):
    """LoRA with block-diagonal factors that match the shards of a model served on several devices, so that serving needs no extra exchange.

    Layers cut by rows (attention and MLP outputs) get a block-diagonal A, layers cut by columns (queries, keys, values, gate, up) a
    block-diagonal B, each of `blocks` blocks."""

    blocks: int = 2
    """Blocks, usually the number of shards when serving."""
    row_sharded: list[str] = field(default_factory=lambda: ["o_proj", "down_proj", "out_proj"])
    """Layers with a block-diagonal A."""
    column_sharded: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"])
    """Layers with a block-diagonal B."""

    positive = ("rank", "alpha", "blocks",)

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft.tuners.lora.config import BdLoraConfig

        blocks = BdLoraConfig(
            target_modules_bd_a=self.row_sharded, target_modules_bd_b=self.column_sharded, nblocks=self.blocks, match_strict=False
        )
        return self.lora(model, use_bdlora=blocks)
