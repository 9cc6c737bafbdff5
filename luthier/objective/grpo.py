"""Group-relative policy optimisation, with its descendants' advantages, normalisers and clipping."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from luthier.catalog import register
from luthier.core.families import Decode
from luthier.core.loss import Loss
from luthier.errors import RecipeError
from luthier.objective import Policy, _policy, _rollout

if TYPE_CHECKING:
    from luthier.core.batch import Batch
    from luthier.core.context import Context
    from luthier.core.families import Family

ADVANTAGES = {"grpo": "std", "dr-grpo": "mean", "rloo": "rloo", "batch": "batch"}


def grpo(
    logp: Tensor,
    behaviour: Tensor | None,
    advantage: Tensor,
    sequence: Tensor,
    sequences: int,
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "dapo",
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    beta: float = 0.0,
    reference: Tensor | None = None,
    max_length: int = 256,
    importance: Literal["token", "sequence"] = "token",
    delta: float | None = None,
) -> Tensor:
    """The loss of a flat batch: all tensors but `sequence` (which answer a token belongs to) have one value a token.

    -min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A) + beta * k3, averaged as `loss_type` says."""
    if importance == "sequence":
        logp_ratio, old = _policy.sequence_ratio(logp, behaviour, sequence, sequences), torch.zeros_like(logp)
    else:
        logp_ratio, old = logp, behaviour  # type: ignore[assignment]
    values = _policy.policy_gradient(logp_ratio, old, advantage, eps_low, eps_high, delta)
    if beta:
        values = values + beta * _policy.k3(logp, reference)  # type: ignore[arg-type]
    spread, _ = _policy.normalise(values, sequence, sequences, loss_type, max_length)
    return spread.sum() / max(1, len(spread))


@register("grpo")
@dataclass
class GRPO(Policy):
    """Draw a group of answers to every prompt, score them, and raise those that are better than their group's average.

    Advantages: grpo (r - mean) / (sd + 1e-4), dr-grpo r - mean, rloo r minus the mean of the others, batch divides by the sd of all
    rewards of the batch. Loss: -min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A) a token, rho = p / p_behaviour, plus beta times
    the k3 estimate of KL(p || reference). Averages (`loss_type`): grpo: mean of each answer's token mean; dr_grpo: each answer's sum /
    max_new_tokens; dapo and bnpo: mean over all tokens of the whole effective batch (in trl bnpo means one micro-batch, which has no
    place here: any split gives the same gradient). `importance: sequence` is GSPO (one ratio an answer; with loss_type grpo).
    Rewards come from the recipe's helper `reward(answers, rows)` or else from `verifier`. Groups whose rewards are all equal have
    advantage 0 and their share is logged. `train.reuse` takes several steps on one draw; clipping bounds them. Temperature other than
    1 enters all log-probabilities. Prompts only: a column `completion` is read by the verifier, never trained on. Defaults are trl's."""

    group_size: int = 8
    """Answers to each prompt."""
    verifier: str = "exact"
    """What scores an answer: exact, normalised, number, label, contains, json, regex:PATTERN, lab, lab:TASK; `:strict` for the whole answer."""
    reward_weights: dict[str, float] = field(default_factory=dict)
    """Weights of the named parts of the helper's reward; 1 where nothing is said."""
    advantage: Literal["grpo", "dr-grpo", "rloo", "batch"] = "grpo"
    """How an answer is compared with its group."""
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "dapo"
    """How token losses are averaged."""
    importance: Literal["token", "sequence"] = "token"
    """Probability ratios token by token, or one an answer."""
    eps_low: float = 0.2
    """The ratio is clipped below at 1 minus this."""
    eps_high: float | None = None
    """The ratio is clipped above at 1 plus this; None: as eps_low. DAPO's clip-higher is 0.28."""
    delta: float | None = None
    """An upper bound of the ratio also for bad answers; above 1 + eps_high, or None."""
    beta: float = 0.0
    """Weight of the KL to the reference; 0 needs none."""
    reference: str = "stage"
    """Which frozen model the KL is to."""
    temperature: float = 1.0
    """Temperature of the draws."""
    max_new_tokens: int = 256
    """Longest answer; also dr_grpo's constant."""
    mask_cut: bool = False
    """Leave answers that were cut at the limit out of the loss."""

    columns = (frozenset({"prompt", "completion"}), frozenset({"messages"}), frozenset({"prompt"}))  # type: ignore[assignment]
    needs = frozenset({"generation", "reference"})
    toy = {"max_new_tokens": 4, "group_size": 2}

    def __post_init__(self) -> None:
        _rollout.check_sampling(self.group_size, self.temperature, self.max_new_tokens, self.verifier)
        if self.advantage not in ADVANTAGES:
            raise RecipeError(f"advantage is '{self.advantage}'; it must be one of {', '.join(ADVANTAGES)}.")
        if self.loss_type not in ("grpo", "bnpo", "dr_grpo", "dapo"):
            raise RecipeError(f"loss_type is '{self.loss_type}'; it must be grpo, bnpo, dr_grpo or dapo.")
        if self.importance not in ("token", "sequence"):
            raise RecipeError(f"importance is '{self.importance}'; it must be 'token' or 'sequence'.")
        if self.importance == "sequence" and self.loss_type != "grpo":
            raise RecipeError(f"importance 'sequence' weighs whole answers; use it with loss_type 'grpo', not '{self.loss_type}'.")
        high = self.high
        if not 0 <= self.eps_low < 1 or high < 0:
            raise RecipeError(f"eps_low is {self.eps_low} and eps_high {high}; they must be 0 or more, and eps_low below 1.")
        if self.delta is not None and self.delta <= 1 + high:
            raise RecipeError(f"delta is {self.delta}; it must be above 1 + eps_high = {1 + high}.")
        if self.beta < 0:
            raise RecipeError(f"beta is {self.beta}; it must not be negative.")
        self.needs = frozenset({"generation", "reference"}) if self.beta else frozenset({"generation"})  # type: ignore[misc]

    @property
    def high(self) -> float:
        return self.eps_low if self.eps_high is None else self.eps_high

    def collate(self, rows: SequenceOf[Mapping[str, Any]], ids: Any, ctx: Context) -> Batch:
        return _rollout.prompt_batch(rows, ids, ctx)

    def rollout(self, batch: Batch, ctx: Context) -> Batch:
        """The answers of the policy, one row each, with rewards, advantages and behaviour log-probabilities."""
        decode = Decode(max_new_tokens=self.max_new_tokens, temperature=self.temperature)
        drawn = _rollout.draw(batch, ctx, self.group_size, decode)
        parts = _rollout.score_rewards(drawn, batch.rows, ctx, self.verifier, self.reward_weights)
        rewards, groups = [r.data["reward"] for r in drawn], [r.row for r in drawn]
        for r, a in zip(drawn, _policy.advantages(rewards, groups, ADVANTAGES[self.advantage]).tolist()):  # type: ignore[arg-type]
            r.data["advantage"] = a
            if self.mask_cut and not r.finished:
                r.kept = np.zeros(len(r.answer), bool)
        _rollout.score_behaviour(drawn, _rollout.family_of(ctx), self.temperature)
        if self.beta:
            _rollout.score_reference(drawn, ctx, self.reference, self.temperature)
        made = _rollout.assemble(drawn, batch)
        return replace(made, extra={**made.extra, "rollout": _rollout.report(drawn, parts)})

    def prepare(self, batch: Batch, ctx: Context) -> Batch:
        """Logs the draw: at this point the step's record is open."""
        ctx.log(**batch.extra.get("rollout", {}))
        return batch

    def together(self, batch: Batch) -> list[list[int]]:
        return _rollout.together(batch)

    def loss(self, model: Family, batch: Batch, ctx: Context | None = None) -> Loss:
        scores = model.score(batch)
        return _policy.policy_loss(
            _policy.tempered_logp(scores, self.temperature), scores.sequence, batch, self.loss_type, self.eps_low, self.high, self.beta,
            self.max_new_tokens, self.importance, self.delta,
        )  # fmt: skip
