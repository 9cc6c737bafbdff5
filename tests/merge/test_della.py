import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from luthier.errors import RecipeError
from luthier.merge.della import Della, DellaLinear, della, keep_probabilities


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(7,), (4, 9), (3, 8, 2, 2)])
def test_the_probability_grows_with_the_rank_in_the_row(shape):
    x = normal(*shape)
    rows = x.abs().numpy().reshape(1, -1) if len(shape) == 1 else x.abs().numpy()
    ranks = rankdata(rows, axis=1) - 1
    expected = 0.4 - 0.1 + 0.2 * ranks / (rows.shape[1] - 1)
    np.testing.assert_allclose(keep_probabilities(x, 0.4, 0.1).numpy(), expected.reshape(shape), rtol=1e-5)


def test_rows_of_one_entry_and_single_numbers_have_the_density():
    for shape in ((), (1,), (5, 1)):
        assert torch.allclose(keep_probabilities(normal(1).reshape(1)[0].expand(shape), 0.4, 0.1), torch.full(shape, 0.4))


@pytest.mark.parametrize("rescale", ["l1", "density", "none"])
def test_kept_entries_are_rescaled(rescale):
    x, draw = normal(6, 11).double(), torch.rand(6, 11, generator=torch.Generator().manual_seed(1))
    p = keep_probabilities(x, 0.5, 0.2).double().numpy()
    kept = np.where(draw.numpy() < p, x.numpy(), 0)
    expected = {"l1": kept * np.abs(x.numpy()).sum() / np.abs(kept).sum(), "density": kept / p, "none": kept}[rescale]
    np.testing.assert_allclose(della(x, 0.5, 0.2, draw, rescale).numpy(), expected, rtol=1e-5)
    assert torch.equal(della(x, 1.0, 0.2, draw), x) and not della(x, 0.0, 0.2, draw).any()


def test_small_entries_are_dropped_more_often():
    x = torch.arange(1.0, 101.0).repeat(400, 1)
    kept = (della(x, 0.5, 0.3, torch.rand(400, 100, generator=torch.Generator().manual_seed(0)), "none") != 0).float().mean(0)
    # each is a mean of 400 draws: deviation at most 0.025
    np.testing.assert_allclose(kept.numpy(), np.linspace(0.2, 0.8, 100), atol=0.11)


def test_without_epsilon_it_is_dare(state):
    from luthier.merge.dare import DareLinear

    base, tuned = state(0), [state(1), state(2)]
    a, b = DellaLinear(epsilon=0.0).merge(base, tuned), DareLinear().merge(base, tuned)
    assert all(torch.equal(a[n], b[n]) for n in base)


def test_the_mean_of_what_agrees(state):
    base, tuned = state(0), [state(1), state(2)]
    parts = [DellaLinear(weights=w).merge(base, tuned) for w in ([1.0, 0.0], [0.0, 1.0])]
    merged = Della(scale=2.0).merge(base, tuned)
    for n in set(base) - {"steps"}:
        first, second = ((p[n].double() - base[n].double()).numpy() for p in parts)
        sign = np.where(first + second >= 0, 1, -1)
        sums = np.where(np.sign(first) == sign, first, 0) + np.where(np.sign(second) == sign, second, 0)
        number = (np.sign(first) == sign).astype(int) + (np.sign(second) == sign)
        np.testing.assert_allclose((merged[n].double() - base[n].double()).numpy(), 2 * sums / np.maximum(number, 1), atol=2e-5)


def test_lazy(lazily):
    lazily(lambda base, tuned: Della().merge(base, tuned))
    lazily(lambda base, tuned: DellaLinear().merge(base, tuned))


@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.15), (0.9, 0.15), (0.5, -0.1), (0.5, 0.5)])
def test_bad_epsilon(density, epsilon):
    with pytest.raises(RecipeError, match="`epsilon` of della is"):
        Della(density=density, epsilon=epsilon)
    with pytest.raises(RecipeError, match="`density` of della-linear is 2"):
        DellaLinear(density=2)
