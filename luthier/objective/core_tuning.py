"""Unleashing the Power of Contrastive Self-Supervised Visual Models via Contrast-Regularized Fine-Tuning (paper 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.catalog import register
from luthier.core.context import seed_of
from luthier.core.loss import Loss
from luthier.core.plugin import Group, Parts
from luthier.errors import RecipeError
from luthier.objective import Classification

if TYPE_CHECKING:
    from luthier.core.batch import Batch
    from luthier.core.context import Context
    from luthier.core.families import Family


def focal_supcon(z: Tensor, positive: Tensor, temperature: float = 0.07, focal: bool = True, norm: Literal["positives", "rows"] = "positives") -> Tensor:
    """Supervised contrastive loss of normalised `z` with focal weights 1 - p_ij: a scalar, the mean over rows that have a positive.

    log p_ij = l_ij - log sum_{k != i} exp(l_ik), l = z z^T / temperature. `norm` "positives" divides a row's sum by its number of
    positives (the paper), "rows" by the number of rows (the release). Without a positive anywhere the loss is 0."""
    n = len(z)
    self_pair = torch.eye(n, dtype=torch.bool, device=z.device)
    positive = positive & ~self_pair
    logits = (z.float() @ z.float().T / temperature).masked_fill(self_pair, -torch.inf)
    logp = logits - logits.logsumexp(-1, keepdim=True)
    logp = logp.masked_fill(self_pair, 0.0)
    terms = torch.where(positive, -((1 - logp.exp()) if focal else 1.0) * logp, torch.zeros_like(logp))
    count = positive.sum(-1)
    some = count > 0
    if not some.any():
        return logits.new_zeros(()) * z.sum()
    per_row = terms.sum(-1) / (count.clamp(min=1) if norm == "positives" else n)
    return per_row[some].mean()


def mine(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(hardest positive, hardest negative) of each row: the same-class row of lowest cosine, the other-class row of highest; a row
    without such a partner is its own. Masked with +-inf: with zeros, non-negative features would pick the masked entries."""
    cosine = F.normalize(features.float(), dim=-1) @ F.normalize(features.float(), dim=-1).T
    n = len(labels)
    index = torch.arange(n, device=features.device)
    alike = (labels[:, None] == labels[None]) & (index[:, None] != index[None])
    other = labels[:, None] != labels[None]
    p = torch.where(alike.any(1), cosine.masked_fill(~alike, torch.inf).argmin(1), index)
    q = torch.where(other.any(1), cosine.masked_fill(~other, -torch.inf).argmax(1), index)
    return p, q


def core_tuning(features: Tensor, labels: Tensor, classes: int, a: Tensor, b: Tensor, partner: Tensor, floor: float = 0.8) -> tuple[Tensor, Tensor]:
    """The mixed batch [h; h-; h+] with its soft labels [3B, classes].

    Hard negatives h- = (1 - a) h + a h[partner] with a = max(a, floor); hard positives h+ = b h[p] + (1 - b) h[q] with the mined
    partners p (same class, lowest cosine) and q (other class, highest cosine). Labels are mixed alike."""
    y = F.one_hot(labels, classes).to(features.dtype)
    a, b = a.clamp(min=floor)[:, None].to(features), b[:, None].to(features)
    p, q = mine(features.detach(), labels)
    negative, negative_y = (1 - a) * features + a * features[partner], (1 - a) * y + a * y[partner]
    positive, positive_y = b * features[p] + (1 - b) * features[q], b * y[p] + (1 - b) * y[q]
    return torch.cat([features, negative, positive]), torch.cat([y, negative_y, positive_y])


@register("core-tuning", paper=3)
@dataclass
class CoreTuning(Classification):
    """Cross-entropy plus a focal contrastive loss on hard pairs that are mixed in feature space; the mixed features also smooth the classifier.

    On pooled features h of a batch: hard negatives and positives are made (`core_tuning`), classified with soft labels, and contrasted after a
    head G = Linear-ReLU-Linear, normalised: L = L_cls + eta L_con. Two rows are positives of each other when their soft labels are the same.
    eta 0.1 and tau 0.07 are the released recipe's. `norm` and `detach_original` are where release and paper differ: the paper's text is the default.
    The head G and the mixing are dropped after training."""

    eta: float = 0.1
    """Weight of the contrastive loss."""
    temperature: float = 0.07
    """tau."""
    alpha: float = 1.0
    """Both coefficients of the Beta distribution that mixing shares are drawn from."""
    floor: float = 0.8
    """Least share of the partner in a hard negative."""
    projection: int = 256
    """Width of the contrastive head's output."""
    focal: bool = True
    """Weigh each pair by 1 - p."""
    mixing: bool = True
    """Make hard pairs; without it only the originals count."""
    norm: Literal["positives", "rows"] = "positives"
    """What a row's contrastive sum is divided by: its positives (paper) or all rows (release)."""
    detach_original: bool = False
    """Let the original features train the heads only, as the release does."""

    whole_batch = True

    def __post_init__(self) -> None:
        if self.eta < 0 or self.temperature <= 0 or self.alpha <= 0 or not 0 <= self.floor <= 1:
            raise RecipeError(
                f"core-tuning needs eta >= 0, temperature > 0, alpha > 0 and 0 <= floor <= 1; got {self.eta}, {self.temperature}, {self.alpha}, {self.floor}."
            )

    def attach(self, model: Family, ctx: Context | None = None) -> Parts:
        width = self._width(model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(0 if ctx is None else ctx.seed, "core-tuning"))
            head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, self.projection))
        head.to(model.device)
        model.modules["contrast"] = head
        return Parts([Group("head", {f"contrast.{n}": p for n, p in head.named_parameters()})], {"contrast": head})

    def _width(self, model: Any) -> int:
        head = model.classifier
        return int(next(m for m in head.modules() if isinstance(m, nn.Linear)).in_features)

    def loss(self, model: Any, batch: Batch, ctx: Context | None = None) -> Loss:
        if "contrast" not in model.modules:
            self.attach(model, ctx)
        h = model.features(batch)
        labels = batch.tensors["labels"].to(h.device)
        classes = model.classifier_of(h[:1]).shape[-1]
        mixed, soft = self._mixed(h, labels, classes, ctx)
        logp = model.classifier_of(mixed).float().log_softmax(-1)
        weights = batch.row_weights.to(h).repeat(len(mixed) // len(h))
        cls = -(soft * logp).sum(-1) * weights
        z = F.normalize(model.modules["contrast"](mixed).float(), dim=-1)
        positive = (soft[:, None] - soft[None]).abs().amax(-1) < 1e-6
        con = focal_supcon(z, positive, self.temperature, self.focal, self.norm)
        copies = len(mixed) // len(h)
        return Loss().add("cross_entropy", cls / copies, per="row").add("contrast", con, per="batch", weight=self.eta)

    def _mixed(self, h: Tensor, labels: Tensor, classes: int, ctx: Context | None) -> tuple[Tensor, Tensor]:
        source = torch.cat([h.detach() if self.detach_original else h]) if self.detach_original else h
        if not self.mixing:
            return source, F.one_hot(labels, classes).to(h.dtype)
        generator = None if ctx is None else ctx.numpy("core-tuning")
        import numpy as np

        rng = generator if generator is not None else np.random.default_rng(0)
        n = len(h)
        a, b = (torch.from_numpy(rng.beta(self.alpha, self.alpha, n)).float() for _ in range(2))
        partner = torch.from_numpy(rng.permutation(n))
        mixed, soft = core_tuning(h, labels, classes, a, b, partner.to(h.device), self.floor)
        return torch.cat([source, mixed[n:]]), soft
