import numpy as np
import pytest
import torch

from luthier.core.context import Context
from luthier.core.rows import Rows
from luthier.core.signals import signal
from luthier.errors import RecipeError
from tests.helpers import tiny_bert, tiny_llama, tiny_vit

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


def test_sums_lengths_and_order_with_rows_of_many_lengths():
    rng = np.random.default_rng(0)
    rows = Rows.of([{"prompt": "w1 " * int(rng.integers(1, 30)), "completion": "w2 " * int(rng.integers(1, 30))} for _ in range(300)])
    model = tiny_llama()
    ctx = Context(model)
    with torch.no_grad():
        wanted = [float(-model.score(model.collate([r])).logp.sum()) for r in rows]
    assert np.allclose(signal("loss", rows, ctx, reduce="sum"), wanted, rtol=1e-4)
    assert signal("length", rows, ctx).tolist() == [len(model.collate([r]).sequences[0]) for r in rows]


def test_completions_are_read_behind_their_prompts_and_the_last_state_can_be_taken():
    model = tiny_llama()
    ctx = Context(model)
    sequence = model.collate([ROWS[1]]).sequences[0]
    with torch.no_grad():
        hidden = model.decoder(torch.tensor(sequence.ids)[None]).last_hidden_state[0]
    cut = int(sequence.supervised[0])
    assert np.allclose(signal("embedding", ROWS, ctx, text="completion")[1], hidden[cut:].mean(0), atol=1e-5)
    assert np.allclose(signal("embedding", ROWS, ctx, pooling="last")[1], hidden[-1], atol=1e-5)


def test_a_helper_or_an_encoder_may_embed_the_texts():
    count = lambda texts: [[t.count("w1"), len(t)] for t in texts]  # noqa: E731
    ctx = Context(tiny_llama(), helpers={"mine": count}, models={"encoder": tiny_bert()})
    assert signal("embedding", ROWS, ctx, embedder="mine", text="prompt").tolist() == [[1, 5], [1, 5], [0, 5], [0, 5], [0, 5]]
    got = signal("embedding", ROWS, ctx, embedder="encoder", text="prompt")
    assert np.allclose(got, tiny_bert().embed([r["prompt"] for r in ROWS]).detach().numpy(), atol=1e-5)


def test_unprojected_gradients_are_autograds():
    model = tiny_llama()
    row = ROWS[2]
    got = signal("gradient", [row], Context(model), sites="layers.1.mlp.up_proj", project=None)[0]
    loss = -model.score(model.collate([row])).logp.mean()
    wanted = torch.autograd.grad(loss, model.network.model.layers[1].mlp.up_proj.weight)[0].flatten().numpy()
    assert np.allclose(got, wanted, atol=1e-6)
    unit = signal("gradient", [row], Context(model), project=64, normalise=True)
    assert unit.shape == (1, 64) and np.linalg.norm(unit) == pytest.approx(1, abs=1e-5)


def test_a_broken_file_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path))
    ctx = Context(tiny_llama())
    first = np.array(signal("loss", ROWS, ctx))
    (file,) = (tmp_path / "signals").glob("*.npy")
    file.write_bytes(file.read_bytes()[:90])
    assert np.array_equal(signal("loss", ROWS, ctx), first) and np.array_equal(np.load(file), first)


@pytest.mark.slow
def test_workers_of_a_cluster_compute_what_one_process_does(tmp_path):
    pytest.importorskip("ray")
    model = tiny_llama()
    some = [{"prompt": f"w{i % 9} w{i % 5}", "completion": f"w{i % 7}"} for i in range(23)]
    here, there = (Context(model, folder=tmp_path / name, workers=n) for name, n in (("here", 0), ("there", 2)))
    for name, options in (("loss", {}), ("embedding", {"normalise": True}), ("gradient", {"project": 16})):
        np.testing.assert_allclose(there.signal(name, some, model="current", **options), here.signal(name, some, model="current", **options), atol=1e-5)


def test_without_ray_the_error_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RecipeError, match=r"pip install 'luthier\[ray\]'"):
        Context(tiny_llama(), workers=1).signal("length", [{"prompt": "w1", "completion": "w2"}], model="current")
