"""Plain supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from luthier.catalog import register
from luthier.core.scores import log_prob
from luthier.errors import RecipeError
from luthier.objective import Supervised
from luthier.objective._shared import sequence_means, token_loss

if TYPE_CHECKING:
    from luthier.core.batch import Batch
    from luthier.core.context import Context
    from luthier.core.families import Family
    from luthier.core.loss import Loss


def sft(logits: Tensor, target: Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    """Per token: (1 - e) (-log p(y)) + e mean_v(-log p(v)) + z (log sum_v exp logit_v)^2, in fp32."""
    logits = logits.float()
    values = -log_prob(logits, target)
    if label_smoothing:
        values = (1 - label_smoothing) * values - label_smoothing * torch.log_softmax(logits, -1).mean(-1)
    if z_loss:
        values = values + z_loss * logits.logsumexp(-1).square()
    return values


@register("sft")
@dataclass
class SFT(Supervised):
    """Raise the likelihood of the given answers, token by token.

    L = mean over the batch's supervised tokens of -log p(y_t | x, y_<t); every token of the effective batch weighs the same, however
    it is split over micro-batches and devices. Options: label smoothing as in torch's cross-entropy, and the squared log-normaliser
    ("z-loss") that keeps logits from drifting. The other supervised objectives are compared with this one."""

    label_smoothing: float = 0.0
    """Share of the target's mass that is spread evenly over the vocabulary."""
    z_loss: float = 0.0
    """Weight of the squared log-normaliser; 1e-4 is usual where it is used."""
    average: Literal["token", "sequence"] = "token"
    """token: all supervised tokens weigh the same; sequence: all rows weigh the same, whatever their length."""

    default_loss = False

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise RecipeError(f"label_smoothing is {self.label_smoothing}; it must be at least 0 and below 1.")
        if self.z_loss < 0:
            raise RecipeError(f"z_loss is {self.z_loss}; it must not be negative.")
        if self.average not in ("token", "sequence"):
            raise RecipeError(f"average is '{self.average}'; it must be 'token' or 'sequence'.")

    def loss(self, model: Family, batch: Batch, ctx: Context | None = None) -> Loss:
        scores = model.score(batch)
        if self.label_smoothing or self.z_loss:
            values = scores.map(lambda logits, at: sft(logits, scores.target[at], self.label_smoothing, self.z_loss))
        else:
            values = -scores.logp
        return token_loss("sft", values, batch) if self.average == "token" else sequence_means(values, batch, scores, "sft")
