"""The uniform soup: the plain average of models that were tuned from the same start."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from luthier.catalog import register
from luthier.core.source import TensorSource
from luthier.merge import Merger
from luthier.merge._shared import average, ingredients

if TYPE_CHECKING:
    from luthier.core.context import Context


def uniform_soup(states: Any, weights: SequenceOf[float] | None = None, skip: SequenceOf[str] = ()) -> TensorSource:
    """sum_i w_i theta_i / sum_i w_i, lazily; equal weights by default."""
    return average(ingredients(None, states)[0], weights, skip)


@register("uniform-soup", paper=62)
@dataclass
class UniformSoup(Merger):
    """Average the weights of several fine-tunes of one model: often better than the best of them, at the cost of one.

    theta = (1/k) sum_i theta_i. The ingredients share the initialisation, head included (different random heads cannot be averaged:
    leave them out with `skip`, or tune the head first). With `include_base` the base is an ingredient as well; one fine-tune and its
    base are WiSE-FT. Sums run in higher precision, so a soup of equal models is that model. LoRA folders enter as merged products
    B A. Integer tensors are the first model's; batch-norm statistics should be computed anew. A linear model's soup is the ensemble
    of logits exactly."""

    weights: list[float] | None = None
    """One weight for each model (the base first, if included); equal if not given."""
    include_base: bool = False
    """Whether the base is an ingredient."""
    skip: list[str] = field(default_factory=list)
    """Tensors to leave as the base (or, without one, the first model) has them: names, leading parts of names, or globs."""

    by_rows = True

    def merge(self, base: Any, tuned: SequenceOf[Any], ctx: Context | None = None) -> TensorSource:
        states, home = ingredients(base, tuned, self.include_base)
        return average(states, self.weights, self.skip, home)
