import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, roc_auc_score

from luthier.errors import RecipeError
from luthier.measure._shared import auroc, brier, ece, risk_coverage, wilson
from luthier.measure.calibration import Calibration, calibration


def data(n=500, seed=0):
    rng = np.random.default_rng(seed)
    p = rng.uniform(size=n)
    return p, (rng.uniform(size=n) < p).astype(float)


def test_against_scikit_learn():
    p, y = data()
    assert auroc(p, y) == pytest.approx(roc_auc_score(y, p))
    assert auroc(np.round(p, 1), y) == pytest.approx(roc_auc_score(y, np.round(p, 1)))
    assert brier(p, y) == pytest.approx(brier_score_loss(y, p))


def test_ece_of_known_cases():
    assert ece(np.full(10, 0.8), np.array([1] * 8 + [0] * 2)) == pytest.approx(0.32)  # ten bins of one row each
    assert ece(np.full(10, 0.8), np.array([1] * 8 + [0] * 2), bins=1) == pytest.approx(0.0)
    assert ece(np.full(10, 1.0), np.zeros(10), bins=5) == pytest.approx(1.0)
    p, y = data(20_000)
    assert ece(p, y) < 0.02


def test_risk_falls_with_confidence_and_ends_at_the_error_rate():
    p, y = data()
    coverage, risk = risk_coverage(p, y)
    assert coverage[-1] == 1 and risk[-1] == pytest.approx(1 - y.mean())
    assert risk[50] < risk[-1]


def test_one_class_has_no_auroc_and_bad_settings_are_refused():
    assert calibration(np.array([0.5, 0.6]), np.array([1, 1]))["auroc"] is None
    with pytest.raises(RecipeError, match="risk"):
        Calibration(risk=1.0)


def test_wilson_contains_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = [low <= 0.3 <= high for low, high in (wilson(rng.binomial(40, 0.3), 40) for _ in range(2000))]
    assert 0.93 <= np.mean(inside) <= 0.98
