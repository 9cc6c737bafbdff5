import numpy as np
import pytest

from luthier.core.context import Context
from luthier.core.rows import Rows
from luthier.curate.clear import Clear, clear, corrected, verdict
from luthier.errors import RecipeError
from tests.helpers import tiny_llama

ROWS = [{"prompt": f"w{i}", "completion": f"w{i + 1}"} for i in range(6)]


def test_the_median_keeps_the_upper_half():
    for n in (6, 7):
        c = np.random.default_rng(n).permutation(n) / n
        kept = clear(c)
        assert len(kept) == n // 2 and c[kept].min() > np.median(c)
    assert clear(np.array([0.2, 0.9, 0.5]), gamma=0.4).tolist() == [1, 2]


def test_eta_one_changes_nothing():
    assert corrected(ROWS, ["x"] * 6, np.ones(6), eta=1.0) == ROWS
    out = corrected(ROWS, ["x"] * 6, np.array([0.9, 0.1, 0.8, 0.81, 0, 1]), eta=0.8)
    assert [r["completion"] == "x" for r in out] == [True, False, False, True, False, True]


def test_filtering_rows_of_a_model():
    ctx = Context(tiny_llama())
    rows = Rows.of(ROWS)
    method = Clear(measure_options={"samples": 2, "max_new_tokens": 3, "reflection": "probability"})
    kept = method.curate(rows, ctx)
    assert 0 < len(kept) <= 3 and method.report["rows"] == 6
    assert all(dict(k) in ROWS for k in kept)


@pytest.mark.parametrize("judge", ["likelihood", "ask"])
def test_correcting_takes_the_tuned_models_answers_and_the_bases_verdict(judge):
    base, tuned = tiny_llama(seed=0), tiny_llama(seed=3)
    ctx = Context(tuned, models={"base": base, "previous": tuned})
    method = Clear(stage="correct", judge=judge, eta=0.0, samples=1, max_new_tokens=3)
    out = method.curate(ROWS, ctx)
    assert len(out) == 6 and method.report["replaced"] <= method.report["proposals that differ"]
    assert all(r["completion"] == g["completion"] for r, g in zip(Clear(stage="correct", judge=judge, eta=1.0, samples=1, max_new_tokens=3).curate(ROWS, ctx), ROWS))


def test_verdicts_are_read():
    assert [verdict(t) for t in ("A", "b.", "(A)", "tie", "Answer", "")] == [0, 1, 0, None, None, None]


def test_bad_input():
    with pytest.raises(RecipeError, match="eta"):
        Clear(eta=2)
    with pytest.raises(RecipeError, match="asks a model"):
        Clear().curate(ROWS)
