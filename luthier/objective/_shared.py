"""What objectives share: weighted token losses, reference scores and their cache, the one preference formula, soft targets, anchors."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.core.loss import Loss
from luthier.core.store import RowTable
from luthier.errors import DataError, RecipeError, UserError

if TYPE_CHECKING:
    from luthier.core.batch import Batch, Sequence
    from luthier.core.context import Context
    from luthier.core.families import Family
    from luthier.core.scores import TokenScores

# token losses ---------------------------------------------------------------------------------------------------------


def token_loss(name: str, values: Tensor, batch: Batch) -> Loss:
    """One loss value for every supervised token, times its row and token weight; the engine divides by the sum of the weights.

    Outside the engine the divisor is stated here, so that `Loss.mean()` is the same weighted mean."""
    weights = batch.token_weights().to(values)
    loss = Loss().add(name, values * weights, per="token")
    loss.terms[name].size = float(weights.sum())
    return loss


def row_loss(name: str, values: Tensor, weights: Tensor, weight: float = 1.0) -> Loss:
    """One loss value a row (or sequence), times its weight; a mean over the weights, inside the engine and outside."""
    loss = Loss().add(name, values * weights.to(values), per="row", weight=weight)
    loss.terms[name].size = float(weights.sum())
    return loss


def sequence_means(values: Tensor, batch: Batch, scores: TokenScores, name: str = "loss") -> Loss:
    """The mean over every sequence's tokens first, then over the rows. A sequence without supervised tokens counts 0."""
    owner = torch.tensor([s.row for s in batch.sequences], dtype=torch.long, device=values.device)
    rows = torch.zeros(len(batch), dtype=values.dtype, device=values.device)
    return row_loss(name, rows.index_add(0, owner, scores.rows("mean", values)), row_weights(batch))


def row_weights(batch: Batch) -> Tensor:
    """The batch's row weights; outside the engine also the rows' own column `weight`."""
    if batch.weights is None and any("weight" in r for r in batch.rows):
        return torch.tensor([float(r.get("weight", 1.0)) for r in batch.rows])
    return batch.row_weights


def device_rng(ctx: Context | None, stream: str, device: torch.device) -> torch.Generator | None:
    """A generator on `device` that continues the context's named stream; None without a context: torch's own."""
    if ctx is None:
        return None
    source = ctx.rng(stream)
    if device.type == "cpu":
        return source
    return torch.Generator(device).manual_seed(int(torch.randint(2**62, (1,), generator=source)))


# references -----------------------------------------------------------------------------------------------------------


def reference_scores(ctx: Context | None, batch: Batch | SequenceOf[Sequence], name: str = "stage") -> TokenScores:
    """The reference model's scores of the same tokens, without gradient.

    Logits are made on demand, so if the reference is the network itself with its adapters off and an adapter sits on the output
    head, the head is kept as it is now."""
    if ctx is None:
        raise UserError("This loss compares with a reference model; pass a context, e.g. Context(model, models={'stage': reference}).")
    # asked before the adapters are off: peft stops their gradients meanwhile
    head = getattr(ctx.current, "head", None)
    trains = head is not None and any(p.requires_grad for p in head.projection.parameters())
    with ctx.reference(name) as reference:
        scores = reference.score(batch)
        if reference is ctx.current and trains:
            scores.head = copy.copy(scores.head)
            scores.head.projection = copy.deepcopy(scores.head.projection)
    return scores


class ReferenceCache:
    """Sequence log-probabilities of a fixed reference, computed once for each distinct sequence of a stage.

    It belongs to one objective of one stage, whose checkpoints carry it. The key covers row id, branch, ids and labels, so that
    rows which change, or whose ids come from another stream, never meet a stale entry."""

    def __init__(self) -> None:
        self.table = RowTable(())
        self._owner: Any = None

    def logps(self, ctx: Context | None, batch: Batch, name: str = "stage") -> Tensor:
        """[sequences] sum of log p over each sequence's supervised tokens."""
        if ctx is None or batch.touched:
            return reference_scores(ctx, batch, name).rows("sum")
        if self._owner is not ctx:
            if self._owner is not None:
                self.table = RowTable(())
            self._owner = ctx
        keys = [sequence_key(s, int(batch.ids[s.row]), name) for s in batch.sequences]
        missing = [i for i, k in enumerate(keys) if k not in self.table.values]
        if missing:
            fresh = reference_scores(ctx, [batch.sequences[i] for i in missing], name).rows("sum")
            self.table.write([keys[i] for i in missing], fresh, ctx.clock.step)
        return self.table.read(keys)[0].to(ctx.current.device if ctx.current is not None else "cpu")

    def state_dict(self) -> dict[str, Any]:
        return self.table.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.table = RowTable.from_state(state)


def reference_logps(ctx: Context | None, batch: Batch, name: str = "stage", cache: ReferenceCache | None = None) -> Tensor:
    """[sequences] log-probabilities under the reference, from the cache where the batch is as the data set has it."""
    return (cache or ReferenceCache()).logps(ctx, batch, name)


def sequence_key(s: Sequence, row_id: int, name: str = "") -> int:
    """A 63-bit fingerprint of what a sequence's score depends on."""
    digest = hashlib.blake2b(f"{name}/{row_id}/{s.branch}/".encode(), digest_size=8)
    for array in (s.ids, s.mask, s.labels):
        digest.update(np.ascontiguousarray(array).tobytes())
        digest.update(b"/")
    return int.from_bytes(digest.digest(), "big") >> 1


# preferences ----------------------------------------------------------------------------------------------------------

Link = Literal["sigmoid", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "sppo_hard", "bco_pair", "apo_zero", "apo_down", "listwise"]


def preference(
    logp: Tensor,
    ref_logp: Tensor | None = None,
    target: Tensor | float | None = None,
    link: Link = "sigmoid",
    beta: float | Tensor = 0.1,
    weight: Tensor | None = None,
    margin: float = 0.0,
) -> Tensor:
    """One loss a row from `logp` [rows, P], the (summed or averaged) log-probabilities of P answers, best first.

    With u = logp - ref_logp (no reference: u = logp), h = u_0 - u_1, s = log sigmoid and q = `target`, the probability that the first
    answer is the better one (a number, one a row, or [rows, P]; default 1):

        sigmoid    -q s(beta h - margin) - (1 - q) s(-(beta h - margin))              DPO, cDPO; SimPO with averages and a margin
        robust     [-q s(beta h) + (1 - q) s(-beta h)] / (2 q - 1)                    unbiased under label flips of rate 1 - q
        hinge      q max(0, 1 - beta h) + (1 - q) max(0, 1 + beta h)                  SLiC
        ipo        q (h - 1/(2 beta))^2 + (1 - q) (h + 1/(2 beta))^2                  h of token averages, as IPO's authors have it
        exo_pair   KL( (sigmoid(beta h), sigmoid(-beta h)) || (q, 1 - q) )            q < 1
        nca_pair   -s(r_0) - s(-r_0)/2 - s(-r_1)/2,  r = beta u;     bco_pair  -s(r_0) - s(-r_1)
        sppo_hard  (u_0 - 1/(2 beta))^2 + (u_1 + 1/(2 beta))^2
        apo_zero   1 - sigmoid(r_0) + sigmoid(r_1);                  apo_down  sigmoid(r_0) + 1 - sigmoid(beta h)
        listwise   KL( q || softmax(beta u) ) for any P; 0 log 0 = 0

    `weight` multiplies each row's loss. beta multiplies log-ratios in nats, summed or averaged as `logp` is."""
    u = logp if ref_logp is None else logp - ref_logp
    if link == "listwise":
        values = _listwise(u, target, beta)
    else:
        if u.shape[-1] != 2:
            raise DataError(f"The link '{link}' compares two answers; a row has {u.shape[-1]}. Use link 'listwise'.")
        values = _pairwise(u, _first_better(target, u), link, beta, margin)
    return values if weight is None else values * weight.to(values)


def _first_better(target: Tensor | float | None, u: Tensor) -> Tensor:
    if target is None:
        return u.new_ones(u.shape[0])
    q = torch.as_tensor(target, dtype=u.dtype, device=u.device)
    return q[..., 0].expand(u.shape[0]) if q.ndim == u.ndim and q.shape[-1] == 2 else q.expand(u.shape[0])


def _pairwise(u: Tensor, q: Tensor, link: str, beta: float | Tensor, margin: float) -> Tensor:
    h, r = u[:, 0] - u[:, 1], beta * u
    win, lose = F.logsigmoid(beta * h - margin), F.logsigmoid(margin - beta * h)
    if link == "sigmoid":
        return -q * win - (1 - q) * lose
    if link == "robust":
        return (-q * win + (1 - q) * lose) / (2 * q - 1)
    if link == "hinge":
        return q * F.relu(1 - beta * h) + (1 - q) * F.relu(1 + beta * h)
    if link == "ipo":
        return q * (h - 0.5 / beta) ** 2 + (1 - q) * (h + 0.5 / beta) ** 2
    if link == "exo_pair":
        return win.exp() * (win - q.log()) + lose.exp() * (lose - (1 - q).log())
    if link == "nca_pair":
        return -F.logsigmoid(r[:, 0]) - 0.5 * F.logsigmoid(-r[:, 0]) - 0.5 * F.logsigmoid(-r[:, 1])
    if link == "bco_pair":
        return -F.logsigmoid(r[:, 0]) - F.logsigmoid(-r[:, 1])
    if link == "sppo_hard":
        return (u[:, 0] - 0.5 / beta) ** 2 + (u[:, 1] + 0.5 / beta) ** 2
    if link == "apo_zero":
        return 1 - torch.sigmoid(r[:, 0]) + torch.sigmoid(r[:, 1])
    if link == "apo_down":
        return torch.sigmoid(r[:, 0]) + 1 - torch.sigmoid(beta * h)
    raise RecipeError(f"There is no preference link '{link}'.")


def _listwise(u: Tensor, target: Tensor | float | None, beta: float | Tensor) -> Tensor:
    if target is None:
        q = torch.zeros_like(u)
        q[:, 0] = 1.0
    else:
        q = torch.as_tensor(target, dtype=u.dtype, device=u.device)
        q = torch.stack([q.expand(u.shape[0]), 1 - q.expand(u.shape[0])], -1) if q.ndim < u.ndim else q.expand_as(u)
    log_p = torch.log_softmax(beta * u, -1)
    # 0 log 0 = 0; absent answers have u = -inf and q = 0. The inner `where` keeps their infinities out of the gradient.
    held = q > 0
    log_p = torch.where(held, log_p, torch.zeros_like(log_p))
    return (torch.xlogy(q, q) - q * log_p).sum(-1)


def soft_target(
    rewards: Tensor,
    mode: Literal["hard", "pairwise", "listwise", "kde"] = "listwise",
    beta: float = 0.5,
    mask: Tensor | None = None,
    scale: bool = False,
    bandwidth: Literal["silverman", "median"] = "silverman",
) -> Tensor:
    """A distribution over each row's answers [rows, P] from their rewards; `mask` says which entries are answers.

    hard: all mass on the best (ties share it). pairwise: (sigmoid(d / beta), 1 - .) of the reward gap d of two answers.
    listwise: softmax(r / beta) of the rewards, centred in the row and with `scale` divided by their standard deviation.
    kde: as listwise with logit(F(r)) for r, F the Gaussian-kernel estimate of the row's own distribution function, which tames
    heavy-tailed noise: mean_j Phi((r - r_j) / h), h by Silverman's rule 0.9 min(sd, IQR / 1.34) P^(-1/5) or the median gap."""
    rewards = rewards.detach().float()
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask.bool()
    if mode == "pairwise":
        if rewards.shape[-1] != 2 or not bool(mask.all()):
            raise DataError("A pairwise target needs exactly two answers a row; use 'listwise' for lists.")
        first = torch.sigmoid((rewards[:, 0] - rewards[:, 1]) / beta)
        return torch.stack([first, 1 - first], -1)
    number = mask.sum(-1, keepdim=True).clamp(min=1)
    if mode == "hard":
        best = rewards.masked_fill(~mask, -torch.inf).amax(-1, keepdim=True)
        top = (mask & (rewards == best)).float()
        return top / top.sum(-1, keepdim=True).clamp(min=1)
    rewards = rewards.masked_fill(~mask, 0)
    centred = (rewards - rewards.sum(-1, keepdim=True) / number).masked_fill(~mask, 0)
    if mode == "kde":
        centred = _kernel_logit(rewards, mask, bandwidth)
    elif scale:
        spread = (centred.square().sum(-1, keepdim=True) / (number - 1).clamp(min=1)).sqrt()
        centred = centred / (spread + 1e-4)
    return torch.softmax((centred / beta).masked_fill(~mask, -torch.inf), -1).nan_to_num(0.0)


def _kernel_logit(rewards: Tensor, mask: Tensor, bandwidth: str) -> Tensor:
    """logit of the smoothed rank of each reward in its row. A row of equal rewards gives zeros."""
    out = torch.zeros_like(rewards)
    for i, (row, held) in enumerate(zip(rewards, mask)):
        values = row[held]
        if len(values) < 2 or bool((values == values[0]).all()):
            continue
        if bandwidth == "silverman":
            spread = values.std()
            quartiles = torch.quantile(values, torch.tensor([0.25, 0.75], device=values.device))
            iqr = (quartiles[1] - quartiles[0]) / 1.34
            width = 0.9 * (torch.minimum(spread, iqr) if iqr > 0 else spread) * len(values) ** -0.2
        else:
            gaps = torch.pdist(values[:, None], p=1)
            width = gaps.median() if gaps.median() > 0 else gaps.mean()
        rank = torch.special.ndtr((values[:, None] - values[None]) / width).mean(-1)
        out[i, held] = torch.logit(rank)
    return out


def by_branch(batch: Batch, values: Tensor, branches: SequenceOf[str]) -> Tensor:
    """[sequences] values to [rows, branches]: column j holds the row's sequence of branch j."""
    place = {(s.row, s.branch): i for i, s in enumerate(batch.sequences)}
    missing = [(r, b) for r in range(len(batch)) for b in branches if (r, b) not in place]
    if missing:
        raise DataError(f"Row {int(batch.ids[missing[0][0]])} has no '{missing[0][1]}' answer.")
    index = torch.tensor([place[r, b] for r in range(len(batch)) for b in branches], dtype=torch.long, device=values.device)
    return values[index].reshape(len(batch), len(branches))


def lengths(batch: Batch) -> Tensor:
    """[sequences] number of supervised tokens, at least 1."""
    return torch.tensor([max(1, len(s.supervised)) for s in batch.sequences], dtype=torch.float32)


# bookkeeping ----------------------------------------------------------------------------------------------------------


class Averages:
    """Means over a step's micro-batches for `ctx.log`, which itself keeps the last value only."""

    def __init__(self) -> None:
        self._step: tuple[int, int] = (-1, -1)
        self._sums: dict[str, list[float]] = {}

    def log(self, ctx: Context | None, **values: Tensor) -> None:
        if ctx is None:
            return
        now = (id(ctx), ctx.clock.step)
        if now != self._step:
            self._step, self._sums = now, {}
        for name, value in values.items():
            if value.numel():
                held = self._sums.setdefault(name, [0.0, 0.0])
                held[0] += float(value.detach().float().sum())
                held[1] += value.numel()
                ctx.log(**{name: held[0] / held[1]})


class AnchorScheduler:
    """A reference that follows the policy: a copy every `every` steps (periodic) or an exponential moving average (ema).

    Only trained parameters are kept. `swapped` puts them into the network for a scoring pass and takes them out again."""

    def __init__(self, kind: Literal["fixed", "periodic", "ema"] = "fixed", every: int = 64, decay: float = 0.99) -> None:
        if kind == "periodic" and every < 2:
            raise RecipeError(f"anchor_every is {every}; it must be at least 2, since an anchor copied every step never holds anything back.")
        if not 0 <= decay < 1:
            raise RecipeError(f"anchor_decay is {decay}; it must be at least 0 and below 1.")
        self.kind, self.every, self.decay = kind, every, decay
        self.shadow: list[Tensor] = []

    def start(self, params: SequenceOf[torch.nn.Parameter]) -> None:
        """Remember the parameters as they are, once; what a checkpoint gave back moves to their devices."""
        if self.kind != "fixed":
            self.shadow = [m.to(p.device) for m, p in zip(self.shadow, params)] or [p.detach().clone() for p in params]

    @torch.no_grad()
    def update(self, params: SequenceOf[torch.nn.Parameter], step: int) -> None:
        """After optimiser step number `step` (the first is 1)."""
        if self.kind == "ema":
            for mine, p in zip(self.shadow, params, strict=True):
                mine.lerp_(p.detach(), 1 - self.decay)
        elif self.kind == "periodic" and step % self.every == 0:
            for mine, p in zip(self.shadow, params, strict=True):
                mine.copy_(p)

    @contextmanager
    def swapped(self, family: Family, params: SequenceOf[torch.nn.Parameter]) -> Iterator[Family]:
        """The policy's network with the anchor's weights, in eval mode and without gradient."""
        held = [p.data for p in params]
        try:
            for p, mine in zip(params, self.shadow, strict=True):
                p.data = mine.to(p.device)
            with family.evaluating():
                yield family
        finally:
            for p, data in zip(params, held):
                p.data = data

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": list(self.shadow)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.shadow = list(state["shadow"])
