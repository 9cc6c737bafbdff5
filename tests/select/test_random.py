import numpy as np
import pytest
from scipy.stats import chisquare

from luthier.core.context import Context
from luthier.errors import DataError, RecipeError
from luthier.select import budget_of
from luthier.select.random import Random, random


def test_every_row_is_equally_likely():
    counts = np.zeros(20)
    for seed in range(2000):
        counts[random(20, 5, np.random.default_rng(seed))] += 1
    assert counts.sum() == 10_000 and chisquare(counts).pvalue > 1e-3


def test_groups_keep_their_shares():
    groups = np.array(["a"] * 60 + ["b"] * 30 + ["c"] * 10)
    picked = random(100, 20, np.random.default_rng(0), groups)
    assert sorted(np.unique(groups[picked], return_counts=True)[1].tolist()) == [2, 6, 12]
    assert len(random(100, 7, np.random.default_rng(0), groups)) == 7


def test_the_seed_decides():
    rows = [{"text": str(i)} for i in range(30)]
    a, b, c = (Random().select(rows, 0.5, Context(seed=s)).indices for s in (1, 1, 2))
    assert np.array_equal(a, b) and not np.array_equal(a, c) and len(a) == 15


@pytest.mark.parametrize(("budget", "wanted"), [(7, 7), (0.25, 25), ("25%", 25), ("12", 12), (1000, 100), (None, 100), (1.0, 100)])
def test_budgets(budget, wanted):
    assert budget_of(budget, 100) == wanted


def test_columns_serve_as_rows():
    picked = Random(by="kind").select({"text": list("abcdef"), "kind": [0, 0, 0, 0, 1, 1]}, 3)
    assert len(picked.indices) == 3 and sorted(picked.groups[picked.indices]) == ["0", "0", "1"]


def test_bad_input():
    for bad in (0, "none", -3, "0%"):
        with pytest.raises(RecipeError, match="no rows at all"):
            budget_of(bad, 100)
    with pytest.raises(DataError, match="column 'kind'"):
        Random(by="kind").select([{"text": "a"}], 1)
