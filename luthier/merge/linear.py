"""Linear: a weighted sum of whole models, by default divided by the weights."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from luthier.catalog import register
from luthier.core.source import TensorSource, aligned, left_out, working
from luthier.merge import Merger
from luthier.merge._shared import average, ingredients, weights_of

if TYPE_CHECKING:
    from luthier.core.context import Context


def linear(
    states: Any, weights: SequenceOf[float] | None = None, normalise: bool = True, skip: SequenceOf[str] = (), home: TensorSource | None = None
) -> TensorSource:  # fmt: skip
    """sum_i w_i theta_i, divided by sum_i w_i if `normalise`; lazily, in the types of `home` (or else of the first model)."""
    listed = ingredients(None, states)[0]
    if normalise:
        return average(listed, weights, skip, home)
    home, skip, w = home or listed[0], list(skip), weights_of(weights, len(listed))
    ready = [aligned(home, one, skip) for one in listed]

    def read(name: str) -> Tensor:
        own = home[name]
        if not own.is_floating_point() or left_out(name, skip):
            return own.clone()
        total = torch.zeros(own.shape, dtype=working(own.dtype if own.dtype.itemsize > 1 else torch.float32, wide=True), device=own.device)
        for weight, state in zip(w, ready):
            total.add_(state[name].to(own.device, total.dtype), alpha=weight)
        return total.to(own.dtype)

    return TensorSource(home, read, home.meta, home.aliases)


@register("linear")
@dataclass
class Linear(Merger):
    """Add whole models up with a weight each: a weighted average, or without `normalise` any linear combination of them.

    theta = sum_i w_i theta_i / sum_i w_i, or the sum alone. With `normalise` it is uniform-soup with weights (and mergekit's `linear`);
    without it weights that do not sum to 1 scale the weights of the model themselves, which is seldom wanted: to scale what was learned,
    use task-arithmetic. Weights 2 and -1 without `normalise` extrapolate from the second model beyond the first. The models share their
    initialisation. Sums run in higher precision; integer tensors are the base's."""

    weights: list[float] | None = None
    """One weight for each model (the base first, if included); all 1 if not given."""
    normalise: bool = True
    """Divide by the sum of the weights."""
    include_base: bool = False
    """Whether the base is one of the models."""
    skip: list[str] = field(default_factory=list)
    """Tensors to leave as the base (or, without one, the first model) has them: names, leading parts of names, or globs."""

    by_rows = True

    def merge(self, base: Any, tuned: SequenceOf[Any], ctx: Context | None = None) -> TensorSource:
        states, home = ingredients(base, tuned, self.include_base)
        return linear(states, self.weights, self.normalise, self.skip, home)
