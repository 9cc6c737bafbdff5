"""Direct preference optimisation and its family of links."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from luthier.catalog import register
from luthier.core.loss import Loss
from luthier.errors import DataError, RecipeError
from luthier.objective import Preference
from luthier.objective._shared import (
    Averages,
    Link,
    ReferenceCache,
    by_branch,
    lengths,
    preference,
    row_loss,
    row_weights,
)

if TYPE_CHECKING:
    from luthier.core.batch import Batch
    from luthier.core.context import Context
    from luthier.core.families import Family

LINKS = ("sigmoid", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "sppo_hard", "bco_pair", "apo_zero", "apo_down")
PAIR = ("chosen", "rejected")


def dpo(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor | None = None,
    ref_rejected_logp: Tensor | None = None,
    beta: float = 0.1,
    link: Link = "sigmoid",
    label_smoothing: Tensor | float = 0.0,
    weight: Tensor | None = None,
    margin: float = 0.0,
) -> Tensor:
    """One loss a pair from sequence log-probabilities (sums; for the links ipo and with length normalisation: token means).

    sigmoid: -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), h = (l_w - l_w^ref) - (l_l - l_l^ref), e = label_smoothing;
    the other links as in `_shared.preference`."""
    logp = torch.stack([chosen_logp, rejected_logp], -1)
    reference = None if ref_chosen_logp is None or ref_rejected_logp is None else torch.stack([ref_chosen_logp, ref_rejected_logp], -1)
    return preference(logp, reference, 1 - torch.as_tensor(label_smoothing, dtype=logp.dtype, device=logp.device), link, beta, weight, margin)


@register("dpo")
@dataclass
class DPO(Preference):
    """Make the better answer more likely relative to the reference than the worse one, by a logistic loss of the log-ratio gap.

    L = -log sigmoid(beta [(l_w - l_w^ref) - (l_l - l_l^ref)]), l = sum of log p over the answer's tokens (prompt masked). Chosen and
    rejected share the prompt's tokens in one pass; the reference's sums are computed once a row and kept in checkpoints. Links: sigmoid
    (with label_smoothing: cDPO), hinge (SLiC), ipo (token means, as its authors have it), robust, exo_pair (needs label_smoothing),
    nca_pair, sppo_hard, bco_pair, apo_zero, apo_down; formulas equal trl's. `reference_free` drops the reference, and with
    `length_normalise` and `margin` gives SimPO (beta 2, margin 0.5 to 1.6). `sft` adds that much of the chosen answer's mean token loss
    (RPO). Rows may carry `label_smoothing` (their own error rate, for smoothing from a tree search or a judge) and `weight`.
    `reference: round` takes the model that started this round: self-play, where the opponent is the reference. At reference = policy the
    loss is log 2 for every pair. Logged: rewards of both answers, their margin, the share of pairs ranked right, and both log-probabilities,
    which may fall together. Defaults: the paper's beta 0.1."""

    beta: float = 0.1
    """Scale of the log-ratios: how strongly the reference holds."""
    link: Literal["sigmoid", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "sppo_hard", "bco_pair", "apo_zero", "apo_down"] = "sigmoid"
    """The loss as a function of the log-ratio gap."""
    label_smoothing: float = 0.0
    """Share of pairs believed to be in the wrong order; a row's own column `label_smoothing` goes first."""
    length_normalise: bool = False
    """Token means in the place of sums (always so for link ipo)."""
    reference_free: bool = False
    """Compare log-probabilities themselves, without a reference."""
    margin: float = 0.0
    """Subtracted from beta h (link sigmoid)."""
    sft: float = 0.0
    """Weight of the chosen answers' mean token loss."""
    reference: str = "stage"
    """Which frozen model the ratios are to: stage, round, base or one of `models:`."""

    needs = frozenset({"reference"})

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise RecipeError(f"beta is {self.beta}; it must be positive.")
        if self.link not in LINKS:
            raise RecipeError(f"link is '{self.link}'; it must be one of {', '.join(LINKS)}.")
        check_smoothing(self.label_smoothing, self.link)
        if self.sft < 0:
            raise RecipeError(f"sft is {self.sft}; it must not be negative.")
        if self.margin and self.link != "sigmoid":
            raise RecipeError(f"margin is {self.margin}; only the link 'sigmoid' takes one, not '{self.link}'.")
        self.needs = frozenset() if self.reference_free else frozenset({"reference"})  # type: ignore[misc]
        self._cache, self._averages = ReferenceCache(), Averages()

    def loss(self, model: Family, batch: Batch, ctx: Context | None = None) -> Loss:
        pairs = batch.of_branch(*PAIR)
        scores = model.score(pairs)
        sums = scores.rows("sum")
        size = lengths(pairs).to(sums)
        gap = sums if self.reference_free else sums - self._cache.logps(ctx, pairs, self.reference).to(sums)
        ratio = by_branch(pairs, gap / size if self.length_normalise or self.link == "ipo" else gap, PAIR)
        # every link is a function of the log-ratios, so these stand for l with no reference left to subtract
        values = dpo(ratio[:, 0], ratio[:, 1], None, None, self.beta, self.link, self._smoothing(batch).to(sums), None, self.margin)
        loss = row_loss("dpo", values, row_weights(batch))
        if self.sft:
            loss.merge(self._likelihood(scores.logp, scores.sequence, pairs))
        self._report(ctx, self.beta * ratio.detach(), by_branch(pairs, sums.detach(), PAIR))
        return loss

    def _likelihood(self, logp: Tensor, sequence: Tensor, pairs: Batch) -> Loss:
        """The chosen answers' tokens, each as heavy as any other; the count is that of `counts`."""
        chosen = torch.tensor([s.branch == "chosen" for s in pairs.sequences], device=logp.device)[sequence]
        weights = pairs.token_weights().to(logp) * chosen
        return Loss().add("chosen_nll", -logp * weights, per="token", weight=self.sft, count=max(float(weights.sum()), 1e-12))

    def counts(self, batch: Batch) -> dict[str, float]:
        return {"chosen_nll": batch.of_branch("chosen").counts()["token"]} if self.sft else {}

    def _smoothing(self, batch: Batch) -> Tensor:
        values = [float(row.get("label_smoothing", self.label_smoothing)) for row in batch.rows]
        for value, row_id in zip(values, batch.ids.tolist()):
            try:
                check_smoothing(value, self.link)
            except RecipeError as error:
                raise DataError(f"Row {row_id}: {error}") from error
        return torch.tensor(values)

    def _report(self, ctx: Context | None, rewards: Tensor, logps: Tensor) -> None:
        better = (rewards[:, 0] > rewards[:, 1]).float()
        self._averages.log(
            ctx, **{"dpo/chosen_reward": rewards[:, 0], "dpo/rejected_reward": rewards[:, 1], "dpo/margin": rewards[:, 0] - rewards[:, 1],
                    "dpo/accuracy": better, "dpo/chosen_logp": logps[:, 0], "dpo/rejected_logp": logps[:, 1]},
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return {"reference": self._cache.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._cache.load_state_dict(state["reference"])


def check_smoothing(value: float, link: str) -> None:
    """The range of a label-smoothing value under a link."""
    top = 0.5 if link == "robust" else 1.0
    if not 0 <= value <= 1 or (link == "robust" and value >= top):
        raise RecipeError(f"label_smoothing is {value}; with link '{link}' it must be at least 0 and {'below 0.5' if link == 'robust' else 'at most 1'}.")
    if link == "exo_pair" and not 0 < value < 1:
        raise RecipeError(f"label_smoothing is {value}; the link 'exo_pair' needs it strictly between 0 and 1, e.g. 0.001.")
