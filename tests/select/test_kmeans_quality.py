import numpy as np
import pytest

from luthier.core.context import Context
from luthier.core.rows import Rows
from luthier.errors import RecipeError
from luthier.select.kmeans_quality import KMeansQuality, kmeans_quality, new_weights
from tests.helpers import tiny_llama


def pool(sizes=(30, 15, 5), seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for c, size in enumerate(sizes):
        centre = np.eye(4)[c] * 20
        rows += [{"prompt": f"w{c}", "completion": "w9", "vector": (centre + rng.normal(size=4)).tolist(), "q": 1.0 + c} for _ in range(size)]
    return rows


def clusters_of(picks, rows):
    return sorted(np.bincount([int(rows[i]["prompt"][1:]) for i in picks.indices], minlength=3).tolist())


def test_one_round_gives_every_cluster_its_share_exactly():
    rows = pool()
    for budget in (10, 13, 50):
        picks = KMeansQuality(clusters=3, embeddings="vector").select(rows, budget)
        assert len(picks.indices) == budget
    assert clusters_of(KMeansQuality(clusters=3, embeddings="vector").select(rows, 10), rows) == [1, 3, 6]
    assert clusters_of(KMeansQuality(clusters=3, embeddings="vector", share="equal").select(rows, 30), rows) == [5, 12, 13]


def test_rows_are_drawn_in_proportion_to_their_quality():
    labels, quality = np.zeros(3, int), np.array([1.0, 2.0, 7.0])
    counts = np.zeros(3)
    for seed in range(4000):
        counts[kmeans_quality(labels, quality, [1], np.random.default_rng(seed))[0]] += 1
    assert np.allclose(counts / 4000, [0.1, 0.2, 0.7], atol=0.03)


def test_used_rows_never_come_again():
    labels = np.array([0, 0, 0, 1, 1])
    got = kmeans_quality(labels, np.ones(5), [2, 2], np.random.default_rng(0), used=[0, 4])
    assert sorted(got.tolist()) == [1, 2, 3]


@pytest.mark.parametrize("rule", ["softmax", "memory"])
def test_equal_scores_keep_weights_uniform_and_better_clusters_get_more(rule):
    labels = np.array([0, 0, 1, 1, 2])
    assert np.allclose(new_weights(labels, [0, 2, 4], [0.5, 0.5, 0.5], 3, rule=rule), 1 / 3)
    weights = new_weights(labels, [0, 2, 4], [0.0, 2.0, 1.0], 3, rule=rule)
    assert weights[1] > weights[2] > weights[0] and weights.sum() == pytest.approx(1)
    softened = new_weights(labels, [0, 2], [1.0, 1.0], 3, rule=rule)
    assert softened[2] > 0  # a cluster without a chosen row keeps its place


def test_the_softmax_rule_is_the_releases_formula():
    s = np.array([0.3, -1.0, 2.0])
    got = new_weights(np.arange(3), np.arange(3), s, 3)
    assert np.allclose(got, np.exp(s) / np.exp(s).sum())


@pytest.mark.parametrize("scorer", ["margin", "loss", "reward"])
def test_rounds_add_rows_and_reach_the_budget(scorer):
    rows = Rows.of(pool())
    model = tiny_llama()
    ctx = Context(model, streams={"train": rows}, models={"round": model.frozen_copy()}, helpers={"reward": lambda row, answer: float(len(answer))})
    method = KMeansQuality(clusters=3, rounds=3, embeddings="vector", scorer=scorer, max_new_tokens=3)
    seen = []
    for number in range(3):
        ctx.round = number
        seen.append(method.select(rows, 20, ctx).indices)
    assert [len(s) for s in seen] == [7, 13, 20]
    assert set(seen[0]) <= set(seen[1]) <= set(seen[2]) and len(set(seen[2])) == 20


def test_the_models_own_embeddings_serve_where_no_column_is_named():
    rows = Rows.of(pool())
    ctx = Context(tiny_llama())
    assert len(KMeansQuality(clusters=3).select(rows, 6, ctx).indices) == 6


def test_bad_input():
    with pytest.raises(RecipeError, match="clusters"):
        KMeansQuality(clusters=0)
    with pytest.raises(RecipeError, match="Embeddings are needed"):
        KMeansQuality().select(pool(), 5)
    rows = [{**r, "q": -1.0} for r in pool()]
    with pytest.raises(RecipeError, match="0 or below"):
        KMeansQuality(clusters=2, embeddings="vector", quality="q").select(rows, 5)
