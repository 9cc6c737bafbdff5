"""Diversify and Conquer: Diversity-Centric Data Selection with Iterative Refinement (paper 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from luthier.catalog import register
from luthier.core.neighbours import kmeans
from luthier.errors import RecipeError
from luthier.select import Picks, Selector, budget_of
from luthier.select._shared import embeddings, generator, gumbel_top_k, numbers, spread

if TYPE_CHECKING:
    from luthier.core.context import Context


def kmeans_quality(labels: Any, quality: Any, counts: Any, rng: np.random.Generator, used: Any = (), softmax: bool = False) -> np.ndarray:
    """From every cluster its count of rows not yet used, drawn without replacement with p_i = q_i / sum q (or softmax(q))."""
    labels, quality = np.asarray(labels), np.asarray(quality, float)
    free = np.ones(len(labels), bool)
    free[np.asarray(list(used), dtype=np.int64)] = False
    logits = quality if softmax else np.log(np.maximum(quality, 1e-300))
    chosen = []
    for cluster, count in enumerate(np.asarray(counts)):
        members = np.flatnonzero((labels == cluster) & free)
        chosen.append(members[gumbel_top_k(logits[members], int(min(count, len(members))), rng)])
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
    over rounds; after each the model is tuned from the base on all rows chosen so far, those rows are scored, and clusters where the given answer clearly
    beats the model's own get more of the next round. Scorers: `margin`, mean log p of the given answer minus that of the model's own greedy
    answer; `loss`, its mean token loss; or the helper `reward`(prompt, answer), gold minus own. Counts always add up to the budget: what a small cluster cannot give is
    handed on (the release draws too few clusters and misses its budget). The weights follow the release's softmax; `rule: memory` is the paper's formula,
    uncertain in its normalisation. Rounds restart from the base."""

    clusters: int = 64
    """K; the paper takes 512 (iterative) or 1024 (static) for pools of hundreds of thousands."""
    rounds: int = 1
    """N; above 1 the stage becomes a loop of select and tune."""
    quality: str | None = None
    """Column with each row's quality (> 0); empty: all alike (k-means-random)."""
    softmax: bool = False
    """Weigh rows by exp(quality) instead of quality."""
    share: Literal["size", "equal"] = "size"
    """What a cluster gets in the first round: by its size, or the same for all."""
    scorer: Literal["margin", "loss", "reward"] = "margin"
    """How chosen rows are scored between rounds."""
    rule: Literal["softmax", "memory"] = "softmax"
    """How scores become cluster weights."""
    embeddings: str | None = None
    """Column with vectors; empty: the model's own embeddings."""
    text: Literal["prompt", "completion", "both"] = "prompt"
    """What the model embeds."""
    restarts: int = 5
    """Of k-means."""
    max_new_tokens: int = 64
    """Length of the model's own answers (the paper: 512)."""

    toy: ClassVar[dict[str, Any]] = {"clusters": 3, "restarts": 1, "max_new_tokens": 4}

    def __post_init__(self) -> None:
        if self.clusters < 1 or self.rounds < 1 or self.restarts < 1 or self.max_new_tokens < 1:
            raise RecipeError("kmeans-quality needs clusters, rounds, restarts and max_new_tokens of at least 1.")

    def select(self, rows: Any, budget: int | float | str, ctx: Context | None = None) -> Picks:
        n = len(rows)
        total = budget_of(budget, n)
        memory: dict[str, Any] = {} if ctx is None else ctx.store.setdefault("kmeans-quality", {})
        labels = self._labels(rows, ctx, memory)
        k = int(labels.max()) + 1 if n else 0
        quality = np.ones(n) if self.quality is None else numbers(rows, self.quality, "quality")
        if (quality <= 0).any() and not self.softmax:
            raise RecipeError(f"The column '{self.quality}' holds qualities of 0 or below; set softmax: true or give positive ones.")
        number = 0 if ctx is None else ctx.round
        rng = generator(ctx, "kmeans-quality", number)
        before = np.asarray(memory.get("chosen", []), dtype=np.int64)
        size = np.bincount(labels, minlength=k) - np.bincount(labels[before], minlength=k)
        due = total if number + 1 >= self.rounds else round(total * (number + 1) / self.rounds)
        weights = self._weights(rows, labels, before, k, ctx, memory)
        counts = self._counts(max(0, due - len(before)), size, weights, rng, first=number == 0)
        fresh = kmeans_quality(labels, quality, counts, rng, before, self.softmax)
        chosen = np.concatenate([before, fresh])
        memory |= {"chosen": chosen, "weights": weights}
        return Picks(chosen, groups=labels, why={"clusters": k, "round": number, "new": len(fresh), "largest weight": float(weights.max()) if k else 0.0})

    def _labels(self, rows: Any, ctx: Context | None, memory: dict[str, Any]) -> np.ndarray:
        if "labels" in memory and len(memory["labels"]) == len(rows):
            return np.asarray(memory["labels"])
        vectors = embeddings(rows, ctx, self.embeddings, text=self.text) if self.embeddings is None else embeddings(rows, ctx, self.embeddings)
        labels, _ = kmeans(vectors, min(self.clusters, len(rows)), seed=0 if ctx is None else ctx.seed, restarts=self.restarts)
        memory["labels"] = labels
        return labels

    def _weights(self, rows: Any, labels: np.ndarray, before: np.ndarray, k: int, ctx: Context | None, memory: dict[str, Any]) -> np.ndarray:
        """Uniform in the first round, later by what the tuned model has yet to learn."""
        if not len(before) or ctx is None:
            return np.full(k, 1 / max(1, k))
        margin = self._margins([rows[int(i)] for i in before], ctx)
        return new_weights(labels, before, margin, k, memory.get("weights"), self.rule)

    def _counts(self, due: int, size: np.ndarray, weights: np.ndarray, rng: np.random.Generator, first: bool) -> np.ndarray:
        if first:
            return spread(due, size, None if self.share == "size" else np.ones(len(size)))
        drawn = np.minimum(rng.multinomial(due, weights), size)
        left = due - int(drawn.sum())
        return drawn + spread(left, size - drawn, weights)

    def _margins(self, rows: list[Any], ctx: Context) -> np.ndarray:
        """d_i of each row under the model tuned so far: how much better the given answer is than the model's own."""
        from luthier.core.rows import answer_of

        name = "round" if ctx.has_model("round") else "current"
        if self.scorer == "loss":
            return np.asarray(ctx.signal("loss", rows, name), float)
        family: Any = ctx.model("round") if name == "round" else ctx.current
        own = self._own_answers(rows, family)
        if self.scorer == "reward":
            reward = ctx.helper("reward")
            return np.array([float(reward(r, answer_of(r))) - float(reward(r, a)) for r, a in zip(rows, own)])
        pairs = [{**r, "completion": a} if "completion" in r else r for r, a in zip(rows, own)]
        with family.evaluating():
            gold, mine = (np.concatenate([family.score(family.collate(part[i : i + 32], train_on=ctx.train_on)).rows("mean").double().cpu().numpy() for i in range(0, len(part), 32)]) for part in (rows, pairs))
        return gold - mine

    def _own_answers(self, rows: list[Any], family: Any) -> list[str]:
        from luthier.core.families import Decode
        from luthier.core.rows import answer_of, prompt_ids

        prompts = [prompt_ids(r, family.tokenizer) for r in rows]
        replies = family.generate(prompts, Decode(max_new_tokens=self.max_new_tokens))
        return [a[0].text or answer_of(r) or "" for a, r in zip(replies, rows)]
