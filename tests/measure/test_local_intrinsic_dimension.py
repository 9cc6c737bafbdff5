import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from luthier.errors import RecipeError
from luthier.measure.local_intrinsic_dimension import LocalIntrinsicDimension, local_intrinsic_dimension, monitor


def cube(d, n=1200, ambient=50, seed=0):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(ambient, d)))[0]
    return rng.uniform(size=(n, d)) @ basis.T


@pytest.mark.parametrize("d", [1, 2, 5])
def test_cubes_have_their_dimension(d):
    assert local_intrinsic_dimension(cube(d), 64).mean() == pytest.approx(d, rel=0.15)


def test_rotation_translation_and_scale_do_not_matter():
    x = cube(3, n=300)
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(50, 50)))[0]
    moved = 7.5 * x @ turn + 3
    assert np.allclose(local_intrinsic_dimension(x, 32), local_intrinsic_dimension(moved, 32), rtol=1e-5)


def test_agrees_with_scikit_dimension():
    skdim = pytest.importorskip("skdim")
    x = cube(4, n=200)
    knn = NearestNeighbors(n_neighbors=40).fit(x).kneighbors(return_distance=False)
    wanted = skdim.id.TwoNN(discard_fraction=0.1, method="linear").fit_pw(x, precomputed_knn=knn).dimension_pw_
    assert np.allclose(local_intrinsic_dimension(x, 40), wanted, atol=1e-6)


def test_the_monitor_speaks_by_its_rules():
    assert any("exhausted" in s for s in monitor([5.0] * 6))
    assert any("overfitting" in s for s in monitor([6, 5, 5.5, 6, 6.5]))
    assert any("generalising" in s for s in monitor([6, 6, 5]))
    assert monitor([6.0, 5.8]) == []


def test_impossible_settings_are_refused():
    with pytest.raises(RecipeError, match="neighbours"):
        LocalIntrinsicDimension(tokens=50, neighbours=64)
    with pytest.raises(ValueError, match="cannot each have"):
        local_intrinsic_dimension(cube(2, n=20), 64)
