"""Prefix-RFT: one answer of every group starts with a piece of a demonstration."""

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
from luthier.core.batch import Batch, Sequence
from luthier.core.context import Ramp
from luthier.core.families import Decode
from luthier.errors import RecipeError
from luthier.objective import Policy, _policy, _rollout

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family
    from luthier.core.loss import Loss


def prefix_rft(
    logp: Tensor, behaviour: Tensor | None, advantage: Tensor, kept: Tensor, sequence: Tensor, sequences: int, max_length: int,
    eps_low: float = 0.2, eps_high: float = 0.28,
) -> Tensor:  # fmt: skip
    """-(1/answers) sum over answers and kept tokens of min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A) / max_length.

    All tensors have one value a token; `kept` is false for the prefix tokens that `prefix_mask` leaves out."""
    values = _policy.policy_gradient(logp, behaviour, advantage, eps_low, eps_high)
    values = torch.where(kept.bool(), values, torch.zeros_like(values))
    return _policy.normalise(values, sequence, sequences, "dr_grpo", max_length)[0].sum() / max(1, sequences)


def prefix_mask(entropy: Any, prefix: int, keep: float = 0.2) -> np.ndarray:
    """bool per token of one answer: all tokens behind the prefix, and of its `prefix` first ones the ceil(keep * prefix) with the highest
    entropy (the earlier one of equals)."""
    entropy = np.asarray(entropy, dtype=np.float64)
    kept = np.ones(len(entropy), bool)
    kept[:prefix] = False
    number = math.ceil(keep * prefix - 1e-9)
    kept[np.argsort(-entropy[:prefix], kind="stable")[:number]] = True
    return kept


def prefix_length(length: int, fraction: float, u: float, high: float = 0.95, low: float = 0.05, law: str = "uniform") -> int:
    """floor(share * length), the share drawn from [l, high] by u in [0, 1), where l falls from `high` to `low` by a cosine over the
    training; law "decayed" takes l itself."""
    lower = Ramp(high, low, shape="cosine").at(fraction)
    share = lower if law == "decayed" else lower + u * (high - lower)
    return min(length, math.floor(share * length + 1e-9))


@register("prefix-rft", paper=127)
@dataclass
class PrefixRFT(Policy):
    """In every group let one answer start with a piece of a demonstration and let the policy finish it: if it succeeds, the piece is
    reinforced like any other action.

    G - 1 answers are drawn from the policy; the last one is y*_{<l} plus a continuation, l = floor(u L), u uniform between a bound that
    falls by a cosine from 0.95 to 0.05 and 0.95. All are scored; A = r - mean(r); the loss is the clipped policy gradient, summed over
    tokens and divided by the constant max_new_tokens (Dr. GRPO). Of the prefix only the 20 % most uncertain tokens (entropy under
    the policy that drew the answers) enter it, so that imitation does not drown the rest. The prefix is cut on the ids of the
    demonstration's own encoding, never re-tokenised; L counts its end token, and a prefix leaves room for at least one own token.
    Rows without a demonstration (no `completion`) fall back to plain groups. Decided where the paper is silent: the law of u (uniform;
    `law: decayed` takes the bound itself), the behaviour probability of prefix tokens (the drawing policy's own, so their ratio is 1 on
    the first step), eps_high 0.28. Prefixes of failed answers are pushed away; their share is logged as rollout/prefix_negative.
    share 0 is plain reinforcement (grpo with advantage dr-grpo, loss_type dr_grpo); share 1 with advantage 1 would be SFT on the kept
    tokens. Rows are scored by the helper `reward` or by `verifier`. Defaults: the paper's; lr 1e-6, no KL."""

    group_size: int = 8
    """Answers to each prompt, the hybrid one included."""
    verifier: str = "exact"
    """What scores an answer: exact, number, lab:TASK ... A row without a demonstration gives its right answer as `label` or `meta.answer`."""
    reward_weights: dict[str, float] = field(default_factory=dict)
    """Weights of the named parts of the helper's reward; 1 where nothing is said."""
    high: float = 0.95
    """Largest share of a demonstration that is forced."""
    low: float = 0.05
    """Where the smallest share ends."""
    law: Literal["uniform", "decayed"] = "uniform"
    """How the share is drawn: evenly between the falling bound and `high`, or the bound itself."""
    share: float | None = None
    """A fixed share instead of the falling one."""
    keep: float = 0.2
    """Share of the prefix tokens, the most uncertain ones, that are learned from; 1 keeps all."""
    eps_low: float = 0.2
    """The ratio is clipped below at 1 minus this."""
    eps_high: float = 0.28
    """The ratio is clipped above at 1 plus this."""
    temperature: float = 1.0
    """Temperature of the draws."""
    max_new_tokens: int = 256
    """Longest answer, prefix included; also the loss's constant divisor."""

    columns = (frozenset({"prompt", "completion"}), frozenset({"messages"}), frozenset({"prompt"}))  # type: ignore[assignment]
    toy = {"max_new_tokens": 4, "group_size": 2}

    def __post_init__(self) -> None:
        _rollout.check_sampling(self.group_size, self.temperature, self.max_new_tokens, self.verifier)
        if not 0 <= self.low <= self.high <= 1:
            raise RecipeError(f"low is {self.low} and high {self.high}; they must be shares with low <= high.")
        for name in ("share", "keep"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise RecipeError(f"{name} is {value}; it must lie between 0 and 1.")
        if self.law not in ("uniform", "decayed"):
            raise RecipeError(f"law is '{self.law}'; it must be 'uniform' or 'decayed'.")
        if not 0 <= self.eps_low < 1 or self.eps_high < 0:
            raise RecipeError(f"eps_low is {self.eps_low} and eps_high {self.eps_high}; they must be 0 or more, and eps_low below 1.")

    def collate(self, rows: SequenceOf[Mapping[str, Any]], ids: Any, ctx: Context) -> Batch:
        """Prompts, and the encoded demonstrations of the rows that have one."""
        batch = _rollout.prompt_batch(rows, ids, ctx)
        made = []
        for s, row in zip(batch.sequences, rows):
            shown = demonstration(row, _rollout.family_of(ctx).processor, s.row)
            # a demonstration's own encoding says where its prompt ends
            made += [s] if shown is None else [replace(s, ids=shown.ids[: shown.supervised[0]], mask=np.zeros(shown.supervised[0], bool)), shown]
        return replace(batch, sequences=made)

    def rollout(self, batch: Batch, ctx: Context) -> Batch:
        """Groups of answers, one of each with a forced beginning, scored and with advantages."""
        prefixes = self.prefixes(batch, ctx)
        decode = Decode(max_new_tokens=self.max_new_tokens, temperature=self.temperature)
        plain = [i for i in range(len(batch)) if i not in prefixes]
        drawn = _rollout.draw(batch, ctx, self.group_size, decode, plain)
        drawn += _rollout.draw(batch, ctx, self.group_size - 1, decode, list(prefixes))
        drawn += self._hybrids(batch, prefixes, decode, ctx)
        drawn.sort(key=lambda r: r.row)
        parts = _rollout.score_rewards(drawn, batch.rows, ctx, self.verifier, self.reward_weights)
        _rollout.score_behaviour(drawn, _rollout.family_of(ctx), self.temperature)
        found = _policy.advantages([r.data["reward"] for r in drawn], [r.row for r in drawn], "mean")
        for r, a in zip(drawn, found.tolist()):
            r.data["advantage"] = a
            r.kept = prefix_mask(r.data["entropy"], r.prefix, self.keep)
        made = _rollout.assemble(drawn, batch)
        return replace(made, extra={**made.extra, "rollout": {**_rollout.report(drawn, parts), **_prefix_report(drawn)}})

    def prefixes(self, batch: Batch, ctx: Context) -> dict[int, np.ndarray]:
        """The forced ids of every row that gets some."""
        found = {}
        rng = ctx.numpy("prefix-rft")
        for s in batch.sequences:
            if s.branch == "demonstration":
                gold = s.ids[s.supervised]
                u = float(rng.random())
                if self.share is None:
                    cut = prefix_length(len(gold), ctx.clock.fraction, u, self.high, self.low, self.law)
                else:
                    cut = prefix_length(len(gold), 1.0, 0.0, self.share, self.share)
                if cut < len(gold) or cut > self.max_new_tokens:
                    cut = min(cut, self.max_new_tokens - 1)
                if cut:
                    found[s.row] = gold[:cut]
        return found

    def _hybrids(self, batch: Batch, prefixes: dict[int, np.ndarray], decode: Decode, ctx: Context) -> list[_rollout.Rollout]:
        family, prompts = _rollout.family_of(ctx), _rollout.prompts_of(batch)
        ends = family.end_ids() if hasattr(family, "end_ids") else []
        open_rows = [i for i, p in sorted(prefixes.items()) if p[-1] not in ends and len(p) < self.max_new_tokens]
        room = max((self.max_new_tokens - len(prefixes[i]) for i in open_rows), default=0)
        starts = [np.concatenate([prompts[i], prefixes[i]]) for i in open_rows]
        answers = ctx.generate(starts, replace(decode, max_new_tokens=room), 1) if open_rows else []
        continued = {i: np.asarray(a[0].ids, np.int64) for i, a in zip(open_rows, answers)}
        made = []
        for i, prefix in sorted(prefixes.items()):
            ids = np.concatenate([prefix, continued.get(i, prefix[:0])])[: self.max_new_tokens]
            finished = bool(ids[-1] in ends)
            text = family.processor.decode(ids[:-1] if finished else ids, skip_special_tokens=True).strip()
            made.append(_rollout.Rollout(i, prompts[i], ids, text, finished, prefix=len(prefix)))
        return made

    def prepare(self, batch: Batch, ctx: Context) -> Batch:
        """Logs the draw: at this point the step's record is open."""
        ctx.log(**batch.extra.get("rollout", {}))
        return batch

    def together(self, batch: Batch) -> list[list[int]]:
        return _rollout.together(batch)

    def loss(self, model: Family, batch: Batch, ctx: Context | None = None) -> Loss:
        scores = model.score(batch)
        logp = _policy.tempered_logp(scores, self.temperature)
        return _policy.policy_loss(logp, scores.sequence, batch, "dr_grpo", self.eps_low, self.eps_high, max_length=self.max_new_tokens)


def demonstration(row: Mapping[str, Any], tokenizer: Any, place: int) -> Sequence | None:
    """The row's worked answer as a sequence whose last supervised run is the demonstration; None if the row has none."""
    from luthier.core.rows import encode

    messages = row.get("messages")
    if not row.get("completion") and not (messages and messages[-1].get("role") == "assistant"):
        return None
    s = encode(row, tokenizer, train_on="completion", row=place)[-1]
    if not len(s.supervised):
        return None
    start = int(s.supervised[-1])
    while start > 1 and s.mask[start - 1]:
        start -= 1
    mask = np.zeros(len(s), bool)
    mask[start : int(s.supervised[-1]) + 1] = True
    return replace(s, mask=mask, branch="demonstration")


def _prefix_report(drawn: list[_rollout.Rollout]) -> dict[str, float]:
    hybrid = [r for r in drawn if r.prefix]
    if not hybrid:
        return {"rollout/prefix_share": 0.0}
    return {
        "rollout/prefix_share": float(np.mean([r.prefix / len(r.answer) for r in hybrid])),
        "rollout/prefix_reward": float(np.nan_to_num([r.data["reward"] for r in hybrid]).mean()),
        "rollout/prefix_negative": float(np.mean([r.data["advantage"] < 0 for r in hybrid])),
    }
