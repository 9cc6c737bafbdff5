"""Task arithmetic: the sum of the fine-tunes' updates, scaled."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from luthier.catalog import register
from luthier.core.source import TensorSource, applied
from luthier.merge._shared import VectorMerger, deltas, summed

if TYPE_CHECKING:
    from luthier.core.context import Context


def task_arithmetic(base: Any, tuned: Any, scale: float = 1.0, weights: SequenceOf[float] | None = None, skip: SequenceOf[str] = ()) -> TensorSource:
    """theta_0 + scale * sum_t w_t (theta_t - theta_0), lazily."""
    base = TensorSource.of(base)
    return applied(base, summed(deltas(base, tuned, skip), scale, weights))


@register("task-arithmetic")
@dataclass
class TaskArithmetic(VectorMerger):
    """Add up what several fine-tunes changed and apply the sum, scaled, to their common base; a negative weight takes a skill away.

    theta = theta_0 + scale * sum_t w_t (theta_t - theta_0). A sum, not a mean: with several models `scale` is usually 0.3 to 0.5 and
    has to shrink as more are added (1/T gives the plain average). One model with scale 1 is that model exactly. The baseline of
    breadcrumbs, ties and lines. Needs models that were tuned from the same base."""

    scale: float = 1.0
    """What the summed update is multiplied by."""
    weights: list[float] | None = None
    """One weight for each model; all 1 if not given."""
    skip: list[str] = field(default_factory=list)
    """Tensors to leave as the base has them: names, leading parts of names, or globs. Task heads belong here."""

    by_rows = True

    def update(self, base: Any, tuned: SequenceOf[Any], ctx: Context | None = None) -> TensorSource:
        return summed(deltas(base, tuned, self.skip), self.scale, self.weights)
