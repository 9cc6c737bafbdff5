"""DARE: drop most of what a fine-tune changed at random and rescale the rest, before updates are added up."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from luthier.catalog import register
from luthier.merge._sparsified import Rescale, Sizes, Sparsified, thinned


def dare(x: Tensor, density: float, draw: Tensor, rescale: Rescale = "l1", sizes: Sizes | None = None) -> Tensor:
    """An update with each entry kept with probability `density` (where its number in `draw`, uniform on [0, 1), is below it), rescaled."""
    return x if density >= 1 else thinned(x, float(density), draw, rescale, sizes)


@register("dare-linear")
@dataclass
class DareLinear(Sparsified):
    """Drop most entries of every fine-tune's update at random, enlarge the others to make up for it, and add the updates to the base.

    m_i ~ Bernoulli(density); d_i = r m_i (theta_i - theta_0); theta = theta_0 + scale * sum_i w_i d_i (divided by sum_i w_i if
    `normalise`). Updates of fine-tuning are redundant, so that few entries carry them, and sparse ones interfere less. `rescale`:
    DARE's own r = 1 / density makes each entry right in expectation; `l1` (default, as mergekit 0.1) takes r = ||d||_1 / ||m d||_1 for
    each tensor, nearly the same for large tensors and without its noise for small ones. The paper drops up to 90 % and more, rising
    with the model's size; mergekit's default keeps all (density 1) and its examples about half, which is the default here. Which
    entries are dropped depends on the seed, the place of the model in the list and the tensor's name, not on the order of reading."""

    def thin(self, x: Tensor, draw: Tensor, sizes: Sizes) -> Tensor:
        return dare(x, self.density, draw, self.rescale, sizes)


@register("dare-ties")
@dataclass
class DareTies(DareLinear):
    """Drop entries of every update at random as dare-linear does, and add up only those that agree with the elected sign.

    d_i as in dare-linear; for every entry s = sign(sum_i w_i d_i), + where the sum is 0; theta = theta_0 + scale * the sum of the
    w_i d_i whose sign is s, divided by the weights of those if `normalise` (not by default, as mergekit). Dropped entries neither vote
    nor count. Unlike in ties, entries are chosen by chance instead of by size."""

    agree = True
