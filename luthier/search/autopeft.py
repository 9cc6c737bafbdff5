"""AutoPEFT: Automatic Configuration Search for Parameter-Efficient Fine-Tuning (paper 56)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from luthier.catalog import register
from luthier.errors import RecipeError, UserError, nearest
from luthier.search import Searcher
from luthier.search._shared import Point, Space, knee, once, pareto

if TYPE_CHECKING:
    from luthier.core.context import Context


def copula(values: np.ndarray) -> np.ndarray:
    """Each column through its empirical distribution function, kept away from 0 and 1, then the inverse normal."""
    from scipy.stats import norm, rankdata

    v = np.asarray(values, float)
    n = len(v)
    return norm.ppf(np.clip(rankdata(v, axis=0) / (n + 1), 1 / (2 * n), 1 - 1 / (2 * n)))


def autopeft(codes: np.ndarray, values: np.ndarray, levels: list[np.ndarray], q: int = 4, surrogate: str = "gp", reference: np.ndarray | None = None, seed: int = 0) -> np.ndarray:
    """The next `q` codes worth trying, given tried `codes` [n, d] and their `values` [n, m], all to be maximised.

    Targets pass the copula; one Gaussian process a target (MAP fit, or the fully Bayesian SAAS prior with NUTS: 128 warm-up, 64 samples,
    thinning 4); noisy expected hypervolume improvement above the reference (the nadir, passed through the same transform), or noisy expected improvement for one
    target; maximised by local search over the discrete choices."""
    try:
        import torch
        from botorch.acquisition.logei import qLogNoisyExpectedImprovement
        from botorch.acquisition.multi_objective import logei
        from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
        from botorch.optim.optimize import optimize_acqf_discrete_local_search
    except ImportError as error:
        raise UserError("autopeft's Gaussian processes need botorch: pip install 'luthier[search]'; or set surrogate: random.") from error
    logei._load_attempted = True  # it would compile a kernel for a minute, and wait for ever on a build that somebody killed
    x = torch.tensor(codes, dtype=torch.double)
    stacked = values if reference is None else np.vstack([values, reference])
    mapped = copula(stacked)
    y, floor = mapped[: len(values)], (mapped[-1] if reference is not None else mapped.min(0) - 0.1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _surrogates(x, torch.tensor(y, dtype=torch.double), surrogate)
        acquire: Any
        if y.shape[1] == 1:
            acquire = qLogNoisyExpectedImprovement(model, x)
        else:
            acquire = qLogNoisyExpectedHypervolumeImprovement(model, ref_point=floor.tolist(), X_baseline=x, prune_baseline=True)
        choices = [torch.tensor(level, dtype=torch.double) for level in levels]
        found, _ = optimize_acqf_discrete_local_search(acquire, q=q, discrete_choices=choices, num_restarts=10, raw_samples=256, X_avoid=x, unique=True)
    return found.numpy()


def _surrogates(x: Any, y: Any, kind: str) -> Any:
    from botorch.fit import fit_fully_bayesian_model_nuts, fit_gpytorch_mll
    from botorch.models import ModelListGP, SingleTaskGP
    from botorch.models.fully_bayesian import SaasFullyBayesianSingleTaskGP
    from gpytorch.mlls import ExactMarginalLogLikelihood

    models = []
    for column in range(y.shape[1]):
        if kind == "saas":
            model = SaasFullyBayesianSingleTaskGP(x, y[:, column : column + 1])
            fit_fully_bayesian_model_nuts(model, warmup_steps=128, num_samples=64, thinning=4, disable_progbar=True)
        else:
            model = SingleTaskGP(x, y[:, column : column + 1])
            fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
        models.append(model)
    return models[0] if len(models) == 1 else ModelListGP(*models)


@register("autopeft", paper=56)
@dataclass
class AutoPEFT(Searcher):
    """Search recipes for the best trade of quality against size: Bayesian optimisation that returns a Pareto set and recommends its knee.

    The space is the recipe's `space:`; with adapter sizes that may be 0 and one switch a layer it is the paper's. Random points first, then
    batches chosen by noisy expected hypervolume improvement on one Gaussian process an objective. The paper uses 200 evaluations, 100 of them random, batches of 4 and
    SAAS priors; the default here is a MAP-fitted process and a quarter of that (NUTS takes minutes a refit on a laptop). Every point is a
    run of its own, kept, and never tried twice. Score on validation rows, never on test rows."""

    trials: int = 48
    """Evaluations in all."""
    initial: int = 16
    """Random ones among them."""
    batch: int = 4
    """Points chosen at a time."""
    maximise: list[str] | None = None
    """Metrics to raise; empty: the task's score."""
    minimise: list[str] | None = None
    """Metrics to lower; empty: the share of trained parameters, where it is measured."""
    surrogate: Literal["gp", "saas", "random"] = "gp"
    """Gaussian process by MAP, with the SAAS prior, or random search (the baseline)."""
    recommend: Literal["knee", "best"] = "knee"
    """Which Pareto point comes first: the knee, or the best in the first metric."""
    budget: float | None = None
    """Among points whose first lowered metric is at most this."""
    reference: dict[str, float] | None = None
    """Worst acceptable value of each metric; empty: the worst seen."""
    seed: int = 42
    """Of the random points and the local search."""

    toy = {"trials": 2, "initial": 2, "surrogate": "random"}

    def __post_init__(self) -> None:
        if self.trials < 1 or self.initial < 1 or self.batch < 1:
            raise RecipeError("autopeft needs trials, initial and batch of at least 1.")

    def search(self, space: Mapping[str, list[Any]], trial: Callable[[Point], Mapping[str, float]], ctx: Context | None = None) -> list[Point]:
        where, ask = Space(space), once(trial)
        rng = np.random.default_rng(self.seed)
        tried: list[Point] = []
        metrics: list[Mapping[str, float]] = []

        def evaluate(points: list[Point]) -> None:
            for point in points:
                if point not in tried and len(tried) < min(self.trials, where.size):
                    metrics.append(ask(point))
                    tried.append(point)

        total = min(self.trials, where.size)
        while len(tried) < min(self.initial, total):
            evaluate([where.draw(rng)])
        while len(tried) < total:
            before = len(tried)
            if self.surrogate != "random":
                codes = np.stack([where.encode(p) for p in tried])
                found = autopeft(codes, self._values(metrics), where.levels(), min(self.batch, total - before), self.surrogate, self._floor(metrics), self.seed + before)
                evaluate([where.decode(c) for c in found])
            if len(tried) == before:
                evaluate([where.draw(rng)])
        return self._front(tried, metrics)

    def _names(self, metrics: list[Mapping[str, float]]) -> tuple[list[str], list[str]]:
        known = list(metrics[0])
        up = self.maximise or [n for n in known if n in ("score", "task/exact_match", "task/accuracy", "task/score", "task/recall_at_1", "task/pair_accuracy")][:1]
        down = self.minimise if self.minimise is not None else [n for n in known if n in ("parameters", "trained_share")][:1]
        for name in (*up, *down):
            if name not in known:
                raise RecipeError(f"The trials do not measure '{name}'.{nearest(name, known)} They measure: {', '.join(sorted(known))}.")
        if not up:
            raise RecipeError(f"autopeft does not know what to maximise; set maximise to one of: {', '.join(sorted(known))}.")
        return up, down

    def _values(self, metrics: list[Mapping[str, float]]) -> np.ndarray:
        up, down = self._names(metrics)
        return np.array([[float(m[n]) for n in up] + [-float(m[n]) for n in down] for m in metrics])

    def _floor(self, metrics: list[Mapping[str, float]]) -> np.ndarray | None:
        if self.reference is None:
            return None
        up, down = self._names(metrics)
        missing = [n for n in (*up, *down) if n not in self.reference]
        if missing:
            raise RecipeError(f"autopeft.reference lacks '{missing[0]}'.")
        return np.array([self.reference[n] for n in up] + [-self.reference[n] for n in down])

    def _front(self, tried: list[Point], metrics: list[Mapping[str, float]]) -> list[Point]:
        """The Pareto set, the recommended point first."""
        values = self._values(metrics)
        allowed = np.ones(len(values), bool)
        down = self._names(metrics)[1]
        if self.budget is not None and down:
            allowed = -values[:, len(values[0]) - len(down)] <= self.budget
            if not allowed.any():
                raise UserError(f"No tried point keeps {down[0]} at or below {self.budget}.")
        index = np.flatnonzero(allowed)
        front = index[pareto(values[index])]
        first = index[knee(values[index])] if self.recommend == "knee" else front[int(values[front, 0].argmax())]
        order = [int(first), *sorted((int(i) for i in front if i != first), key=lambda i: -values[i, 0])]
        return [{**tried[i], "metrics": dict(metrics[i])} for i in order]
