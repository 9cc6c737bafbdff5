"""Anchored direct preference optimisation: match a soft target over a list of answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from luthier.catalog import register
from luthier.core.batch import Batch
from luthier.core.families import Decode
from luthier.errors import DataError, RecipeError
from luthier.objective import Preference, _policy, _rollout
from luthier.objective._shared import (
    AnchorScheduler,
    Averages,
    ReferenceCache,
    lengths,
    preference,
    reference_scores,
    row_loss,
    row_weights,
    soft_target,
    token_loss,
)

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family
    from luthier.core.loss import Loss
    from luthier.core.plugin import Step
    from luthier.core.scores import TokenScores

__all__ = ["ADPO", "adaptive_tau", "adpo", "soft_target"]


def adpo(logp: Tensor, ref_logp: Tensor | None, q: Tensor, tau: float | Tensor = 1.0) -> Tensor:
    """KL(q || softmax((logp - ref_logp) / tau)) over the last dimension, one value a row (a number for a single list).

    `ref_logp` None is a constant anchor; absent answers have logp -inf and q 0; `tau` may be one number a row."""
    if logp.ndim == 1:
        return adpo(logp[None], None if ref_logp is None else ref_logp[None], q[None], tau)[0]
    sharp = 1.0 / tau[..., None] if isinstance(tau, Tensor) and tau.ndim else 1.0 / tau
    return preference(logp, ref_logp, q, "listwise", sharp)


def adaptive_tau(
    tau: float, entropy: Tensor, reward: Tensor, uncertain: float = 0.5, mistaken: float = 1.0, low: float = 0.1, high: float = 5.0
) -> Tensor:
    """tau (1 + uncertain H + mistaken (1 - H)(1 - R)) clamped to [low, high], one a prompt: the anchor holds more where the policy does
    not know, and most where it is sure and wrong. H: mean token entropy / ln V in [0, 1]; R: the prompts' mean rewards, scaled to
    [0, 1] over the batch, 1/2 if all are equal."""
    h = entropy.clamp(0, 1)
    gap = reward.max() - reward.min()
    r = (reward - reward.min()) / gap if gap > 1e-6 else torch.full_like(reward, 0.5)
    return (tau * (1 + uncertain * h + mistaken * (1 - h) * (1 - r))).clamp(low, high)


@register("adpo", paper=125)
@dataclass
class ADPO(Preference):
    """Match a soft target over a list of answers with a softmax of the policy's log-ratios to an anchor: DPO without hard labels.

    L = KL(q || softmax(u)), u_i = (l_i - l_i^anchor) / tau, l = sum of log p over an answer's tokens. Targets q: listwise softmax(r /
    reward_temperature) of centred rewards; kde the same on the logit of their smoothed rank (for heavy-tailed noise); pairwise
    (sigmoid(gap / reward_temperature), 1 - .); hard; max-entropy proportional to p_ref exp(r / reward_temperature). Anchors: fixed (the
    reference), periodic or ema copies of the policy, none (a constant: SFT with hard targets, distillation with given ones).
    Rows: prompt, chosen, rejected, with `scores` [a, b] or `agreement` (how sure the preference is), else hard; with tau = 1 / beta
    that is exactly DPO. Or prompt, `responses` (2 or more) and `scores`; a column `target` gives q itself (teacher probabilities).
    `on_policy: true` draws `group_size` answers to each prompt, scores them (helper `reward` or `verifier`) and anchors on the policy that
    drew them. kl adds the k3 estimate to the anchor; drop_failed leaves prompts without any reward above 0 out; adaptive_tau raises
    tau where the policy is unsure, or sure and wrong (tau times 1 + a H + b (1 - H)(1 - R), in [0.1, 5]; entropies of the drawing
    policy). tau scales the gradient by 1 / tau and the curvature by 1 / tau^2, so tune the rate with it. The release's on-policy loss
    leaves out the constant sum q log q. Decided: Silverman's bandwidth; max-entropy targets take no anchor, else it would count twice."""

    tau: float = 1.0
    """Temperature of the log-ratios; 1 / beta of DPO."""
    target: Literal["listwise", "kde", "pairwise", "hard", "max-entropy"] = "listwise"
    """How rewards become a distribution over the answers."""
    reward_temperature: float = 0.5
    """Temperature of the rewards (beta_r)."""
    scale: bool = False
    """Divide centred rewards by their standard deviation in the list."""
    bandwidth: Literal["silverman", "median"] = "silverman"
    """Kernel width of target kde."""
    anchor: Literal["fixed", "periodic", "ema", "none"] = "fixed"
    """What the log-ratios are to."""
    anchor_every: int = 64
    """Steps between copies of a periodic anchor."""
    anchor_decay: float = 0.99
    """How much of an ema anchor stays at each step."""
    reference: str = "stage"
    """The fixed anchor: stage, round, base or one of `models:` (the teacher)."""
    length_normalise: bool = False
    """Token means in the place of sums."""
    kl: float = 0.0
    """Weight of an extra KL to the anchor."""
    on_policy: bool = False
    """Draw and score the policy's own answers."""
    group_size: int = 8
    """On-policy: answers to each prompt."""
    verifier: str = "exact"
    """On-policy: what scores an answer, unless the recipe has a helper `reward`."""
    reward_weights: dict[str, float] = field(default_factory=dict)
    """On-policy: weights of the named parts of the helper's reward."""
    temperature: float = 1.0
    """On-policy: temperature of the draws."""
    max_new_tokens: int = 256
    """On-policy: longest answer."""
    drop_failed: bool = False
    """On-policy: leave out prompts none of whose answers has a reward above 0."""
    adaptive_tau: bool = False
    """On-policy: raise tau by uncertainty and error."""
    adaptive_uncertain: float = 0.5
    """Weight of the entropy in the adaptive tau (a)."""
    adaptive_mistaken: float = 1.0
    """Weight of confident errors in the adaptive tau (b)."""

    columns = (frozenset({"prompt", "chosen", "rejected"}), frozenset({"chosen", "rejected"}), frozenset({"prompt", "responses"}))  # type: ignore[assignment]
    needs = frozenset({"reference", "generation"})
    toy = {"max_new_tokens": 4}

    def __post_init__(self) -> None:
        for name, allowed in (("target", ("listwise", "kde", "pairwise", "hard", "max-entropy")), ("bandwidth", ("silverman", "median")),
                              ("anchor", ("fixed", "periodic", "ema", "none"))):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise RecipeError(f"{name} is '{getattr(self, name)}'; it must be one of {', '.join(allowed)}.")
        for name in ("tau", "reward_temperature"):
            if getattr(self, name) <= 0:
                raise RecipeError(f"{name} is {getattr(self, name)}; it must be positive.")
        if self.kl < 0:
            raise RecipeError(f"kl is {self.kl}; it must not be negative.")
        if self.target == "max-entropy" and (self.anchor != "none" or self.on_policy):
            raise RecipeError("target 'max-entropy' already holds the reference; use it with anchor 'none' and without on_policy.")
        if self.kl and self.anchor == "none" and not self.on_policy:
            raise RecipeError("kl is measured to the anchor; with anchor 'none' it must be 0.")
        if self.on_policy:
            _rollout.check_sampling(self.group_size, self.temperature, self.max_new_tokens, self.verifier)
            self.columns = (frozenset({"prompt", "completion"}), frozenset({"messages"}), frozenset({"prompt"}))  # type: ignore[misc]
            self.needs = frozenset({"generation"})  # type: ignore[misc]
        elif self.adaptive_tau or self.drop_failed:
            raise RecipeError("adaptive_tau and drop_failed look at drawn answers; set on_policy: true.")
        else:
            self.needs = frozenset() if self.anchor == "none" and self.target != "max-entropy" else frozenset({"reference"})  # type: ignore[misc]
        kind: Any = "fixed" if self.anchor == "none" or self.on_policy else self.anchor
        self._anchor = AnchorScheduler(kind, self.anchor_every, self.anchor_decay)
        self._cache, self._averages, self._params = ReferenceCache(), Averages(), []  # type: ignore[var-annotated]

    # batches ------------------------------------------------------------------------------------------------------------
    def collate(self, rows: SequenceOf[Mapping[str, Any]], ids: Any, ctx: Context) -> Batch:
        if self.on_policy:
            return _rollout.prompt_batch(rows, ids, ctx)
        from luthier.core.rows import encode

        tokenizer, sequences = _rollout.family_of(ctx).processor, []
        for i, row in enumerate(rows):
            if "responses" not in row:
                sequences += encode(row, tokenizer, train_on="completion", row=i)
                continue
            shared = {k: v for k, v in row.items() if k not in ("responses", "scores", "target", "label")}
            for answer in row["responses"]:
                one = encode({**shared, "completion": answer}, tokenizer, train_on="completion", row=i)
                sequences += [replace(s, branch="response") for s in one]
        return Batch(list(rows), np.arange(len(rows)) if ids is None else np.asarray(ids, np.int64), sequences)

    def rollout(self, batch: Batch, ctx: Context) -> Batch:
        """On-policy: every prompt with its scored answers; else the batch as it is."""
        if not self.on_policy:
            return batch
        family = _rollout.family_of(ctx)
        drawn = _rollout.draw(batch, ctx, self.group_size, Decode(max_new_tokens=self.max_new_tokens, temperature=self.temperature))
        parts = _rollout.score_rewards(drawn, batch.rows, ctx, self.verifier, self.reward_weights)
        _rollout.score_behaviour(drawn, family, self.temperature)
        made = _rollout.assemble(drawn, batch, by="prompt")
        logged = _rollout.report(drawn, parts)
        rewards = torch.tensor([r.data["reward"] for r in drawn]).reshape(len(batch), self.group_size)
        if self.adaptive_tau:
            size = math.log(family.config.get_text_config().vocab_size)
            spread = torch.tensor([float(r.data["entropy"].mean()) / size for r in drawn]).reshape(rewards.shape).mean(-1)
            taus = adaptive_tau(self.tau, spread, rewards.nanmean(-1).nan_to_num(0.0), self.adaptive_uncertain, self.adaptive_mistaken)
            for s in made.sequences:
                s.data["tau"] = float(taus[s.row])
            logged["rollout/tau"] = float(taus.mean())
        if self.drop_failed:
            alive = torch.nonzero((rewards > 0).any(-1)).flatten().tolist()
            logged["rollout/failed"] = 1 - len(alive) / max(1, len(batch))
            made = made.take(alive)
        return replace(made, extra={**made.extra, "rollout": logged})

    def prepare(self, batch: Batch, ctx: Context) -> Batch:
        """Logs the draw: at this point the step's record is open."""
        if batch.extra.get("rollout"):
            ctx.log(**batch.extra["rollout"])
        return batch

    # the anchor ---------------------------------------------------------------------------------------------------------
    def before_step(self, step: Step, ctx: Context) -> None:
        self._params = [p for g in step.groups for p in g.params.values()]
        self._anchor.start(self._params)

    def after_step(self, step: Step, ctx: Context) -> None:
        self._anchor.update(self._params, step.number + 1)

    def _anchored(self, model: Family, batch: Batch, ctx: Context | None) -> tuple[Tensor | None, Tensor | None]:
        """Log-probabilities under the anchor: [sequences] sums, and one a token where the KL needs them."""
        if self.on_policy:
            tokens = batch.gather("behaviour")
            owner = torch.repeat_interleave(torch.arange(len(batch.sequences)), torch.tensor([len(s.supervised) for s in batch.sequences]))
            return _policy.sums(tokens, owner, len(batch.sequences)), tokens
        if self.anchor == "none":
            return None, None
        if self._anchor.shadow:
            with self._anchor.swapped(model, self._params):
                found: TokenScores = model.score(batch)
                return found.rows("sum"), found.logp
        if self.kl:
            found = reference_scores(ctx, batch, self.reference)
            return found.rows("sum"), found.logp
        return self._cache.logps(ctx, batch, self.reference), None

    # the loss -----------------------------------------------------------------------------------------------------------
    def loss(self, model: Family, batch: Batch, ctx: Context | None = None) -> Loss:
        anchor, anchor_tokens = self._anchored(model, batch, ctx)
        scores = model.score(batch)
        logp = _policy.tempered_logp(scores, self.temperature) if self.on_policy else scores.logp
        sums = scores.rows("sum", logp)
        size = lengths(batch).to(sums) if self.length_normalise else torch.ones_like(sums)
        ratio = (sums if anchor is None else sums - anchor.to(sums)) / size
        place, held = answer_table(batch)
        q = self._target(batch, held, ctx).to(sums)
        held = held & ~torch.isnan(self._rewards(batch, held)) if self.on_policy else held
        held = held | ~held.any(-1, keepdim=True)  # a list without any score has q = 0 and costs nothing
        u = torch.where(held.to(sums.device), ratio[place.to(sums.device)], ratio.new_tensor(-torch.inf))
        loss = row_loss("adpo", adpo(u, None, q, self._taus(batch).to(sums)), row_weights(batch))
        if self.kl and anchor_tokens is not None:
            loss.merge(token_loss("kl", _policy.k3(logp, anchor_tokens.to(logp)), batch), weight=self.kl)
        self._averages.log(ctx, **{"adpo/drift": ratio.abs(), "adpo/right": (u.argmax(-1) == q.argmax(-1)).float()})
        return loss

    def _taus(self, batch: Batch) -> Tensor:
        found = {s.row: s.data.get("tau", self.tau) for s in batch.sequences}
        return torch.tensor([float(found.get(i, self.tau)) for i in range(len(batch))])

    def _target(self, batch: Batch, held: Tensor, ctx: Context | None) -> Tensor:
        """[rows, P] the distribution to match."""
        rewards = self._rewards(batch, held)
        held = held & ~torch.isnan(rewards)
        rewards = rewards.nan_to_num(0.0)
        if self.target == "max-entropy":
            place, _ = answer_table(batch)
            prior = self._cache.logps(ctx, batch, self.reference).cpu()[place]
            q = torch.softmax((prior + rewards / self.reward_temperature).masked_fill(~held, -torch.inf), -1)
        else:
            q = soft_target(rewards, self.target, self.reward_temperature, held, self.scale, self.bandwidth)
        for i, row in enumerate(batch.rows):
            given = None if self.on_policy else given_target(row, int(held[i].sum()), int(batch.ids[i]))
            if given is not None:
                q[i] = 0.0
                q[i, : len(given)] = torch.tensor(given)
        return q

    def _rewards(self, batch: Batch, held: Tensor) -> Tensor:
        """[rows, P] of drawn answers or of the rows' columns; 0 for a row that states its target itself."""
        rewards = torch.zeros(held.shape)
        place, _ = answer_table(batch)
        for i, row in enumerate(batch.rows):
            n = int(held[i].sum())
            if self.on_policy:
                rewards[i, :n] = torch.tensor([float(batch.sequences[int(j)].data["reward"]) for j in place[i, :n]])
            elif given_target(row, n, int(batch.ids[i])) is None:
                rewards[i, :n] = torch.tensor(given_scores(row, n, int(batch.ids[i])))
        return rewards

    def state_dict(self) -> dict[str, Any]:
        return {"reference": self._cache.state_dict(), "anchor": self._anchor.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._cache.load_state_dict(state["reference"])
        self._anchor.load_state_dict(state["anchor"])


def answer_table(batch: Batch) -> tuple[Tensor, Tensor]:
    """[rows, P] which sequence is each row's j-th answer (the chosen one first), and which entries are answers."""
    answers: list[list[int]] = [[] for _ in range(len(batch))]
    for i, s in enumerate(batch.sequences):
        answers[s.row].append(i)
    for i, group in enumerate(answers):
        group.sort(key=lambda j: batch.sequences[j].branch == "rejected")
        if len(group) < 2:
            raise DataError(f"Row {int(batch.ids[i])} has {len(group)} answers; a preference needs at least 2.")
    width = max(map(len, answers))
    place = torch.tensor([g + [g[0]] * (width - len(g)) for g in answers])
    return place, torch.tensor([[j < len(g) for j in range(width)] for g in answers])


def given_target(row: Mapping[str, Any], n: int, row_id: int) -> list[float] | None:
    """The distribution that a row states itself: `target`, or `agreement`, or the bare order of an unscored pair."""
    if row.get("target") is not None:
        q = [float(v) for v in row["target"]]
        if len(q) != n or min(q) < 0 or abs(sum(q) - 1) > 1e-3:
            raise DataError(f"Row {row_id}: 'target' must hold {n} probabilities that add up to 1.")
        return q
    if row.get("agreement") is not None and n == 2:
        share = float(row["agreement"])
        if not 0 <= share <= 1:
            raise DataError(f"Row {row_id}: 'agreement' is {share}; it must lie between 0 and 1.")
        return [share, 1 - share]
    scored = row.get("scores") is not None or row.get("score_chosen") is not None
    return [1.0, 0.0] if "chosen" in row and not scored else None


def given_scores(row: Mapping[str, Any], n: int, row_id: int) -> list[float]:
    """The rewards of a row's answers: `scores`, or `score_chosen` and `score_rejected`."""
    scores = row.get("scores")
    if scores is None and row.get("score_chosen") is not None:
        scores = [row["score_chosen"], row.get("score_rejected")]
    if scores is None or len(scores) != n or any(v is None for v in scores):
        raise DataError(f"Row {row_id} needs 'scores': one number for each of its {n} answers.")
    return [float(v) for v in scores]
