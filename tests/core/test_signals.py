import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.neighbors import NearestNeighbors

from luthier.core.context import Context
from luthier.core.neighbours import assign, kmeans, knn
from luthier.core.rows import Rows
from luthier.core.signals import signal
from luthier.errors import RecipeError
from tests.helpers import tiny_llama, tiny_vit

ROWS = Rows.of([{"prompt": f"w{i} w{i + 1}", "completion": f"w{i + 2} w{i}"} for i in range(5)])


def test_losses_are_means_over_supervised_tokens():
    model = tiny_llama()
    ctx = Context(model)
    wanted = [float(-model.score(model.collate([r])).logp.mean().detach()) for r in ROWS]
    assert np.allclose(signal("loss", ROWS, ctx), wanted, rtol=1e-5)
    assert np.allclose(signal("perplexity", ROWS, ctx), np.exp(wanted), rtol=1e-4)


def test_embeddings_are_means_of_last_states_of_the_named_part():
    model = tiny_llama()
    ctx = Context(model)
    sequence = model.collate([ROWS[0]]).sequences[0]
    cut = int(sequence.supervised[0])
    with torch.no_grad():
        hidden = model.decoder(torch.tensor(sequence.ids)[None]).last_hidden_state[0]
        prompt = model.decoder(torch.tensor(sequence.ids[:cut])[None]).last_hidden_state[0].mean(0)
    assert np.allclose(signal("embedding", ROWS, ctx)[0], hidden.mean(0), atol=1e-5)
    assert np.allclose(signal("embedding", ROWS, ctx, text="prompt")[0], prompt, atol=1e-5)
    unit = signal("embedding", ROWS, ctx, normalise=True)
    assert np.allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-5)


def test_projected_gradients_keep_inner_products_on_average_and_leave_the_model_alone():
    model = tiny_llama()
    ctx = Context(model)
    flags = [p.requires_grad for p in model.network.parameters()]
    got = signal("gradient", ROWS, ctx, sites="layers.0.mlp.down_proj", project=4096)
    exact = []
    weight = model.network.model.layers[0].mlp.down_proj.weight
    for row in ROWS:
        loss = -model.score(model.collate([row])).logp.mean()
        exact.append(torch.autograd.grad(loss, weight)[0].flatten().numpy())
    exact = np.stack(exact)
    assert np.allclose(got @ got.T, exact @ exact.T, atol=0.1 * np.abs(exact @ exact.T).max())
    assert flags == [p.requires_grad for p in model.network.parameters()] and all(p.grad is None for p in model.network.parameters())


def test_signals_are_kept_and_follow_the_weights(tmp_path):
    model = tiny_llama()
    ctx = Context(model, folder=tmp_path)
    first = signal("loss", ROWS, ctx)
    assert isinstance(first, np.memmap) and len(list((tmp_path / "signals").glob("*.npy"))) == 1
    signal("loss", ROWS, ctx)
    assert len(list((tmp_path / "signals").glob("*.npy"))) == 1
    with torch.no_grad():
        model.network.lm_head.weight.mul_(1.5)
    assert not np.allclose(signal("loss", ROWS, ctx), first)


def test_pictures_have_features_and_losses():
    rng = np.random.default_rng(0)
    rows = Rows.of([{"image": rng.integers(0, 255, (12, 12, 3)).astype(np.uint8), "label": i % 3} for i in range(4)])
    ctx = Context(tiny_vit())
    assert signal("embedding", rows, ctx).shape[0] == 4 and np.isfinite(signal("loss", rows, ctx)).all()


def test_an_unknown_signal_is_answered_with_the_nearest():
    with pytest.raises(RecipeError, match="Did you mean 'embedding'"):
        signal("embeddings", ROWS, Context(tiny_llama()))


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
