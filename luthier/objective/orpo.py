"""ORPO: preference tuning without a reference model, by the odds ratio; a step of the study of paper 89."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.catalog import register
from luthier.core.loss import Loss
from luthier.errors import RecipeError
from luthier.objective import Preference
from luthier.objective._shared import Averages, by_branch, row_loss, row_weights

if TYPE_CHECKING:
    from luthier.core.batch import Batch
    from luthier.core.context import Context
    from luthier.core.families import Family
    from luthier.core.scores import TokenScores

PAIR = ("chosen", "rejected")


def log_odds(logp: Tensor) -> Tensor:
    """log p - log(1 - p) from log p, exact for small and large p; p is kept below 1."""
    logp = logp.float().clamp(max=-1e-6)
    near_one = logp > -math.log(2)
    # each branch is given values at which it is finite, or its gradient would be not a number where it is not taken
    rest = torch.where(near_one, torch.log(-torch.expm1(torch.where(near_one, logp, -1.0))), torch.log1p(-torch.exp(torch.where(near_one, -1.0, logp))))
    return logp - rest


def orpo(chosen_logp: Tensor, rejected_logp: Tensor, beta: float = 0.1) -> Tensor:
    """One loss a pair from mean log-probabilities a token: -l_w - beta log sigmoid(log odds(l_w) - log odds(l_l))."""
    return -chosen_logp - beta * F.logsigmoid(log_odds(chosen_logp) - log_odds(rejected_logp))


@register("orpo", paper=89)
@dataclass
class ORPO(Preference):
    """Learn the better answer and push the worse one away in one loss, without a reference model, by the ratio of their odds.

    With l = mean of log p over the answer's tokens and odds(y) = p / (1 - p), p = exp(l):

        L = NLL - beta log sigmoid(log odds(y_w) - log odds(y_l)), averaged over pairs

    `likelihood: text` (default) is what the study's trainer computes, trl's: NLL is the mean of -log p over all tokens of the prompts and
    chosen answers, every token as heavy as any other. `answer` is the formula of ORPO's paper: NLL = -l_w, of the answer alone.
    It takes the place of SFT followed by DPO, and half their memory. Defaults of the domain-adaptation study: beta 0.1, learning rate
    3e-6, one epoch after a warm-up of 100 steps. Logged: the log odds ratio, the share of pairs ranked right, both mean log-probabilities."""

    beta: float = 0.1
    """Weight of the odds-ratio term (lambda in its paper)."""
    likelihood: Literal["text", "answer"] = "text"
    """What the likelihood term learns: prompt and chosen answer, or the answer alone."""

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise RecipeError(f"beta is {self.beta}; it must be positive. For plain likelihood of the chosen answers use `objective: sft`.")
        if self.likelihood not in ("text", "answer"):
            raise RecipeError(f"likelihood is '{self.likelihood}'; it must be 'text' (prompt and chosen answer) or 'answer'.")
        self._averages = Averages()

    def loss(self, model: Family, batch: Batch, ctx: Context | None = None) -> Loss:
        pairs = batch.of_branch(*PAIR)
        read = whole_texts(pairs) if self.likelihood == "text" else pairs
        scores = model.score(read)
        logp = by_branch(pairs, answer_means(scores, read, pairs), PAIR)
        seen: Any = logp.detach()
        ratio = log_odds(seen[:, 0]) - log_odds(seen[:, 1])
        self._averages.log(ctx, **{"orpo/log_odds_ratio": ratio, "orpo/accuracy": (ratio > 0).float(), "orpo/chosen_logp": seen[:, 0], "orpo/rejected_logp": seen[:, 1]})
        values = orpo(logp[:, 0], logp[:, 1], self.beta)
        if self.likelihood == "answer":
            return row_loss("orpo", values, row_weights(batch))
        chosen = torch.tensor([s.branch == "chosen" for s in read.sequences], device=scores.sequence.device)[scores.sequence]
        weights = read.token_weights().to(scores.logp) * chosen
        loss = Loss().add("chosen_nll", -scores.logp * weights, per="token", count=max(float(weights.sum()), 1e-12))
        return loss.merge(row_loss("odds_ratio", values + logp[:, 0], row_weights(batch)))

    def counts(self, batch: Batch) -> dict[str, float]:
        return {"chosen_nll": whole_texts(batch.of_branch("chosen")).counts()["token"]} if self.likelihood == "text" else {}


def whole_texts(pairs: Batch) -> Batch:
    """The same sequences, of the chosen ones every token supervised."""
    return replace(pairs, sequences=[replace(s, mask=np.ones_like(s.mask)) if s.branch == "chosen" else s for s in pairs.sequences])


def answer_means(scores: TokenScores, read: Batch, pairs: Batch) -> Tensor:
    """[sequences] mean log p over the tokens that `pairs` supervises, from scores of `read`, where more are."""
    kept = [torch.from_numpy(answer.mask[whole.supervised]) for whole, answer in zip(read.sequences, pairs.sequences, strict=True)]
    own = torch.cat(kept).to(scores.logp)
    return scores.rows("sum", scores.logp * own) / scores.rows("sum", own).clamp(min=1)
