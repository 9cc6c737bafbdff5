"""Sorted fine-tuning (SoFT): every prefix of the layers becomes a model."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from luthier.catalog import register
from luthier.core.exits import exit_depths, states_at
from luthier.core.loss import Loss
from luthier.core.scores import TokenScores, log_prob
from luthier.errors import RecipeError
from luthier.objective import Supervised
from luthier.objective._shared import token_loss

if TYPE_CHECKING:
    from luthier.core.batch import Batch
    from luthier.core.context import Context
    from luthier.core.families import CausalLM, Family


def sorted_exits(logits: SequenceOf[Tensor], target: Tensor) -> Tensor:
    """Per token: (1/K) sum over the K exits of -log p_n(y), from each exit's logits [tokens, vocabulary]. A mean, not a sum: a sum
    would multiply the learning rate by K."""
    return -torch.stack([log_prob(one, target) for one in logits]).mean(0)


@register("sorted-exits", paper=106)
@dataclass
class SortedExits(Supervised):
    """Train nested models at once: the first n layers, the final norm and the one head, for several n; afterwards any of these depths
    answers on its own, and decoding may exit early or draft with the shallow part (`decode: early-exit`). `measure: exit-distance` says
    how far each depth is from the whole.

    L = (1/K) sum_{n in exits} CE(Head(Norm(h_n)), y) on the supervised tokens; h_n is what the n-th block returns. One forward pass, one
    backward pass, no new parameters; the logits of an exit are made in chunks and never held together. Exits: the paper's for 40
    layers are 12, 16, ..., 40; by default the same shares of any depth, 30 % to 100 % in tenths. The whole depth is always one.

    All weights train in the paper (`adapt: full`; LoRA works); AdamW at 2e-5, cosine, batches of 128 and 2 epochs are the Alpaca recipe
    on which it builds (more epochs help: at two the nested models are not done). Each exit's loss is logged as `exit_N`."""

    exits: list[int] = field(default_factory=list)
    """Numbers of blocks after which the model must be able to answer."""

    default_loss = False

    def __post_init__(self) -> None:
        if any(n < 1 for n in self.exits):
            raise RecipeError(f"'exits' is {self.exits}; depths are numbers of blocks, 1 or more.")

    def loss(self, model: Family, batch: Batch, ctx: Context | None = None) -> Loss:
        total = Loss()
        scores = exit_scores(model, batch, exit_depths(model, self.exits))  # type: ignore[arg-type]
        for depth, found in scores.items():
            total.merge(token_loss(f"exit_{depth}", -found.logp, batch), weight=1 / len(scores))
        return total


def exit_scores(model: CausalLM, batch: Batch, depths: SequenceOf[int]) -> dict[int, TokenScores]:
    """Teacher-forced scores of the supervised tokens at each depth, from one forward pass."""
    forest = model.forest(batch.sequences)
    states = states_at(model, forest, depths)
    device = states[depths[-1]].device
    source, target, owner = (t.to(device) for t in (forest.source, forest.target, forest.sequence))
    return {n: TokenScores(h.flatten(0, 1)[source], model.head, target, owner, len(batch.sequences)) for n, h in states.items()}
