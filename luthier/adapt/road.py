"""RoAd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from luthier.adapt._shared import Targeted
from luthier.catalog import register

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("road", wraps="peft.RoadConfig")
@dataclass
class Road(Targeted):
    """Rotate and scale pairs of a layer's outputs in the plane: two numbers an output, no matrix products.

    y' = R(theta, alpha) y with 2 x 2 rotation-scalings on the diagonal (2D rotary adaptation)."""

    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    """How many numbers each pair of outputs has."""
    group_size: int = 64
    """Elements that are paired up together (the largest divisor of every output width up to this)."""

    positive = ("group_size",)

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft import RoadConfig

        return RoadConfig(variant=self.variant, group_size=self.block(model, self.group_size, "out"), **self.common(model))
