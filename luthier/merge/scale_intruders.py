"""Scaling intruders: shrink the singular directions of a fine-tune that resemble none of its base's."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from luthier.catalog import register
from luthier.core.modelmap import block_index
from luthier.core.source import TensorSource, aligned, left_out
from luthier.errors import RecipeError
from luthier.measure.intruder_dimensions import scale_intruders
from luthier.merge import Merger
from luthier.merge._shared import models

if TYPE_CHECKING:
    from luthier.core.context import Context


@register("scale-intruders", paper=100)
@dataclass
class ScaleIntruders(Merger):
    """Shrink the intruder dimensions of a LoRA fine-tune: some of what it forgot comes back, at little cost in the new task.

    For every matrix inside the blocks: W = W1 + (factor - 1) * sum over intruders of s_i u_i v_i^T, where the intruders are those of the
    `k` leading singular triples of the tuned W1 whose left vector matches none of the base's better than `epsilon`. factor 1 changes
    nothing, 0 removes them. The paper scales slightly below 1; the default 0.7 is where its small experiment gained (ours). Adapters must
    be merged into their base (runs and LoRA folders are, when they are read). Only one tuned model; all else stays as tuned."""

    factor: float = 0.7
    """What intruders are multiplied by."""
    k: int = 10
    """How many leading singular vectors are looked at."""
    epsilon: float = 0.5
    """A vector that matches no old one better than this is an intruder."""
    min_size: int = 4
    """Matrices with a shorter side than this are left as tuned."""
    skip: list[str] = field(default_factory=list)
    """Tensors to leave as tuned: names, leading parts of names, or globs."""

    def __post_init__(self) -> None:
        if self.k < 1 or not 0 < self.epsilon <= 1 or not self.factor >= 0:
            raise RecipeError(f"scale-intruders needs k >= 1, 0 < epsilon <= 1 and factor >= 0, not {self.k}, {self.epsilon} and {self.factor}.")

    def merge(self, base: Any, tuned: SequenceOf[Any], ctx: Context | None = None) -> TensorSource:
        listed = models(tuned)
        if base is None or len(listed) != 1:
            raise RecipeError(f"scale-intruders compares one tuned model with its base; it was given {len(listed)} and {'no' if base is None else 'a'} base.")
        home = TensorSource.of(base)
        other = aligned(home, TensorSource.of(listed[0], home))

        def read(name: str) -> Tensor:
            after = other[name]
            looked_at = after.ndim == 2 and after.is_floating_point() and min(after.shape) >= self.min_size and block_index(name)[0] is not None
            if not looked_at or left_out(name, self.skip) or after.equal(home[name].to(after)):
                return after.clone()
            return scale_intruders(home[name], after, self.factor, self.k, self.epsilon)

        return TensorSource(home, read, other.meta, home.aliases)
