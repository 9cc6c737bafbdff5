"""DELLA: drop entries of each update at random, small ones more often than large ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from luthier.catalog import register
from luthier.errors import RecipeError
from luthier.merge._sparsified import Rescale, Sizes, Sparsified, thinned


def keep_probabilities(x: Tensor, density: float, epsilon: float) -> Tensor:
    """density - epsilon for the smallest magnitude of a row to density + epsilon for its largest, linear in the rank.

    A row runs along the second dimension; a vector is one row; a row of a single entry has the probability `density`. Equal
    magnitudes are ranked by index."""
    rows = x.reshape(1, -1) if x.ndim < 2 else x
    order = rows.abs().argsort(dim=1, stable=True)
    n = rows.shape[1]
    steps = torch.arange(n, dtype=torch.float32, device=x.device) / (n - 1) if n > 1 else torch.full((n,), 0.5, device=x.device)
    shape = [1, n] + [1] * (rows.ndim - 2)
    ranks = torch.empty(rows.shape, device=x.device).scatter_(1, order, steps.reshape(shape).expand(rows.shape))
    return (density - epsilon + ranks * 2 * epsilon).reshape(x.shape)


def della(x: Tensor, density: float, epsilon: float, draw: Tensor, rescale: Rescale = "l1", sizes: Sizes | None = None) -> Tensor:
    """An update of which each entry is kept with a probability that grows with the rank of its magnitude in its row, rescaled."""
    if density >= 1 or x.numel() == 0:
        return x
    return torch.zeros_like(x) if density <= 0 else thinned(x, keep_probabilities(x, density, epsilon), draw, rescale, sizes)


@register("della-linear")
@dataclass
class DellaLinear(Sparsified):
    """Drop entries of every fine-tune's update at random, the small ones more often, rescale the rest and add the updates to the base.

    Within every row of a tensor (a vector is one row) magnitudes are ranked; the entry of rank k of n (0: the smallest) is kept with
    probability density - epsilon + 2 epsilon k / (n - 1). theta = theta_0 + scale * sum_i w_i d_i (divided by sum_i w_i if `normalise`).
    epsilon 0 is dare-linear. `rescale`: `l1` (default, as mergekit 0.1) keeps each tensor's sum of absolute values; `density` divides
    every kept entry by its own probability, as DELLA does. epsilon 0.15 is mergekit's; its density is 1 (nothing is dropped), and its
    examples keep about half, as here. The choice depends on the seed, the model's place in the list and the tensor's name."""

    epsilon: float = 0.15
    """How far the probability to be kept reaches below and above `density`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epsilon < 0 or (0 < self.density < 1 and not 0 < self.density - self.epsilon <= self.density + self.epsilon < 1):
            raise RecipeError(
                f"`epsilon` of {self.name} is {self.epsilon} at density {self.density}; density - epsilon and density + epsilon must lie between 0 and 1, "
                "so lower `epsilon`."
            )

    def thin(self, x: Tensor, draw: Tensor, sizes: Sizes) -> Tensor:
        return della(x, self.density, self.epsilon, draw, self.rescale, sizes)


@register("della")
@dataclass
class Della(DellaLinear):
    """Drop entries of every update at random, the small ones more often, elect a sign for every entry and average those that have it.

    d_i as in della-linear; for every entry s = sign(sum_i w_i d_i), + where the sum is 0; theta = theta_0 + scale * sum of the w_i d_i
    whose sign is s / sum of their w_i. `normalise` (the division) is on by default, as in mergekit, so that it resembles ties; the
    paper adds scale afterwards to make up for the mean."""

    normalise: bool = True
    """Divide by the weights that took part: a mean instead of a sum."""

    agree = True
