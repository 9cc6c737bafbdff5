"""BEFT: tuning of added biases alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from luthier.adapt._shared import Targeted
from luthier.catalog import register

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("beft", wraps="peft.BeftConfig")
@dataclass
class Beft(Targeted):
    """Add a learned bias to the value projections and train only that.

    y' = W x + b + delta, delta starts at 0 (bias-efficient fine-tuning: the value bias is worth more than the query's or key's)."""

    targets: list[str] = field(default_factory=list)
    """Layers that get a bias; default: the value projections, by peft's table for the architecture."""

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft import BeftConfig

        if not self.targets:
            return BeftConfig(task_type=self.task(model), modules_to_save=self.whole(model) or None)
        return BeftConfig(**self.common(model))
