"""Language Model Cascades: Token-level uncertainty and beyond (paper 64)."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch

from luthier.catalog import register
from luthier.core.batch import Sequence
from luthier.core.verify import verifier
from luthier.decode import Decoder
from luthier.decode._shared import Answer, Decode, Wrapped, answered, main_model, other_model
from luthier.errors import DataError, RecipeError

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import CausalLM, Family

LEVELS = (0.0, 0.01, 0.05, *(round(i / 10, 1) for i in range(1, 10)), 0.95, 0.99, 1.0)
Score = Literal["chow-sum", "chow-average", "chow-quantile", "post-hoc"]


def cascade(logps: SequenceOf[np.ndarray], score: Score = "chow-quantile", quantile: float = 0.0) -> np.ndarray:
    """How doubtful each answer is from its token log-probabilities; larger means defer.

    chow-sum: -sum_i p_i; chow-average: its mean; chow-quantile: minus the `quantile` of {p_i}, 0 the least certain token, 1 the most
    certain. An answer without tokens is certain (0)."""
    reduce: Any = {"chow-sum": np.sum, "chow-average": np.mean, "chow-quantile": lambda p: np.quantile(p, quantile)}[score]
    return np.array([-float(reduce(np.asarray(p, float))) if len(p) else 0.0 for p in logps])


def quantile_features(logps: SequenceOf[np.ndarray]) -> np.ndarray:
    """[answers, 18]: the quantiles of each answer's token log-probabilities (finer at the ends), their sum, mean and number."""
    rows = []
    for p in logps:
        p = np.asarray(p, float) if len(p) else np.zeros(1)
        rows.append([*np.quantile(p, LEVELS), p.sum(), p.mean(), float(len(p))])
    return np.array(rows)


def deferral_curve(doubt: np.ndarray, small: np.ndarray, large: np.ndarray, rates: SequenceOf[float] = tuple(np.linspace(0, 1, 21)), seed: int = 0) -> np.ndarray:
    """Quality of the cascade when the most doubtful share of each rate is deferred. Ties in doubt are broken by chance."""
    doubt, small, large = (np.asarray(x, float) for x in (doubt, small, large))
    order = np.lexsort((np.random.default_rng(seed).random(len(doubt)), -doubt))
    gain = np.concatenate([[0.0], np.cumsum((large - small)[order])])
    return np.array([(small.sum() + gain[round(r * len(doubt))]) / len(doubt) for r in rates])


def area(curve: np.ndarray) -> float:
    """Area under a deferral curve on evenly spaced rates, by trapezoids (AUC-DF)."""
    return float(np.trapezoid(curve, np.linspace(0, 1, len(curve))))


class PostHocRule:
    """A small learnt rule on the quantile features (and embeddings, if given): predicts what deferring gains.

    "mlp": two hidden layers of 32 (ReLU); "linear": ridge or logistic regression (classes balanced); "boosting": gradient-boosted trees."""

    def __init__(self, learner: Literal["mlp", "boosting", "linear"] = "mlp", target: Literal["difference", "better", "wrong"] = "difference", seed: int = 0) -> None:
        self.learner, self.target, self.seed = learner, target, seed

    def fit(self, features: np.ndarray, small: np.ndarray, large: np.ndarray) -> PostHocRule:
        """From qualities of both models on rows that neither was trained on."""
        from sklearn.preprocessing import StandardScaler

        small, large = np.asarray(small, float), np.asarray(large, float)
        wanted = {"difference": large - small, "better": (large > small).astype(float), "wrong": (small < 0.5).astype(float)}[self.target]
        self.scale = StandardScaler().fit(features)
        x = self.scale.transform(features)
        self.constant = float(wanted[0]) if np.ptp(wanted) == 0 else None
        if self.constant is None:
            rarest = len(wanted) if self.target == "difference" else int(np.bincount(wanted.astype(int)).min())
            self.model = self._learner(len(wanted) >= 100 and rarest >= 20).fit(x, wanted if self.target == "difference" else wanted.astype(int))
        return self

    def _learner(self, enough: bool) -> Any:
        """`enough` rows to hold some out, on which the network's training stops."""
        from sklearn.ensemble import GradientBoostingClassifier, GradientBoostingRegressor
        from sklearn.linear_model import LogisticRegression, Ridge
        from sklearn.neural_network import MLPClassifier, MLPRegressor

        number = self.target == "difference"
        if self.learner == "linear":
            return Ridge() if number else LogisticRegression(max_iter=1000, class_weight="balanced")
        if self.learner == "boosting":
            return (GradientBoostingRegressor if number else GradientBoostingClassifier)(random_state=self.seed)
        return (MLPRegressor if number else MLPClassifier)(hidden_layer_sizes=(32, 32), alpha=1e-2, max_iter=500, early_stopping=enough, random_state=self.seed)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Doubt of each answer: the predicted gain, or the probability that deferring is right."""
        if self.constant is not None:
            return np.full(len(features), self.constant)
        x = self.scale.transform(features)
        return self.model.predict(x) if self.target == "difference" else self.model.predict_proba(x)[:, 1]


class Cascaded(Wrapped):
    """The small model answers; doubtful prompts go to the large one."""

    def __init__(self, small: CausalLM, large: CausalLM, method: Cascade) -> None:
        super().__init__(small, [large])
        self.large, self.method = large, method
        self.rule: PostHocRule | None = None
        self.quantile = 0.0 if method.quantile is None else method.quantile
        self.threshold: float | None = method.threshold

    def generate(self, prompts: SequenceOf[Any], decode: Decode | None = None, n: int = 1, batch: int = 32) -> list[list[Answer]]:
        """The first of a prompt's `n` answers decides where the prompt goes."""
        answers = self.inner.generate(prompts, decode, n, batch)
        doubt = self.doubt(prompts, [a[0].ids for a in answers])
        deferred = self._defer(doubt)
        chosen = np.flatnonzero(deferred).tolist()
        better = self.large.generate([prompts[i] for i in chosen], decode, n, batch) if chosen else []
        for i, group in zip(chosen, better):
            answers[i] = group
        for i, group in enumerate(answers):
            for answer in group:
                answer.info |= {"doubt": float(doubt[i]), "deferred": bool(deferred[i])}
        return answers

    def _defer(self, doubt: np.ndarray) -> np.ndarray:
        """The threshold where there is one, else exactly the most doubtful `rate` of these prompts, ties by chance."""
        if self.threshold is not None:
            return doubt > self.threshold
        out = np.zeros(len(doubt), bool)
        order = np.lexsort((np.random.default_rng(self.method.seed).random(len(doubt)), -doubt))
        out[order[: round(self.method.rate * len(doubt))]] = True
        return out

    def doubt(self, prompts: SequenceOf[Any], answers: SequenceOf[np.ndarray]) -> np.ndarray:
        """The deferral score of the small model's own answers."""
        sequences = self._answered(prompts, answers)
        logps = self._logps(sequences)
        if self.method.score != "post-hoc":
            return cascade(logps, self.method.score, self.quantile)
        if self.rule is None:
            raise RecipeError("The post-hoc rule of 'cascade' is learnt on validation rows; add `data: {val: FILE}`.")
        return self.rule(self._features(logps, sequences, prompts))

    def _answered(self, prompts: SequenceOf[Any], answers: SequenceOf[np.ndarray]) -> list[Sequence]:
        return [answered(self._prompt_ids(p), a) for p, a in zip(prompts, answers)]

    def _logps(self, sequences: list[Sequence]) -> list[np.ndarray]:
        """The small model's log-probabilities of each answer's tokens."""
        found: list[np.ndarray] = []
        with self.inner.evaluating():
            for part in _parts(sequences):
                scores = self.inner.score(part)
                logp, owner = scores.logp.double().cpu().numpy(), scores.sequence.cpu().numpy()
                found += [logp[owner == i] for i in range(len(part))]
        return found

    def _features(self, logps: list[np.ndarray], sequences: list[Sequence], prompts: SequenceOf[Any]) -> np.ndarray:
        """What the post-hoc rule reads."""
        parts = [quantile_features(logps)]
        with self.evaluating():
            if self.method.embed in ("small", "both"):
                parts.append(np.concatenate([self.inner.embed(part).double().cpu().numpy() for part in _parts(sequences)]))
            if self.method.embed == "both":
                ids = [self.large._prompt_ids(p) for p in prompts]
                parts.append(np.concatenate([_first_state(self.large, part) for part in _parts(ids)]))
        return np.concatenate(parts, 1)

    def fit(self, rows: SequenceOf[Mapping[str, Any]], verify: Any = "exact") -> Cascaded:
        """Learn the rule (where the score is post-hoc), choose the quantile (where none is given), and set the threshold so that `rate` of
        these rows would be deferred. The rows must be new to the small model: it is too sure of what it was trained on."""
        from luthier.core.rows import prompt_ids

        if not len(rows):
            raise DataError("'cascade' was given no validation rows to learn from.")
        m = self.method
        prompts = [prompt_ids(r, self.tokenizer) for r in rows]
        decode = Decode(max_new_tokens=m.max_new_tokens)
        own = self.inner.generate(prompts, decode)
        answers = [a[0].ids for a in own]
        if m.score == "post-hoc" or (m.score == "chow-quantile" and m.quantile is None):
            check = verifier(verify)
            theirs = self.large.generate(prompts, decode)
            small, large = (np.array([check(a[0].text, r).score for a, r in zip(found, rows)]) for found in (own, theirs))
            sequences = self._answered(prompts, answers)
            logps = self._logps(sequences)
            if m.score == "post-hoc":
                self.rule = PostHocRule(m.learner, m.target, m.seed).fit(self._features(logps, sequences, prompts), small, large)
            else:
                self.quantile = best_quantile(logps, small, large, m.seed)
        if m.threshold is None and 0 < m.rate < 1:
            self.threshold = float(np.quantile(self.doubt(prompts, answers), 1 - m.rate))
        return self


def best_quantile(logps: SequenceOf[np.ndarray], small: np.ndarray, large: np.ndarray, seed: int = 0) -> float:
    """Of 0, 0.1, ..., 1 the quantile with the largest area under the deferral curve."""
    found = [area(deferral_curve(cascade(logps, "chow-quantile", q / 10), small, large, seed=seed)) for q in range(11)]
    return int(np.argmax(found)) / 10


def _parts(items: SequenceOf[Any], size: int = 32) -> list[Any]:
    return [items[i : i + size] for i in range(0, len(items), size)]


class _Enough(Exception):
    """The state that was wanted is there; the rest of the forward pass is not needed."""


def _first_state(model: CausalLM, prompts: SequenceOf[np.ndarray]) -> np.ndarray:
    """A cheap early feature of the large model: the output of its first block at the prompt's last token."""
    from luthier.core.batch import TokenForest
    from luthier.core.hooks import tap
    from luthier.core.modelmap import ModelMap

    site = ModelMap(model.network).blocks[0][0]
    forest = TokenForest.pack([Sequence(p, np.zeros(len(p), bool)) for p in prompts], share=False, pad=model.pad_id)

    def stop(value: torch.Tensor, site: str) -> None:
        raise _Enough

    with torch.no_grad(), tap(model.network, [site], edit=stop) as seen, suppress(_Enough):
        model.hidden(forest)
    return seen[site].detach().flatten(0, 1)[forest.last().to(model.device)].double().cpu().numpy()


@register("cascade", paper=64)
@dataclass
class Cascade(Decoder):
    """A small model answers and sends what it doubts to a large one, judging itself token by token.

    The wrapped model is the small one; `large` names the other under `models:`. Doubt: the sum (over-defers long answers), the mean, or a quantile of the
    answer's token log-probabilities (0: its least certain token), the end token included; or a rule learnt on validation rows from all quantiles, the
    sum, the mean and the length, optionally with the small model's mean state and the large one's first block at the prompt's last token (the paper uses
    decoder states; which layer is our choice). The rule predicts the difference of the two models' quality by squared loss. With validation rows the threshold is
    set there so that `rate` of them would be deferred; without, the most doubtful `rate` of the prompts asked together are. Cost: small + rate x large."""

    large: str = "large"
    """The large model's name under `models:`."""
    score: Literal["chow-sum", "chow-average", "chow-quantile", "post-hoc"] = "chow-quantile"
    """How doubt is measured."""
    quantile: float | None = 0.0
    """Which quantile; the best is task dependent, null: chosen on validation rows."""
    rate: float = 0.3
    """Share of prompts that are deferred; 0 is the small model alone, 1 the large one."""
    threshold: float | None = None
    """Defer above this doubt, instead of a share."""
    embed: Literal["none", "small", "both"] = "none"
    """Hidden states that the learnt rule may read as well."""
    learner: Literal["mlp", "boosting", "linear"] = "mlp"
    """What the rule is."""
    target: Literal["difference", "better", "wrong"] = "difference"
    """What it predicts: how much better the large model is, whether it is, or whether the small one is wrong."""
    verify: str = "exact"
    """Which verifier judges answers to validation rows."""
    max_new_tokens: int = 48
    """Length of answers to validation rows."""
    seed: int = 0
    """Breaks ties and starts the rule."""

    families = frozenset({"causal-lm"})
    toy_models: ClassVar[tuple[str, ...]] = ("large",)
    toy: ClassVar[dict[str, Any]] = {"max_new_tokens": 4}

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1 or not 0 <= (self.quantile or 0) <= 1:
            raise RecipeError(f"cascade.rate and cascade.quantile are between 0 and 1, not {self.rate} and {self.quantile}.")

    def wrap(self, models: Mapping[str, Family] | Family, ctx: Context | None = None) -> Family:
        small = main_model(models, "cascade")
        made = Cascaded(small, other_model(models, self.large, ctx, "cascade"), self)
        if ctx is not None and ctx.has_rows("val"):
            made.fit(list(ctx.rows("val")), self.verify)
        elif ctx is not None and (self.score == "post-hoc" or (self.score == "chow-quantile" and self.quantile is None)):
            what = "post-hoc rule" if self.score == "post-hoc" else "quantile"
            raise RecipeError(f"The {what} of 'cascade' is learnt on validation rows; add `data: {{val: FILE}}`.")
        return made
