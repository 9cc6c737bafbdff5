import itertools

import numpy as np
import pytest
import torch

from luthier.errors import ModelError, RecipeError
from luthier.merge.uniform_soup import UniformSoup, uniform_soup


def test_a_soup_of_equal_models_is_that_model_exactly(state):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = state(5, dtype)
        for k in (1, 2, 3, 7):
            soup = uniform_soup([model] * k)
            assert all(torch.equal(soup[n], model[n]) and soup[n].dtype == model[n].dtype for n in model)


def test_the_mean_of_the_weights(state, same):
    tuned = [state(i) for i in (1, 2, 3)]
    same(dict(uniform_soup(tuned)), {n: np.mean([t[n].double().numpy() for t in tuned], 0) if n != "steps" else tuned[0][n] for n in tuned[0]})
    weighted = uniform_soup(tuned, [1.0, 2.0, 1.0])
    torch.testing.assert_close(weighted["norm.weight"], (tuned[0]["norm.weight"] + 2 * tuned[1]["norm.weight"] + tuned[2]["norm.weight"]) / 4)


def test_a_linear_models_soup_is_the_ensemble_of_logits():
    from sklearn.datasets import load_iris
    from sklearn.linear_model import LogisticRegression

    x, y = load_iris(return_X_y=True)
    rng = np.random.default_rng(0)
    fits = []
    for c in (0.01, 0.1, 1.0, 10.0):
        rows = rng.choice(len(x), 90, replace=False)
        fits.append(LogisticRegression(C=c, max_iter=500).fit(x[rows], y[rows]))
    soup = uniform_soup([{"weight": torch.from_numpy(f.coef_), "bias": torch.from_numpy(f.intercept_)} for f in fits])
    logits = torch.nn.functional.linear(torch.from_numpy(x), soup["weight"], soup["bias"])
    np.testing.assert_allclose(logits, np.mean([f.decision_function(x) for f in fits], 0), atol=1e-9)


def test_wise_ft_is_the_soup_with_the_base(state):
    base, tuned = state(0), state(1)
    soup = UniformSoup(include_base=True).merge(base, [tuned])
    torch.testing.assert_close(soup["embed.weight"], (base["embed.weight"] + tuned["embed.weight"]) / 2)
    tilted = UniformSoup(include_base=True, weights=[0.25, 0.75]).merge(base, [tuned])
    torch.testing.assert_close(tilted["embed.weight"], torch.lerp(base["embed.weight"], tuned["embed.weight"], 0.75))


def test_many_half_precision_models_do_not_drift(state):
    tuned = [state(i, torch.float16) for i in range(1, 65)]
    soup = uniform_soup(tuned)
    exact = torch.stack([t["embed.weight"].double() for t in tuned]).mean(0)
    assert torch.equal(soup["embed.weight"], exact.half())


def test_types_integers_and_skipped_tensors_are_the_bases(state):
    base, tuned = state(0, torch.bfloat16), [state(1), state(2)]
    soup = UniformSoup(skip=["norm", "layers.*.bias"]).merge(base, tuned)
    assert soup["embed.weight"].dtype == torch.bfloat16 and soup["steps"] == 0
    assert torch.equal(soup["norm.weight"], base["norm.weight"]) and torch.equal(soup["layers.1.attn.bias"], base["layers.1.attn.bias"])
    alone = UniformSoup(skip=["norm"]).merge(None, tuned)
    assert torch.equal(alone["norm.weight"], tuned[0]["norm.weight"]) and alone["steps"] == 1


def test_lazy_and_without_order(lazily, state, same):
    lazily(lambda base, tuned: UniformSoup().merge(base, tuned))
    tuned = [state(i) for i in (1, 2, 3)]
    results = [dict(uniform_soup(list(p))) for p in itertools.permutations(tuned)]
    for other in results[1:]:
        same({n: t for n, t in other.items() if n != "steps"}, {n: t for n, t in results[0].items() if n != "steps"})


def test_bad_input(state):
    with pytest.raises(RecipeError, match="needs a base"):
        UniformSoup(include_base=True).merge(None, [state(1)])
    with pytest.raises(RecipeError, match="sum to 0"):
        uniform_soup([state(1), state(2)], [1.0, -1.0])
    other = state(2)
    del other["norm.weight"]
    with pytest.raises(ModelError, match=r"1 tensors are only in the base.*'norm.weight'"):
        uniform_soup([state(1), other])
