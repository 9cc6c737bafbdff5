"""Anchored supervised fine-tuning, with dynamic fine-tuning (DFT) and SFT + KL as its special cases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from luthier.catalog import register
from luthier.core.scores import kl as divergence
from luthier.core.scores import log_prob
from luthier.errors import RecipeError
from luthier.objective import Supervised
from luthier.objective._shared import Averages, reference_scores, token_loss

if TYPE_CHECKING:
    from luthier.core.batch import Batch
    from luthier.core.context import Context
    from luthier.core.families import Family
    from luthier.core.loss import Loss


def asft(
    logits: Tensor,
    target: Tensor,
    reference_logits: Tensor | None = None,
    kl: float = 0.1,
    weighting: Literal["dft", "none"] = "dft",
    direction: Literal["forward", "reverse"] = "forward",
) -> Tensor:
    """Per token: -sg(p_t) log p_t + kl * KL(p_0 || p); without `weighting` -log p_t + kl * KL.

    `direction` "reverse" takes KL(p || p_0). No reference logits are needed where kl is 0. fp32 throughout; the reference gets no
    gradient."""
    likelihood, drift = _terms(logits, target, reference_logits if kl else None, weighting, direction)
    return likelihood if drift is None else likelihood + kl * drift


def _terms(logits: Tensor, target: Tensor, reference_logits: Tensor | None, weighting: str, direction: str) -> tuple[Tensor, Tensor | None]:
    logp = log_prob(logits, target)
    likelihood = -logp if weighting == "none" else -logp.detach().exp() * logp
    if reference_logits is None:
        return likelihood, None
    anchor = reference_logits.detach()
    return likelihood, divergence(anchor, logits) if direction == "forward" else divergence(logits, anchor)


@register("asft", paper=117)
@dataclass
class ASFT(Supervised):
    """Weigh every token's loss by the model's own probability of it, and hold the model near its start with a small KL term.

    l_t = -sg(p_t) log p_t + kl * sum_v p_0(v) [log p_0(v) - log p(v)], averaged over the batch's supervised tokens; p_0 is the model
    before this stage. The weight p_t (stop-gradient) makes supervised fine-tuning a tighter bound of a reward-weighted objective and
    damps tokens that the model finds impossible, noise included; the anchor stops the drift this causes. `kl: 0` is dynamic
    fine-tuning (DFT) and needs no reference; `weighting: none` is SFT + KL. The release uses the forward direction KL(p_0 || p) on the
    full vocabulary; the reverse one is our option. As in the release the KL is a mean over the same tokens as the likelihood, so that
    `kl` does not depend on the length of answers. Defaults: the release's (kl 0.1; its example uses 0.05, lr 2e-5, 3 epochs).
    Known weakness, published: facts that are improbable at the start are learned slowly, with or without the anchor."""

    kl: float = 0.1
    """Weight of the KL to the reference; 0 is DFT."""
    weighting: Literal["dft", "none"] = "dft"
    """dft: weigh by the token's probability; none: plain likelihood (SFT + KL)."""
    direction: Literal["forward", "reverse"] = "forward"
    """forward: KL(reference || model); reverse: KL(model || reference)."""
    reference: str = "stage"
    """Which frozen model is the anchor."""

    default_loss = False
    needs = frozenset({"reference"})

    def __post_init__(self) -> None:
        if self.kl < 0:
            raise RecipeError(f"kl is {self.kl}; it must not be negative.")
        if self.weighting not in ("dft", "none"):
            raise RecipeError(f"weighting is '{self.weighting}'; it must be 'dft' or 'none'.")
        if self.direction not in ("forward", "reverse"):
            raise RecipeError(f"direction is '{self.direction}'; it must be 'forward' or 'reverse'.")
        self.needs = frozenset({"reference"}) if self.kl else frozenset()  # type: ignore[misc]
        self._averages = Averages()

    def loss(self, model: Family, batch: Batch, ctx: Context | None = None) -> Loss:
        others = [reference_scores(ctx, batch, self.reference)] if self.kl else []
        scores = model.score(batch)

        def terms(logits: Tensor, at: slice, *anchor: Tensor) -> tuple[Tensor, ...]:
            both = _terms(logits, scores.target[at], anchor[0] if anchor else None, self.weighting, self.direction)
            return tuple(t for t in both if t is not None)

        if not len(scores):
            return token_loss("asft", scores.logp, batch)
        likelihood, *drift = scores.map(terms, *others)
        self._averages.log(ctx, drift=drift[0]) if drift else None
        return token_loss("asft", likelihood + self.kl * drift[0] if drift else likelihood, batch)
