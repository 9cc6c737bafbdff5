"""What a claim's numbers say: paired differences over seeds, their t-interval, and the verdict.

d_s = better-signed (method_s - baseline_s). The interval is mean +- t(0.975, n-1) * sd / sqrt(n). A percentile bootstrap over three
to five seeds would give false verdicts far more often than one time in twenty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["reproduced", "not reproduced", "unclear"]


@dataclass(frozen=True)
class Effect:
    """A mean paired difference with its 95 % interval, positive where the method is better."""

    mean: float
    low: float
    high: float
    n: int


def paired(method: Sequence[float], baseline: Sequence[float], better: str = "higher", confidence: float = 0.95) -> Effect:
    """The effect from the values of two arms, seed by seed."""
    from scipy.stats import t

    if len(method) != len(baseline):
        raise ValueError(f"{len(method)} values of the method cannot be paired with {len(baseline)} of the baseline.")
    if len(method) < 2:
        raise ValueError("An interval needs two or more seeds.")
    sign = 1.0 if better == "higher" else -1.0
    differences = [sign * (float(a) - float(b)) for a, b in zip(method, baseline)]
    if not all(map(math.isfinite, differences)):
        raise ValueError("A value is not a number; it cannot be averaged away.")
    n = len(differences)
    mean = sum(differences) / n
    variance = sum((d - mean) ** 2 for d in differences) / (n - 1)
    half = float(t.ppf(0.5 + confidence / 2, n - 1)) * math.sqrt(variance / n)
    return Effect(mean, mean - half, mean + half, n)


def verdict(effect: Effect, smallest: float, at_least: float = 0.0) -> Verdict:
    """`reproduced`: the interval lies above `at_least`. `not reproduced`: it lies below it, or within `smallest` of it. Else `unclear`.

    Nobody may look at a few seeds and then add more until a verdict comes, so fewer than three give none."""
    if effect.n < 3:
        return "unclear"
    low, high = effect.low - at_least, effect.high - at_least
    if low > 0:
        return "reproduced"
    return "not reproduced" if high < 0 or (-smallest < low and high < smallest) else "unclear"
