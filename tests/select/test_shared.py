import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.errors import DataError, RecipeError
from luthier.select._shared import gumbel_top_k, lazy_greedy, named_column, numbers, spread, stratified


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.floats(0, 5)), min_size=1, max_size=12), st.integers(0, 200))
def test_counts_are_exact_and_within_the_sizes(groups, budget):
    sizes, weights = [g[0] for g in groups], [g[1] for g in groups]
    for w in (None, weights):
        counts = spread(budget, sizes, w)
        assert counts.sum() == min(budget, sum(sizes)) and (counts >= 0).all() and (counts <= sizes).all()


def test_shares_are_proportional_up_to_rounding_and_surplus_is_handed_on():
    assert spread(100, [1000, 1000, 1000], [1, 2, 1]).tolist() == [25, 50, 25]
    assert spread(10, [100, 100, 100], [1, 1, 1]).tolist() == [4, 3, 3]
    assert spread(100, [5, 1000, 1000], [1, 1, 1]).tolist() == [5, 48, 47]
    assert spread(10, [4, 100], [1, 0]).tolist() == [4, 6]  # weight 0 only when the others are full
    assert spread(7, [10, 10], [0, 0]).sum() == 7
    assert spread(60, [10, 20, 30]).tolist() == [10, 20, 30]


def test_the_gumbel_draw_is_the_sequential_weighted_draw():
    p = np.array([0.5, 0.3, 0.2])
    first, second = np.zeros(3), np.zeros((3, 3))
    for seed in range(6000):
        a, b = gumbel_top_k(np.log(p), 2, np.random.default_rng(seed))
        first[a] += 1
        second[a, b] += 1
    assert np.allclose(first / 6000, p, atol=0.03)
    assert np.allclose(second[0] / second[0].sum(), [0, 0.6, 0.4], atol=0.03)  # without replacement: renormalised
    assert gumbel_top_k([-np.inf, 0.0, -np.inf], 2, np.random.default_rng(0))[0] == 1


def test_strata_are_covered_and_the_hardest_are_trimmed():
    scores = np.concatenate([np.linspace(0, 1, 90), np.linspace(9, 10, 10)])
    picked = stratified(scores, 20, bins=4, rng=np.random.default_rng(0))
    assert len(set(picked.tolist())) == 20 and (scores[picked] > 8).sum() == 10
    trimmed = stratified(scores, 20, bins=4, rng=np.random.default_rng(0), trim=0.1)
    assert len(trimmed) == 20 and scores[trimmed].max() <= 1
    assert len(stratified(np.ones(9), 4, bins=5, rng=np.random.default_rng(0))) == 4


@pytest.mark.parametrize("block", [1, 7])
def test_lazy_greedy_equals_plain_greedy_on_facility_location(block):
    similarity = np.random.default_rng(0).random((40, 40)).round(1)  # rounding makes ties
    n, budget = 40, 12

    def plain():
        covered, chosen = np.zeros(n), []
        for _ in range(budget):
            gain = np.maximum(similarity - covered[:, None], 0).sum(0).round(9)
            gain[chosen] = -np.inf
            chosen.append(int(gain.argmax()))
            covered = np.maximum(covered, similarity[:, chosen[-1]])
        return chosen

    covered, used, asked = np.zeros(n), set(), []

    def best(b):
        asked.append(b)
        free = [i for i in range(b * block, min(n, (b + 1) * block)) if i not in used]
        if not free:
            return -np.inf, -1
        gain = np.maximum(similarity[:, free] - covered[:, None], 0).sum(0).round(9)
        return float(gain.max()), free[int(gain.argmax())]

    def take(b, i):
        used.add(i)
        np.maximum(covered, similarity[:, i], out=covered)

    blocks = -(-n // block)
    chosen, gains = lazy_greedy(best, take, blocks, budget)
    assert chosen == plain() and gains == sorted(gains, reverse=True)
    assert len(asked) < blocks * budget


def test_columns_are_named_in_errors():
    rows = [{"q": 1, "text": "a"}, {"q": "x", "text": "b"}]
    with pytest.raises(DataError, match="Row 1 has 'x' in the column 'q'"):
        numbers(rows, "q")
    with pytest.raises(DataError, match="finite"):
        numbers({"q": [1.0, float("nan")]}, "q")
    with pytest.raises(RecipeError, match="Did you mean 'text'"):
        named_column(rows, "texts")
