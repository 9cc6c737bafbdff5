import numpy as np
import pytest
import torch

from luthier.core.context import Context
from luthier.core.families import Decode
from luthier.core.rows import Rows, prompt_ids
from luthier.errors import RecipeError
from luthier.select.kmeans_quality import KMeansQuality, kmeans_quality, later_counts, new_weights
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


@pytest.mark.parametrize("scorer", ["margin", "loss", "perplexity", "reward"])
def test_rounds_add_rows_and_reach_the_budget(scorer):
    rows = Rows.of(pool())
    model = tiny_llama()
    ctx = Context(model, streams={"train": rows}, models={"round": model.frozen_copy()}, helpers={"reward": lambda answers, rows: [float(len(a)) for a in answers]})
    method = KMeansQuality(clusters=3, rounds=3, embeddings="vector", scorer=scorer, max_new_tokens=3)
    seen = []
    for number in range(3):
        ctx.round = number
        seen.append(method.select(rows, 20, ctx).indices)
    assert [len(s) for s in seen] == [7, 13, 20]
    assert set(seen[0]) <= set(seen[1]) <= set(seen[2]) and len(set(seen[2])) == 20


def test_a_repeated_round_draws_the_same_and_a_missing_one_is_refused():
    rows = Rows.of(pool())
    model = tiny_llama()
    ctx = Context(model, models={"round": model})
    method = KMeansQuality(clusters=3, rounds=2, embeddings="vector", scorer="loss")
    first = method.select(rows, 20, ctx).indices
    assert clusters_of(method.select(rows, 20, ctx), rows) == [3, 3, 4]  # the first of several rounds shares equally
    ctx.round = 1
    second = method.select(rows, 20, ctx).indices
    again = method.select(rows, 20, ctx).indices
    assert np.array_equal(second, again) and np.array_equal(second[:10], first)
    with pytest.raises(RecipeError, match="Round 2"):
        method.select(rows, 20, Context(model, round=1))


def test_later_counts_follow_the_weights_and_hand_on_what_does_not_fit():
    drawn = sum(later_counts(10, np.array([99, 99, 99]), np.array([0.6, 0.4, 0.0]), np.random.default_rng(s)) for s in range(500))
    assert np.allclose(drawn / 5000, [0.6, 0.4, 0.0], atol=0.02)
    assert later_counts(10, np.array([2, 9, 0]), np.array([1.0, 0.0, 0.0]), np.random.default_rng(0)).tolist() == [2, 8, 0]


def test_the_margin_is_the_difference_of_mean_log_probabilities_in_chats_too():
    model = tiny_llama()
    rows = [
        {"prompt": "w1 w2", "completion": "w3 w4"},
        {"messages": [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6 w7"}]},
    ]
    ctx = Context(model, models={"round": model})
    for row in rows:
        got = KMeansQuality(max_new_tokens=4)._scores([row], ctx)[0]
        prompt = prompt_ids(row, model.tokenizer)
        own = model.generate([prompt], Decode(max_new_tokens=4))[0][0].ids
        with torch.no_grad():
            logp = model.network(torch.tensor(np.concatenate([prompt, own]))[None]).logits[0].log_softmax(-1)
        mine = logp[torch.arange(len(prompt) - 1, len(prompt) + len(own) - 1), torch.tensor(own)].mean()
        gold = model.score(model.collate([row])).logp.mean()
        assert got == pytest.approx(float(gold.detach() - mine), abs=1e-4)


def test_the_sign_can_be_turned():
    rows = Rows.of(pool(sizes=(20, 20, 20)))
    model = tiny_llama()
    weights = {}
    for prefer in ("high", "low"):
        ctx = Context(model, models={"round": model})
        method = KMeansQuality(clusters=3, rounds=2, embeddings="vector", scorer="loss", prefer=prefer)
        method.select(rows, 20, ctx)
        ctx.round = 1
        method.select(rows, 20, ctx)
        weights[prefer] = ctx.store["kmeans-quality"]["weights"][1]
    assert np.array_equal(np.argsort(weights["high"]), np.argsort(weights["low"])[::-1])


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
