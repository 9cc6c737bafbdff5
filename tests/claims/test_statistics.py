"""Intervals against scipy; the rate of false verdicts where there is no effect."""

import numpy as np
import pytest
from scipy import stats

from luthier.claims.statistics import Effect, paired, verdict


@pytest.mark.parametrize("n", [2, 3, 5, 9])
def test_the_interval_is_scipys_paired_one(n):
    rng = np.random.default_rng(n)
    a, b = rng.normal(0.5, 0.1, n), rng.normal(0.4, 0.1, n)
    wanted = stats.ttest_rel(a, b).confidence_interval(0.95)
    found = paired(a, b)
    assert (found.mean, found.low, found.high) == pytest.approx(((a - b).mean(), wanted.low, wanted.high))
    assert found.n == n
    lower = paired(a, b, better="lower")
    assert (lower.low, lower.high) == pytest.approx((-wanted.high, -wanted.low))


@pytest.mark.parametrize("n", [3, 5])
@pytest.mark.parametrize("shape", ["normal", "uniform", "binomial"])
def test_without_an_effect_about_one_in_twenty_verdicts_is_wrong(n, shape):
    """Both directions together: `reproduced`, or its opposite with the interval beyond zero."""
    rng = np.random.default_rng(7)
    draw = {"normal": lambda: rng.normal(0, 0.05, (4000, n)), "uniform": lambda: rng.uniform(-0.1, 0.1, (4000, n)), "binomial": lambda: rng.binomial(200, 0.5, (4000, n)) / 200}[shape]
    wrong = 0
    for a, b in zip(draw(), draw()):
        if np.ptp(a - b) == 0:
            continue
        effect = paired(a, b)
        wrong += effect.low > 0 or effect.high < 0
    assert 0.035 < wrong / 4000 < 0.065


def test_an_effect_is_found_and_its_opposite_refuted():
    rng = np.random.default_rng(0)
    right = against = 0
    for _ in range(300):
        base = rng.normal(0.5, 0.1, 5)
        better, worse = base + rng.normal(0.1, 0.02, 5), base + rng.normal(-0.1, 0.02, 5)
        right += verdict(paired(better, base), 0.02) == "reproduced"
        against += verdict(paired(worse, base), 0.02) == "not reproduced"
    assert right > 290 and against > 290


def test_the_verdict_by_its_definition():
    assert verdict(Effect(0.1, 0.01, 0.2, 3), 0.02) == "reproduced"
    assert verdict(Effect(-0.1, -0.2, -0.01, 3), 0.02) == "not reproduced"
    assert verdict(Effect(0.0, -0.01, 0.015, 3), 0.02) == "not reproduced"
    assert verdict(Effect(0.0, -0.01, 0.03, 3), 0.02) == "unclear"
    assert verdict(Effect(0.1, 0.05, 0.2, 2), 0.02) == "unclear"
    # no worse by more than 0.05
    assert verdict(Effect(-0.02, -0.04, 0.01, 3), 0.02, at_least=-0.05) == "reproduced"
    assert verdict(Effect(-0.1, -0.12, -0.08, 3), 0.02, at_least=-0.05) == "not reproduced"


def test_bad_values_are_refused():
    with pytest.raises(ValueError, match="not a number"):
        paired([0.1, float("nan"), 0.3], [0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="paired"):
        paired([0.1, 0.2], [0.1])
    with pytest.raises(ValueError, match="two or more"):
        paired([0.1], [0.1])
