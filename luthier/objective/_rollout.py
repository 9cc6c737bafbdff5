"""From prompts to a scored batch: draw answers, reward them, score them under the policy that drew them, lay them out.

Rewards come from the recipe's helper `reward` or from a verifier. The batch has one row an answer (or one row a prompt); its sequences,
of branch `rollout`, carry `reward`, `advantage`, `behaviour` (log-probabilities of the policy that drew them) and `entropy`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from luthier.core.batch import Batch, Sequence
from luthier.core.families import Decode
from luthier.core.scores import entropy, log_prob
from luthier.core.verify import verifier
from luthier.errors import DataError, RecipeError, UserError
from luthier.objective._policy import tempered_logp, uniform_share

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@dataclass
class Rollout:
    """One answer to one prompt."""

    row: int
    """Index of the prompt's row in the batch of prompts."""
    prompt: np.ndarray
    answer: np.ndarray
    """Its ids, a forced prefix included."""
    text: str
    finished: bool
    prefix: int = 0
    """How many of its first ids were forced."""
    data: dict[str, Any] = field(default_factory=dict)
    """reward, advantage, behaviour, entropy ...; per-token arrays run over all its ids."""
    kept: np.ndarray | None = None
    """bool per id: it enters the loss; None: all."""


def prompt_batch(rows: SequenceOf[Mapping[str, Any]], ids: Any, ctx: Context) -> Batch:
    """Rows to a batch of prompts, nothing supervised."""
    from luthier.core.rows import prompt_ids

    tokenizer = family_of(ctx).processor
    sequences = []
    for i, row in enumerate(rows):
        prompt = np.asarray(prompt_ids(row, tokenizer), dtype=np.int64)
        sequences.append(Sequence(prompt, np.zeros(len(prompt), bool), row=i, branch="prompt"))
    return Batch(list(rows), np.arange(len(rows)) if ids is None else np.asarray(ids, np.int64), sequences)


def family_of(ctx: Context | None) -> Family:
    if ctx is None or ctx.current is None:
        raise UserError("Drawing answers needs a context with a model: Context(model).")
    return ctx.current


def prompts_of(batch: Batch) -> list[np.ndarray]:
    """The prompt ids of every row: its sequence of branch `prompt`, else what comes before the first supervised token of another one."""
    found: dict[int, np.ndarray] = {}
    for s in sorted(batch.sequences, key=lambda s: s.branch != "prompt"):
        if s.row not in found:
            found[s.row] = s.ids if s.branch == "prompt" or not len(s.supervised) else s.ids[: s.supervised[0]]
    missing = [r for r in range(len(batch)) if r not in found or not len(found[r])]
    if missing:
        raise DataError(f"Row {int(batch.ids[missing[0]])} has no prompt to answer.")
    return [found[r] for r in range(len(batch))]


def draw(batch: Batch, ctx: Context, n: int, decode: Decode, only: SequenceOf[int] | None = None) -> list[Rollout]:
    """`n` answers to every row's prompt, or to those of the rows `only`, in row order."""
    prompts = prompts_of(batch)
    rows = range(len(batch)) if only is None else sorted(only)
    answers = ctx.generate([prompts[i] for i in rows], decode, n) if rows else []
    return [Rollout(i, prompts[i], np.asarray(a.ids, np.int64), a.text, a.finished) for i, group in zip(rows, answers) for a in group]


def score_rewards(rollouts: list[Rollout], rows: SequenceOf[Mapping[str, Any]], ctx: Context, spec: Any, weights: Mapping[str, float] | None = None) -> dict[str, np.ndarray]:
    """Write every answer's `reward`, and return its named parts.

    The recipe's helper `reward`, if there is one, is called as `reward(answers, rows)` and gives a list of numbers or named lists of
    numbers, None where it cannot tell; else the verifier `spec` scores each answer. Parts add up with their `weights` (default 1)."""
    texts, mine = [r.text for r in rollouts], [rows[r.row] for r in rollouts]
    if ctx.has_helper("reward"):
        given = ctx.helper("reward")(texts, mine)
        parts = {k: _numbers(v, len(texts)) for k, v in (given.items() if isinstance(given, Mapping) else [("reward", given)])}
    else:
        check = verifier(spec)
        parts = {"reward": np.array([check(t, row).score for t, row in zip(texts, mine)], dtype=np.float32)}
    if not parts:
        raise UserError("The helper 'reward' gave no rewards.")
    weights = weights or {}
    unknown = set(weights) - set(parts)
    if unknown:
        raise UserError(f"reward_weights names '{sorted(unknown)[0]}', but the rewards are: {', '.join(parts)}.")
    stacked = np.stack([weights.get(k, 1.0) * v for k, v in parts.items()])
    total = np.where(np.isnan(stacked).all(0), np.nan, np.nansum(stacked, 0))
    for r, value in zip(rollouts, total):
        r.data["reward"] = float(value)
    return parts


def _numbers(values: Any, n: int) -> np.ndarray:
    found = np.array([np.nan if v is None else float(getattr(v, "score", v)) for v in values], dtype=np.float32)
    if len(found) != n:
        raise UserError(f"The helper 'reward' gave {len(found)} numbers for {n} answers; it must give one an answer.")
    return found


def score_behaviour(rollouts: list[Rollout], family: Family, temperature: float = 1.0, tokens: int = 8192) -> None:
    """Write every answer's `behaviour` and `entropy`, one number an id, by one pass of the current policy without gradient.

    Answers are scored a few thousand tokens at a time, those of one prompt together so that they share it."""
    sequences = [_sequence(r, i) for i, r in enumerate(rollouts)]
    with family.evaluating():
        for part in _chunks(sequences, tokens):
            scores = family.score(part)

            def both(logits: Tensor, at: slice, target: Tensor = scores.target) -> tuple[Tensor, Tensor]:
                return log_prob(logits / temperature, target[at]), entropy(logits)

            found = scores.map(both) if len(scores) else (torch.zeros(0), torch.zeros(0))
            sizes = [len(s.supervised) for s in part]
            for s, logp, spread in zip(part, found[0].cpu().split(sizes), found[1].cpu().split(sizes)):
                rollouts[s.row].data |= {"behaviour": logp.numpy(), "entropy": spread.numpy()}


def score_reference(rollouts: list[Rollout], ctx: Context, name: str, temperature: float = 1.0, tokens: int = 8192) -> None:
    """Write every answer's `reference`: its ids' log-probabilities under a frozen model."""
    with ctx.reference(name) as frozen:
        for part in _chunks([_sequence(r, i) for i, r in enumerate(rollouts)], tokens):
            logp = tempered_logp(frozen.score(part), temperature).cpu().split([len(s.supervised) for s in part])
            for s, values in zip(part, logp):
                rollouts[s.row].data["reference"] = values.numpy()


def _sequence(r: Rollout, row: int) -> Sequence:
    mask = np.zeros(len(r.prompt) + len(r.answer), bool)
    mask[len(r.prompt) :] = True
    return Sequence(np.concatenate([r.prompt, r.answer]), mask, row=row, branch="rollout")


def _chunks(sequences: list[Sequence], tokens: int) -> Iterator[list[Sequence]]:
    part: list[Sequence] = []
    for s in sequences:
        if part and sum(map(len, part)) + len(s) > tokens:
            yield part
            part = []
        part.append(s)
    if part:
        yield part


def assemble(rollouts: list[Rollout], prompts: Batch, by: Literal["answer", "prompt"] = "answer") -> Batch:
    """The batch to learn from. by answer: one row an answer; by prompt: one row a prompt, which keeps its answers together.

    Row dicts, ids and weights are those of the prompts. Per-token data are cut to the ids that enter the loss."""
    sequences = []
    for i, r in enumerate(rollouts):
        s = _sequence(r, i if by == "answer" else r.row)
        keep = np.ones(len(r.answer), bool) if r.kept is None else np.asarray(r.kept, bool)
        s.mask[len(r.prompt) :] = keep
        s.data = {k: np.asarray(v)[keep] if np.ndim(v) else v for k, v in r.data.items()}
        sequences.append(s)
    source = [r.row for r in rollouts] if by == "answer" else list(range(len(prompts)))
    return replace(
        prompts,
        rows=[prompts.rows[i] for i in source],
        ids=prompts.ids[source],
        sequences=sequences,
        weights=None if prompts.weights is None else prompts.weights[torch.as_tensor(source, dtype=torch.long)],
        tensors={k: v[torch.as_tensor(source, dtype=torch.long, device=v.device)] for k, v in prompts.tensors.items()},
        touched=True,
    )


def report(rollouts: list[Rollout], parts: Mapping[str, np.ndarray]) -> dict[str, float]:
    """What is logged of one draw: rewards (their parts with mean and mean spread within groups), lengths, cut answers, dead groups."""
    if not rollouts:
        return {}
    rewards, groups = np.array([r.data["reward"] for r in rollouts]), np.array([r.row for r in rollouts])
    found = {
        "rollout/reward": float(np.nanmean(rewards)) if not np.isnan(rewards).all() else 0.0,
        "rollout/uniform_groups": uniform_share(rewards, groups),
        "rollout/length": float(np.mean([len(r.answer) for r in rollouts])),
        "rollout/cut": float(np.mean([not r.finished for r in rollouts])),
    }
    entropies = [r.data["entropy"] for r in rollouts if len(r.data.get("entropy", ()))]
    if entropies:
        found["rollout/entropy"] = float(np.concatenate(entropies).mean())
    if len(parts) > 1:
        for name, values in parts.items():
            known = ~np.isnan(values)
            spread = [values[known & (groups == g)].std() for g in np.unique(groups[known])]
            found |= {f"rollout/{name}": float(values[known].mean()) if known.any() else 0.0, f"rollout/{name}_spread": float(np.mean(spread)) if spread else 0.0}
    return found


def together(batch: Batch, limit: int = 512) -> list[list[int]]:
    """Answers of one prompt side by side, as many as fit into one packed sequence, so that a micro-batch computes the prompt once.
    They may be apart: advantages are already there."""
    made: list[list[int]] = []
    size, last = 0, None
    for s in batch.sequences:
        start = int(s.supervised[0]) if len(s.supervised) else len(s)
        key = (int(batch.ids[s.row]), s.ids[:start].tobytes())
        if made and key == last and size + len(s) - start <= limit:
            made[-1].append(s.row)
            size += len(s) - start
        else:
            made.append([s.row])
            size, last = len(s), key
    return made


def check_sampling(group_size: int, temperature: float, max_new_tokens: int, spec: str) -> None:
    """What every objective that draws answers asks of its fields."""
    if group_size < 2:
        raise RecipeError(f"group_size is {group_size}; a group needs at least 2 answers to be compared.")
    if temperature <= 0:
        raise RecipeError(f"temperature is {temperature}; it must be positive, or all answers of a group are the same.")
    if max_new_tokens < 1:
        raise RecipeError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
    verifier(spec)
