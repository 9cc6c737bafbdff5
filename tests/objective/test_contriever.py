import numpy as np
import pytest
import torch
import torch.nn.functional as F

from luthier.core.context import Context
from luthier.errors import RecipeError
from luthier.objective.contriever import Contriever, contriever, crop
from luthier.objective.info_nce import info_nce
from tests.helpers import tiny_bert

ROWS = [{"text": " ".join(f"w{(i * 7 + j) % 40}" for j in range(30))} for i in range(6)]


def ready(**fields):
    model = tiny_bert()
    ctx = Context(model, seed=0)
    return model, ctx, Contriever(**fields)


def test_crops_are_contiguous_and_of_the_right_length():
    ids, rng = np.arange(100), np.random.default_rng(0)
    sizes = []
    for _ in range(300):
        view = crop(ids, rng, delete=0.0)
        assert np.array_equal(np.diff(view), np.ones(len(view) - 1))
        sizes.append(len(view))
    assert min(sizes) >= 5 and max(sizes) <= 50 and len(set(sizes)) > 20
    kept = [len(crop(ids, rng, 0.5, 0.5, 0.1)) for _ in range(300)]
    assert 43 < np.mean(kept) < 47
    assert len(crop(np.arange(3), rng, delete=0.99)) >= 1


def test_without_a_queue_it_is_in_batch_ranking():
    q, k = torch.randn(5, 6), torch.randn(5, 6)
    assert torch.allclose(contriever(q, k, None, 0.05), info_nce(q, k, 0.05), atol=1e-5)


def test_against_a_queue_it_is_cross_entropy_of_the_own_key():
    q, k, queue = torch.randn(4, 6), torch.randn(4, 6), torch.randn(9, 6)
    wanted = F.cross_entropy(torch.cat([(q * k).sum(-1, keepdim=True), q @ queue.T], 1) / 0.1, torch.zeros(4, dtype=torch.long), reduction="none", label_smoothing=0.1)
    assert torch.allclose(contriever(q, k, queue, 0.1, 0.1), wanted, atol=1e-5)


def test_momentum_zero_makes_keys_the_query_encoder_in_eval_mode_and_gives_them_no_gradient():
    model, ctx, method = ready(momentum=0.0)
    batch = method.collate(ROWS, range(6), ctx)
    method.loss(model, batch, ctx)
    with torch.no_grad():
        for p in model.network.parameters():
            p.add_(0.05)
    method._follow(model, 0.0)
    for mine, theirs in zip(method._keys.network.parameters(), model.network.parameters()):
        assert torch.equal(mine, theirs) and not mine.requires_grad
    loss = method.loss(model, batch, ctx).mean()
    loss.backward()
    assert all(p.grad is None for p in method._keys.network.parameters())
    assert any(p.grad is not None for p in model.network.parameters())


def test_the_queue_is_fifo_and_drops_the_same_passage():
    model, ctx, method = ready(queue=8)
    for _ in range(3):
        method.loss(model, method.collate(ROWS, range(6), ctx), ctx)
    memory = ctx.queue("contriever", 8)
    assert len(memory) == 8 and memory.ids.tolist() == [4, 5, 0, 1, 2, 3, 4, 5]
    everything = method.collate(ROWS, range(6), ctx)
    with torch.no_grad():
        keys = memory["keys"].clone()
        q = model.embed(everything, "anchor")
        k = method._keys.embed(everything, "positive")
        got = method._against_queue(q, k, everything, ctx)
    others = (q @ keys.T).masked_fill(torch.arange(6)[:, None] == memory.ids[None], -torch.inf)
    wanted = F.cross_entropy(torch.cat([(q * k).sum(-1, keepdim=True), others], 1) / 0.05, torch.zeros(6, dtype=torch.long), reduction="none")
    assert torch.allclose(got, wanted, atol=1e-3)


def test_the_key_encoder_survives_a_checkpoint():
    model, ctx, method = ready(momentum=0.5)
    method.loss(model, method.collate(ROWS, range(6), ctx), ctx)
    with torch.no_grad():
        for p in model.network.parameters():
            p.mul_(1.1)
    method._follow(model, 0.5)
    again = Contriever(momentum=0.5)
    again.load_state_dict(method.state_dict())
    again._follow(model, 1.0)  # restores; the next step moves it on
    for a, b in zip(method._keys.network.parameters(), again._keys.network.parameters()):
        assert torch.equal(a, b)


def test_bad_settings():
    with pytest.raises(RecipeError, match="low"):
        Contriever(low=0.6, high=0.5)
