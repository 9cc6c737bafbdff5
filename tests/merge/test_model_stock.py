import itertools

import numpy as np
import pytest
import torch

from luthier.errors import RecipeError
from luthier.merge.model_stock import ModelStock, model_stock


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ratio(vectors):
    pairs = [a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in itertools.combinations(vectors, 2)]
    c, n = np.mean(pairs), len(vectors)
    return n * c / (1 + (n - 1) * c)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_ratio_of_a_tensor_and_of_its_rows(n):
    common = normal(4, 6)
    updates = [common + 0.7 * normal(4, 6, seed=i + 1) for i in range(n)]
    mean = np.mean([u.numpy() for u in updates], 0)
    t = ratio([u.numpy().ravel() for u in updates])
    found, told = model_stock(updates)
    np.testing.assert_allclose(found.numpy(), t * mean, rtol=1e-9)
    assert float(told) == pytest.approx(t)
    rows = np.array([ratio([u.numpy()[r] for u in updates]) for r in range(4)])
    np.testing.assert_allclose(model_stock(updates, filter_wise=True)[0].numpy(), rows[:, None] * mean, rtol=1e-9)


def test_two_models_lie_where_the_paper_says():
    """Of the triangle of the base and two fine-tunes at one distance from it the result is the orthocentre."""
    a, b = normal(9, seed=1), normal(9, seed=2) + normal(9, seed=1)
    a, b = a / a.norm(), b / b.norm()
    found, _ = model_stock([a, b])
    assert [float((found - a) @ b), float((found - b) @ a), float(found @ (a - b))] == pytest.approx([0.0] * 3, abs=1e-9)


def test_equal_updates_give_themselves_and_orthogonal_ones_the_base():
    u = normal(5, 3)
    torch.testing.assert_close(model_stock([u, u, u])[0], u)
    assert not model_stock([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])])[0].any()
    assert not model_stock([u, -u])[0].any()  # nothing is known: the base is kept
    assert not model_stock([torch.zeros(3), torch.zeros(3)])[0].any()


def test_the_merger(state):
    base, tuned = state(0), [state(i) for i in (1, 2, 3)]
    for filter_wise in (False, True):
        merger = ModelStock(filter_wise, skip=["norm"])
        merged = dict(merger.merge(base, tuned))
        assert torch.equal(merged["norm.weight"], base["norm.weight"]) and merged["steps"] == 0
        for n in set(base) - {"norm.weight", "steps"}:
            change, t = model_stock([s[n].double() - base[n].double() for s in tuned], filter_wise)
            torch.testing.assert_close(merged[n], (base[n].double() + change).float())
            assert merger.report["ratios"][n] == pytest.approx(float(t.mean()))


def test_the_order_of_models_does_not_matter(state, same):
    base, tuned = state(0), [state(i) for i in (1, 2, 3)]
    results = [dict(ModelStock().merge(base, list(p))) for p in itertools.permutations(tuned)]
    for other in results[1:]:
        same(other, results[0], rtol=1e-5, atol=1e-6)


def test_lazy(lazily):
    lazily(lambda base, tuned: ModelStock().merge(base, tuned))


def test_one_model_is_refused_before_anything_is_loaded(state):
    with pytest.raises(RecipeError, match="two fine-tunes or more"):
        ModelStock().merge(state(0), [state(1)])
    from luthier.recipe import Recipe, check

    plan = {"model": "m", "data": {"train": [{"prompt": "a", "completion": "b"}]}, "merge": {"method": "model-stock", "of": ["this"]}}
    with pytest.raises(RecipeError, match="model-stock compares two"):
        check(Recipe.from_dict(plan))
