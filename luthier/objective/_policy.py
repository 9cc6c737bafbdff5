"""Policy gradients on the policy's own answers: advantages, ratios, clipping, normalisers and the loss of a scored batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from luthier.core.loss import Loss, Per
from luthier.core.scores import TokenScores, log_prob
from luthier.errors import UserError
from luthier.objective._shared import row_loss, row_weights, token_loss

if TYPE_CHECKING:
    from luthier.core.batch import Batch

Mode = Literal["std", "mean", "rloo", "batch"]
LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo"]


def advantages(rewards: Any, groups: Any, mode: Mode = "std", epsilon: float = 1e-4) -> Tensor:
    """How much better each answer is than its group's average answer.

    std: (r - mean) / (sd + epsilon), sd over the group with n - 1 (GRPO); mean: r - mean (Dr. GRPO); rloo: r minus the mean of the
    *other* answers; batch: (r - mean) / (sd of all rewards + epsilon). `groups` holds a group number for each reward. A group whose
    rewards are all equal gets exactly 0. Rewards that are not numbers take no part and get 0."""
    r = torch.as_tensor(rewards, dtype=torch.float32)
    _, g = torch.unique(torch.as_tensor(groups), return_inverse=True)
    held = ~torch.isnan(r)
    value = torch.where(held, r, torch.zeros_like(r))
    number, total = _group_sum(held.float(), g), _group_sum(value, g)
    centred = torch.where(held, value - (total / number.clamp(min=1))[g], torch.zeros_like(r))
    if mode == "std":
        spread = (_group_sum(centred.square(), g) / (number - 1).clamp(min=1)).sqrt()
        centred = centred / (spread[g] + epsilon)
    elif mode == "rloo":
        centred = centred * (number / (number - 1).clamp(min=1))[g]
    elif mode == "batch":
        known = value[held]
        centred = centred / ((known.std() if len(known) > 1 else known.new_zeros(())) + epsilon)
    elif mode != "mean":
        raise ValueError(f"There is no advantage mode '{mode}'.")
    return torch.where(_uniform(r, g)[g], torch.zeros_like(centred), centred)


def uniform_share(rewards: Any, groups: Any) -> float:
    """The share of groups whose rewards are all equal: they teach nothing."""
    r = torch.as_tensor(rewards, dtype=torch.float32)
    _, g = torch.unique(torch.as_tensor(groups), return_inverse=True)
    return float(_uniform(r, g).float().mean()) if len(r) else 0.0


def _group_sum(values: Tensor, g: Tensor) -> Tensor:
    return torch.zeros(int(g.max()) + 1 if len(g) else 0).index_add(0, g, values)


def _uniform(r: Tensor, g: Tensor) -> Tensor:
    """[groups] no two rewards of the group differ."""
    n = int(g.max()) + 1 if len(g) else 0
    high = torch.full((n,), -torch.inf).scatter_reduce(0, g, r.nan_to_num(-torch.inf), "amax")
    low = torch.full((n,), torch.inf).scatter_reduce(0, g, r.nan_to_num(torch.inf), "amin")
    return high <= low


def gae(rewards: Tensor, values: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Generalised advantages and returns of one answer: d_t = r_t + gamma v_{t+1} - v_t, A_t = d_t + gamma lam A_{t+1}, R = A + v."""
    rewards, values = rewards.detach().float(), values.detach().float()
    after = torch.cat([values[1:], values.new_zeros(1)])
    found, running = torch.zeros_like(rewards), rewards.new_zeros(())
    for t in reversed(range(len(rewards))):
        running = rewards[t] + gamma * after[t] - values[t] + gamma * lam * running
        found[t] = running
    return found, found + values


def policy_gradient(
    logp: Tensor, behaviour: Tensor | None, advantage: Tensor, eps_low: float = 0.2, eps_high: float = 0.2, delta: float | None = None
) -> Tensor:
    """Per token: -min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A), rho = exp(logp - behaviour).

    Without `behaviour` the policy itself is meant: rho = 1, gradient -A grad log p. `delta` also bounds rho from above where A < 0."""
    ratio = torch.exp(logp - (logp if behaviour is None else behaviour).detach())
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high)
    if delta is not None:
        ratio = ratio.clamp(max=delta)
    return -torch.minimum(ratio * advantage, clipped * advantage)


def clipped(logp: Tensor, behaviour: Tensor | None, advantage: Tensor, eps_low: float = 0.2, eps_high: float = 0.2) -> Tensor:
    """bool per token: clipping stopped its gradient."""
    if behaviour is None:
        return torch.zeros_like(logp, dtype=torch.bool)
    ratio = torch.exp(logp - behaviour).detach()
    return ((ratio < 1 - eps_low) & (advantage < 0)) | ((ratio > 1 + eps_high) & (advantage > 0))


def sequence_ratio(logp: Tensor, behaviour: Tensor | None, sequence: Tensor, sequences: int) -> Tensor:
    """Per token: the mean log-ratio of its whole sequence (GSPO), in the place of log p - behaviour."""
    gap = logp - (logp if behaviour is None else behaviour).detach()
    return means(gap, sequence, sequences)[sequence]


def k3(logp: Tensor, reference: Tensor) -> Tensor:
    """Per token: exp(d) - d - 1, d = reference - logp: an estimate of KL(policy || reference) from the policy's samples that is
    never negative."""
    gap = reference.detach() - logp
    return gap.exp() - gap - 1


def means(values: Tensor, sequence: Tensor, sequences: int) -> Tensor:
    """[sequences] mean over each sequence's tokens; 0 where it has none."""
    return sums(values, sequence, sequences) / torch.bincount(sequence, minlength=sequences).clamp(min=1)


def sums(values: Tensor, sequence: Tensor, sequences: int) -> Tensor:
    return torch.zeros(sequences, dtype=values.dtype, device=values.device).index_add(0, sequence, values)


def normalise(values: Tensor, sequence: Tensor, sequences: int, how: LossType, max_length: int) -> tuple[Tensor, Per]:
    """Token losses to what is averaged, and over what: grpo: the mean of each answer, averaged over answers; dr_grpo: the sum of each
    answer / max_length, averaged over answers; bnpo, dapo: averaged over all tokens."""
    if how == "grpo":
        return means(values, sequence, sequences), "row"
    if how == "dr_grpo":
        return sums(values, sequence, sequences) / max_length, "row"
    if how in ("bnpo", "dapo"):
        return values, "token"
    raise ValueError(f"There is no normaliser '{how}'.")


def tempered_logp(scores: TokenScores, temperature: float = 1.0) -> Tensor:
    """log p of each supervised token under softmax(logits / temperature), the distribution that was sampled from."""
    if temperature == 1.0:
        return scores.logp
    return scores.map(lambda logits, at: log_prob(logits / temperature, scores.target[at]))


def policy_loss(
    logp: Tensor, sequence: Tensor, batch: Batch, loss_type: LossType, eps_low: float, eps_high: float, beta: float = 0.0,
    max_length: int = 256, importance: str = "token", delta: float | None = None,
) -> Loss:  # fmt: skip
    """The loss of a batch of scored answers, with the terms `policy`, `kl` (if beta) and the share of clipped tokens."""
    n = len(batch.sequences)
    if any("advantage" not in s.data for s in batch.sequences):
        raise UserError("These answers have no advantages; train through the rollout, or put 'advantage' into every sequence's data.")
    has_old = all("behaviour" in s.data for s in batch.sequences)
    old = batch.gather("behaviour").to(logp) if has_old else None
    advantage = batch.gather("advantage").to(logp)
    if np.ndim(batch.sequences[0].data["advantage"]) == 0:  # one an answer
        advantage = advantage[sequence]
    ratio_logp, ratio_old = logp, old
    if importance == "sequence":
        ratio_logp, ratio_old = sequence_ratio(logp, old, sequence, n), torch.zeros_like(logp)
    values = policy_gradient(ratio_logp, ratio_old, advantage, eps_low, eps_high, delta)
    loss = _averaged("policy", values, sequence, batch, loss_type, max_length)
    if beta:
        drift = k3(logp, batch.gather("reference").to(logp))
        loss.merge(_averaged("kl", drift, sequence, batch, loss_type, max_length), weight=beta)
    stopped = clipped(ratio_logp, ratio_old, advantage, eps_low, eps_high).float()
    return loss.merge(token_loss("clipped", stopped, batch), weight=0.0)


def _averaged(name: str, values: Tensor, sequence: Tensor, batch: Batch, loss_type: LossType, max_length: int) -> Loss:
    spread, per = normalise(values, sequence, len(batch.sequences), loss_type, max_length)
    if per == "token":
        return token_loss(name, spread, batch)
    owner = torch.tensor([s.row for s in batch.sequences], dtype=torch.long)
    return row_loss(name, spread, row_weights(batch)[owner])
