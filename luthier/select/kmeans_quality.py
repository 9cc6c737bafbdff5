"""Diversify and Conquer: Diversity-Centric Data Selection with Iterative Refinement (paper 2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from luthier.catalog import register
from luthier.core.families import Decode
from luthier.core.neighbours import kmeans
from luthier.core.rows import Rows, answer_of, prompt_ids
from luthier.decode._shared import answered
from luthier.errors import RecipeError, UserError
from luthier.select import Picks, Selector, budget_of
from luthier.select._shared import count, embeddings, generator, gumbel_top_k, numbers, spread

if TYPE_CHECKING:
    from luthier.core.context import Context


def kmeans_quality(labels: Any, quality: Any, counts: Any, rng: np.random.Generator, used: Any = (), softmax: bool = False) -> np.ndarray:
    """From every cluster its count of rows not yet used, drawn without replacement with p_i = q_i / sum q (or softmax(q))."""
    labels, quality = np.asarray(labels), np.asarray(quality, float)
    free = np.ones(len(labels), bool)
    free[np.asarray(list(used), dtype=np.int64)] = False
    logits = quality if softmax else np.log(np.maximum(quality, 1e-300))
    chosen = []
    for cluster, wanted in enumerate(np.asarray(counts)):
        members = np.flatnonzero((labels == cluster) & free)
        chosen.append(members[gumbel_top_k(logits[members], int(min(wanted, len(members))), rng)])
    return np.concatenate(chosen).astype(np.int64) if chosen else np.zeros(0, np.int64)


def new_weights(labels: Any, chosen: Any, margin: Any, clusters: int, old: Any = None, rule: Literal["softmax", "memory"] = "softmax") -> np.ndarray:
    """Cluster weights for the next round from the margins d_i of the rows chosen so far.

    s_j = mean of d_i over the chosen rows of cluster j (clusters without one: the mean of the others, so that no index is lost).
    "softmax": w_j = exp(s_j) / sum_c exp(s_c), as released; "memory": w_j proportional to old_j * s_j, s made positive by its least value.
    Equal scores give uniform (unchanged) weights."""
    labels, chosen, margin = np.asarray(labels), np.asarray(chosen), np.asarray(margin, float)
    place = labels[chosen]
    number = np.bincount(place, minlength=clusters)
    score = np.bincount(place, weights=margin, minlength=clusters) / np.maximum(number, 1)
    score = np.where(number > 0, score, score[number > 0].mean() if (number > 0).any() else 0.0)
    if rule == "softmax":
        weights = np.exp(score - score.max())
    else:
        positive = score - score.min() + 1e-3 * max(1.0, float(np.ptp(score)))
        weights = (np.full(clusters, 1 / clusters) if old is None else np.asarray(old, float)) * positive
    return weights / weights.sum()


@register("kmeans-quality", paper=2)
@dataclass
class KMeansQuality(Selector):
    """Cover the embedding space first, then look at quality; with rounds, give more of the budget to clusters the tuned model has yet to learn.

    Static (one round): k-means on embeddings, every cluster gets its share of the budget (`share: size`, the paper's b |C_j| / n; `equal`, the
    release's b / K), and inside it rows are drawn with probability proportional to quality. Iterative (`rounds` > 1, the paper's N = 3): the budget is split
    over rounds, the first shared equally; after each the model is tuned from the base on all rows chosen so far, those rows are scored, and clusters where the
    given answer clearly beats the model's own get more of the next round. Scorers: `reward`, the helper's reward of the given answer minus that of the model's
    own greedy one; `margin`, the same difference in mean log p; `loss` and `perplexity` of the given answer. Under the last two noise scores high, as in
    the release; under `margin` what is mastered does: `prefer: low` turns the sign. Counts always add up to the budget: what a small cluster cannot give is
    handed on (the release draws too few clusters and misses its budget). The weights follow the release's softmax; `rule: memory` is the paper's formula,
    uncertain in its normalisation. Rounds restart from the base."""

    clusters: int | None = None
    """K; empty: the paper's 1024 (static) or 512 (iterative), but at most a tenth of the rows."""
    rounds: int = 1
    """N; above 1 the stage becomes a loop of select and tune."""
    quality: str | None = None
    """Column with each row's quality (> 0); empty: all alike (k-means-random)."""
    softmax: bool = False
    """Weigh rows by exp(quality) instead of quality."""
    share: Literal["auto", "size", "equal"] = "auto"
    """What a cluster gets in the first round: by its size, or the same for all; auto: size if it is the only round, else equal."""
    scorer: Literal["margin", "loss", "perplexity", "reward"] = "margin"
    """How chosen rows are scored between rounds."""
    prefer: Literal["high", "low"] = "high"
    """Which scores earn a cluster more rows."""
    rule: Literal["softmax", "memory"] = "softmax"
    """How scores become cluster weights."""
    embeddings: str | None = None
    """Column with vectors; empty: the model's own embeddings."""
    embedder: str | None = None
    """A helper, one of `models:` or a model to load that embeds the rows' texts in the run's model's place (minilm ...)."""
    text: Literal["prompt", "completion", "both"] = "prompt"
    """What is embedded."""
    restarts: int = 5
    """Of k-means."""
    max_new_tokens: int = 64
    """Length of the model's own answers (the paper: 512)."""

    toy: ClassVar[dict[str, Any]] = {"clusters": 3, "restarts": 1, "max_new_tokens": 4}

    def __post_init__(self) -> None:
        if min(self.clusters or 1, self.rounds, self.restarts, self.max_new_tokens) < 1 or self.clusters == 0:
            raise RecipeError("kmeans-quality needs clusters, rounds, restarts and max_new_tokens of at least 1.")

    def select(self, rows: Any, budget: int | float | str, ctx: Context | None = None) -> Picks:
        n = count(rows)
        total = budget_of(budget, n)
        number = 0 if ctx is None else min(ctx.round, self.rounds - 1)
        memory = self._memory(n, number, ctx)
        labels = memory["labels"] = self._labels(rows, n, ctx) if memory["labels"] is None else np.asarray(memory["labels"])
        k = int(labels.max()) + 1 if n else 0
        quality = np.ones(n) if self.quality is None else numbers(rows, self.quality, "quality")
        if (quality <= 0).any() and not self.softmax:
            raise RecipeError(f"The column '{self.quality}' holds qualities of 0 or below; set softmax: true or give positive ones.")
        rng = generator(ctx, "kmeans-quality", number)
        before = np.concatenate([np.zeros(0, np.int64), *(np.asarray(p) for p in memory["picks"])]).astype(np.int64)
        size = np.bincount(labels, minlength=k) - np.bincount(labels[before], minlength=k)
        due = max(0, round(total * (number + 1) / self.rounds) - len(before))
        weights = self._weights(rows, labels, before, k, ctx, memory)
        counts = self._first_counts(due, size) if not number else later_counts(due, size, weights, rng)
        fresh = kmeans_quality(labels, quality, counts, rng, before, self.softmax)
        memory["picks"], memory["weights"] = [*memory["picks"], fresh], [*memory["weights"], weights]
        why = {"clusters": k, "round": number, "new": len(fresh), "largest weight": float(weights.max()) if k else 0.0}
        return Picks(np.concatenate([before, fresh]), groups=labels, why=why)

    def _memory(self, n: int, number: int, ctx: Context | None) -> dict[str, Any]:
        """What earlier rounds left: clusters, and the picks and weights of each. A round that is repeated begins where it began."""
        kept: dict[str, Any] = {} if ctx is None or number == 0 else ctx.store.get("kmeans-quality", {})
        if number and (len(kept.get("picks", [])) < number or len(kept["labels"]) != n):
            raise RecipeError(f"Round {number + 1} of kmeans-quality needs the rounds before it on the same rows; run it within a recipe with `rounds: {self.rounds}`.")
        made = {"labels": kept.get("labels"), "picks": list(kept.get("picks", []))[:number], "weights": list(kept.get("weights", []))[:number]}
        if ctx is not None:
            ctx.store["kmeans-quality"] = made
        return made

    def _labels(self, rows: Any, n: int, ctx: Context | None) -> np.ndarray:
        k = self.clusters or max(1, min(512 if self.rounds > 1 else 1024, n // 10))
        vectors = embeddings(rows, ctx, self.embeddings, self.embedder, text=self.text)
        return kmeans(vectors, min(k, n), seed=0 if ctx is None else ctx.seed, restarts=self.restarts)[0]

    def _weights(self, rows: Any, labels: np.ndarray, before: np.ndarray, k: int, ctx: Context | None, memory: dict[str, Any]) -> np.ndarray:
        """Uniform in the first round, later by what the tuned model has yet to learn."""
        if not len(before) or ctx is None:
            return np.full(k, 1 / max(1, k))
        score = self._scores(list(Rows.of(rows).take(before)), ctx)
        return new_weights(labels, before, score if self.prefer == "high" else -score, k, memory["weights"][-1], self.rule)

    def _first_counts(self, due: int, size: np.ndarray) -> np.ndarray:
        equal = self.share == "equal" or (self.share == "auto" and self.rounds > 1)
        return spread(due, size, np.ones(len(size)) if equal else None)

    def _scores(self, rows: list[Any], ctx: Context) -> np.ndarray:
        """d_i of each row under the model tuned so far."""
        name = "round" if ctx.has_model("round") else "current"
        if self.scorer in ("loss", "perplexity"):
            return np.asarray(ctx.signal(self.scorer, rows, name), float)
        family: Any = ctx.model("round") if name == "round" else ctx.current
        prompts = [prompt_ids(r, family.tokenizer) for r in rows]
        own = [a[0] for a in family.generate(prompts, Decode(max_new_tokens=self.max_new_tokens))]
        if self.scorer == "reward":
            return _rewards(ctx, [answer_of(r) or "" for r in rows], rows) - _rewards(ctx, [a.text for a in own], rows)
        gold = -np.asarray(ctx.signal("loss", rows, name), float)
        return gold - own_log_probability(family, prompts, [a.ids for a in own])


def later_counts(due: int, size: np.ndarray, weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`due` cluster ids drawn from Categorical(weights) with replacement, capped at what is left of each; the rest is handed on."""
    drawn = np.minimum(rng.multinomial(due, weights), size)
    return drawn + spread(due - int(drawn.sum()), size - drawn, weights)


def own_log_probability(family: Any, prompts: list[Any], answers: list[np.ndarray]) -> np.ndarray:
    """Mean log p of each answer's tokens; 0 for an answer without any."""
    found = np.zeros(len(prompts))
    with family.evaluating():
        for start in range(0, len(prompts), 32):
            part = [answered(p, a) for p, a in zip(prompts[start : start + 32], answers[start : start + 32])]
            found[start : start + 32] = family.score(part).rows("mean").double().cpu().numpy()
    return found


def _rewards(ctx: Context, answers: list[str], rows: list[Any]) -> np.ndarray:
    """The helper's rewards; named parts add up."""
    given = ctx.helper("reward")(answers, rows)
    parts = list(given.values()) if isinstance(given, Mapping) else [given]
    total = np.sum([np.asarray(p, float) for p in parts], axis=0)
    if np.shape(total) != (len(rows),) or not np.isfinite(total).all():
        raise UserError("The helper 'reward' must give one finite number for every answer.")
    return total
