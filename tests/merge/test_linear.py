import numpy as np
import pytest
import torch

from luthier.errors import RecipeError
from luthier.merge.linear import Linear, linear


def total(states, weights, name):
    return sum(w * s[name].double().numpy() for w, s in zip(weights, states))


@pytest.mark.parametrize("weights", [None, [0.2, 0.5, 0.3], [3.0, 1.0, 1.0], [1.5, -0.25, 0.5]])
@pytest.mark.parametrize("normalise", [True, False])
def test_the_weighted_sum(state, same, weights, normalise):
    tuned = [state(i) for i in (1, 2, 3)]
    w = weights or [1.0, 1.0, 1.0]
    expected = {n: total(tuned, w, n) / (sum(w) if normalise else 1) if n != "steps" else tuned[0][n] for n in tuned[0]}
    same(dict(linear(tuned, weights, normalise)), expected, rtol=1e-6, atol=1e-6)


def test_weights_that_sum_to_one_need_no_normalising(state):
    tuned = [state(1), state(2)]
    a, b = linear(tuned, [0.25, 0.75]), linear(tuned, [0.25, 0.75], normalise=False)
    for n in ("embed.weight", "scale"):
        torch.testing.assert_close(a[n], b[n])


def test_sums_of_half_precision_are_rounded_once(state):
    tuned = [state(i, torch.bfloat16) for i in (1, 2, 3)]
    found = linear(tuned, [0.3, 0.3, 0.1], normalise=False)
    exact = 0.3 * tuned[0]["embed.weight"].double() + 0.3 * tuned[1]["embed.weight"].double() + 0.1 * tuned[2]["embed.weight"].double()
    assert found["embed.weight"].dtype == torch.bfloat16 and torch.equal(found["embed.weight"], exact.float().bfloat16())


def test_the_base_gives_types_and_what_is_left_out(state):
    base, tuned = state(0, torch.float16), [state(1), state(2)]
    for normalise in (True, False):
        merged = Linear([2.0, -1.0], normalise, skip=["norm"]).merge(base, tuned)
        assert merged["embed.weight"].dtype == torch.float16 and merged["steps"] == 0 and torch.equal(merged["norm.weight"], base["norm.weight"])
        np.testing.assert_allclose(merged["embed.weight"].float().numpy(), total(tuned, [2.0, -1.0], "embed.weight"), atol=3e-3)
        with_base = Linear([1.0, 1.0, 1.0], normalise, include_base=True).merge(base, tuned)
        expected = total([base, *tuned], [1, 1, 1], "embed.weight") / (3 if normalise else 1)
        np.testing.assert_allclose(with_base["embed.weight"].float().numpy(), expected, atol=3e-3)


def test_lazy(lazily):
    lazily(lambda base, tuned: Linear(normalise=False).merge(base, tuned))
    lazily(lambda base, tuned: Linear().merge(base, tuned))


def test_bad_weights(state):
    with pytest.raises(RecipeError, match="2 entries, but 3 models"):
        Linear([0.5, 0.5], normalise=False).merge(None, [state(i) for i in (1, 2, 3)])
    with pytest.raises(RecipeError, match="sum to 0"):
        Linear([1.0, -1.0]).merge(None, [state(1), state(2)])
