import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from sklearn.neighbors import NearestNeighbors

from luthier.core import neighbours
from luthier.core.neighbours import assign, cluster_accuracy, kmeans, knn


def test_neighbours_leave_the_point_itself_out():
    x = np.random.default_rng(0).normal(size=(40, 3))
    x[7] = x[3]  # a duplicate is a neighbour at distance 0
    distance, index = knn(x, 5)
    wanted, _ = NearestNeighbors(n_neighbors=5).fit(x).kneighbors()
    assert np.allclose(distance, wanted) and not (index == np.arange(40)[:, None]).any()
    assert index[7, 0] == 3 and distance[7, 0] == 0


def test_kmeans_finds_separate_groups_and_is_seeded():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(20, 2)) + c for c in ((0, 0), (30, 0), (0, 30))])
    labels, centres = kmeans(x, 3, seed=1)
    assert all(len(set(labels[i : i + 20])) == 1 for i in (0, 20, 40)) and len(set(labels)) == 3
    assert np.array_equal(labels, kmeans(x, 3, seed=1)[0]) and centres.shape == (3, 2)
    few, _ = kmeans(np.array([[0.0], [0.0], [1.0]]), 3)
    assert len(set(few)) == 2


def test_assignment_is_the_hungarian_one():
    cost = np.random.default_rng(0).random((6, 6))
    assert np.array_equal(assign(cost)[1], linear_sum_assignment(cost)[1])


def test_other_points_cosines_and_different_points():
    rng = np.random.default_rng(1)
    x, pool = rng.normal(size=(6, 4)), rng.normal(size=(30, 4))
    distance, index = knn(x, 3, among=pool)
    assert np.allclose(distance, np.sort(cdist(x, pool), 1)[:, :3]) and np.allclose(cdist(x, pool)[np.arange(6)[:, None], index], distance)
    assert np.allclose(knn(x, 3, among=pool, metric="cosine")[0], np.sort(cdist(x, pool, "cosine"), 1)[:, :3])
    twice = np.concatenate([pool, pool, pool[:5]])
    wanted = np.sort(cdist(pool, pool), 1)[:, 1:4]
    assert np.allclose(knn(twice, 3, distinct=True)[0][:30], wanted)
    with pytest.raises(ValueError, match="do not each have 30"):
        knn(pool, 30)


def test_the_index_for_many_points_finds_the_same(monkeypatch):
    pytest.importorskip("faiss")
    x = np.random.default_rng(2).normal(size=(200, 5)) + 1000
    wanted = knn(x, 4)
    monkeypatch.setattr(neighbours, "LARGE", 10)
    found = knn(x, 4)
    assert np.array_equal(found[1], wanted[1]) and np.allclose(found[0], wanted[0])


def test_known_centres_stay_and_come_first():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(20, 2)) + c for c in ((0, 0), (30, 0), (0, 30))])
    labels, centres = kmeans(x, 3, fixed=[[29.0, 1.0]])
    assert centres[0].tolist() == [29, 1] and (labels[20:40] == 0).all()
    assert cluster_accuracy(np.repeat([0, 1, 2], 20), labels) == 1
    assert np.allclose(centres[labels[0]], x[:20].mean(0), atol=1e-4)


def test_accuracy_is_of_the_best_naming():
    truth, found = ["a", "a", "b", "b", "c"], [2, 2, 0, 1, 1]
    assert cluster_accuracy(truth, found) == pytest.approx(0.8)
    assert cluster_accuracy(truth, [0] * 5) == pytest.approx(0.4)
