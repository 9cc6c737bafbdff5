"""Cross-entropy on class labels: plain fine-tuning of encoders and image classifiers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from luthier.catalog import register
from luthier.core.loss import Loss
from luthier.errors import RecipeError
from luthier.objective import Classification

if TYPE_CHECKING:
    from luthier.core.batch import Batch
    from luthier.core.context import Context
    from luthier.core.families import Family


def classify(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, focus: float = 0.0) -> Tensor:
    """One value a row: cross-entropy, with (1 - p)^focus as its (differentiated) weight where `focus` > 0, the focal loss."""
    values = F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=label_smoothing)
    if focus:
        p = logits.float().log_softmax(-1).gather(-1, labels[:, None])[:, 0].exp()
        values = values * (1 - p) ** focus
    return values


@register("classify")
@dataclass
class Classify(Classification):
    """Raise the probability of each row's label: cross-entropy, optionally smoothed or focal.

    L = mean over rows of -log p(label). `label_smoothing` e mixes the target with the uniform distribution; `focus` g multiplies each row
    by (1 - p)^g."""

    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes."""
    focus: float = 0.0
    """Exponent of the focal weight; 0 is plain cross-entropy."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1 or self.focus < 0:
            raise RecipeError(f"classify needs 0 <= label_smoothing < 1 and focus >= 0, not {self.label_smoothing} and {self.focus}.")

    def loss(self, model: Family, batch: Batch, ctx: Context | None = None) -> Loss:
        logits = model.classify(batch)
        values = classify(logits, batch.tensors["labels"].to(logits.device), self.label_smoothing, self.focus)
        return Loss().add("cross_entropy", values * batch.row_weights.to(values), per="row")
