"""LeMo: ratio 1 is dense, dropped tokens pass by untouched, positions stay, and autograd keeps as much less as tokens are left out."""

from __future__ import annotations

import copy

import pytest
import torch

from luthier.adapt.lemo import LeMo, Predictor, block_scores, fit_predictor, lemo, recall
from luthier.adapt.lora import Lora
from luthier.core.meters import saved_bytes
from luthier.errors import ModelError, RecipeError
from tests.adapt._rows import by_ids, context, llama
from tests.helpers import tiny_bert, tiny_llama

LONG = [{"ids": [(7 * i + 3 * j * j) % 40 + 5 for j in range(n)]} for i, n in enumerate((24, 24, 17, 24))]


def attached(model=None, **fields):
    model = model or llama(layers=3)
    torch.manual_seed(0)
    method = LeMo(**{"block_size": 4, "first": 0, "scores": "oracle", "rank": 2, **fields})
    parts = method.attach(model, context(model, LONG))
    with torch.no_grad():
        for i, p in enumerate(parts.groups[0].params.values()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.1)
    return model, method, parts


def batch(model, rows=LONG):
    return model.collate(rows)


def test_scores_are_the_pooled_positive_products():
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 10, 4), torch.randn(2, 3, 10, 4)
    whole = torch.relu(q @ k.transpose(2, 3)).sum(1).tril()
    a = block_scores(q, k, 4)
    for i in range(3):
        for j in range(i + 1):
            wanted = whole[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].amax((1, 2))
            torch.testing.assert_close(a[:, i, j], wanted)
            torch.testing.assert_close(a[:, j, i], wanted)
    real = torch.arange(10) < torch.tensor([[10], [6]])
    hidden = block_scores(q, k, 4, real)
    torch.testing.assert_close(hidden[0], a[0])
    torch.testing.assert_close(hidden[1, 1, 0], whole[1, 4:6, :4].max())
    assert not hidden[1, 2].any()


def test_kept_tokens_are_sorted_unique_whole_blocks_of_the_best():
    scores = torch.tensor([[1.0, 5, 3, 2, 4], [9, 1, 2, 8, 0]])
    kept = lemo(scores, 20, 4, 0.4)
    assert kept.tolist() == [[*range(4, 8), *range(16, 20)], [*range(4), *range(12, 16)]]
    ragged = lemo(scores, 18, 4, 0.4)
    assert ragged.tolist() == [[*range(4, 8), 16, 17], [*range(4), 16, 17]], "a last block that is not full stays"
    assert lemo(scores, 20, 4, 1.0) is None and lemo(scores, 20, 4, 0.01).shape == (2, 4)
    assert lemo(scores, 20, 4, threshold=0.6).shape == (2, 12), "as many as the row that needs most"
    assert lemo(scores, 20, 4, 0.6).shape == (2, 12), "0.6 x 5 is 3, whatever floats say"
    assert lemo(scores, 20, 4, 0.5).shape == (2, 8), "half of 5 is 2, as the release has it"


def test_ratio_one_is_plain_lora():
    found = []
    for ratio in (1.0, None):
        model = llama(layers=3)
        torch.manual_seed(0)
        (LeMo(ratio=1.0, block_size=4, first=0, scores="oracle") if ratio else Lora(rank=8, alpha=16.0)).attach(model, context(model, LONG))
        with torch.no_grad():
            for n, p in model.network.named_parameters():
                if "lora_B" in n:
                    p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n))) * 0.1)
        model.train()
        loss = model.score(batch(model)).logp.mean()
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.network.parameters() if p.grad is not None)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def by_hand(block, x, mask, rope, kept, kept_ffn):
    """A layer whose dropped tokens are masked, not gathered: the same for the kept ones, and nothing is added for the others."""
    y = block.input_layernorm(x)
    hidden = torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1)
    hidden[:, [j for j in range(x.shape[1]) if j not in kept]] = -torch.inf
    hidden.fill_diagonal_(0)
    out, _ = block.self_attn(y, attention_mask=hidden[None, None], position_embeddings=rope)
    x = x + out * torch.tensor([[float(j in kept)] for j in range(x.shape[1])])
    return x + block.mlp(block.post_attention_layernorm(x)) * torch.tensor([[float(j in kept_ffn)] for j in range(x.shape[1])])


@pytest.mark.parametrize("mlp", [True, False])
def test_a_routed_layer_is_the_masked_one(mlp):
    """Original positions, causal among the kept, dropped tokens unchanged. (Masking instead of gathering would save nothing.)"""
    model, method, _ = attached(llama(layers=2), ratio=0.5, mlp=mlp)
    router, seen = method.routers[0], {}
    block = router.block
    block.register_forward_hook(lambda m, a, out: seen.update(out=out))
    block.register_forward_pre_hook(lambda m, a, kw: seen.update(x=a[0], rope=kw["position_embeddings"]), with_kwargs=True)
    keep = router._keep
    chosen = []
    router._keep = lambda scores: (chosen.append(keep(scores)), chosen[-1])[1]
    model.train()
    model.score(batch(model, LONG[:1]))
    routed, x, rope = seen["out"].detach(), seen["x"].detach(), seen["rope"]
    kept = chosen[0][0].tolist()
    kept_ffn = chosen[1][0].tolist() if mlp else list(range(24))
    assert len(kept) == 12 and len(chosen) == 1 + mlp
    model.eval()
    with torch.no_grad():
        wanted = by_hand(block, x, None, rope, kept, kept_ffn)
    torch.testing.assert_close(routed, wanted, atol=1e-5, rtol=1e-4)
    untouched = [j for j in range(24) if j not in kept and j not in kept_ffn]
    assert torch.equal(routed[0, untouched], x[0, untouched]) and (untouched or not mlp)


def test_only_training_passes_are_routed_and_padding_is_the_first_to_go():
    model, method, _ = attached(ratio=0.5)
    calls = []
    for router in method.routers.values():
        keep = router._keep
        router._keep = lambda scores, keep=keep: (calls.append(keep(scores)), calls[-1])[1]
    model.eval()
    plain = model.score(batch(model)).logp.detach()
    model.train()
    with torch.no_grad():
        assert torch.equal(model.score(batch(model)).logp, plain) and not calls
    routed = model.score(batch(model)).logp
    assert not torch.allclose(routed, plain, atol=1e-4)
    attention = calls[::2]
    assert len(attention) == 2, "the last layer is dense"
    assert all((kept[2] < 20).all() for kept in attention), "row 2 has 17 tokens: blocks that are padding only are left out"
    twin = model.frozen_copy()
    number = len(calls)
    with torch.no_grad():
        assert torch.equal(twin.score(batch(model)).logp, plain) and len(calls) == number


@pytest.mark.parametrize("scores", ["random", "recent", "oracle"])
def test_autograd_keeps_less_the_more_is_left_out(scores):
    kept = {}
    for ratio in (1.0, 0.75, 0.5, 0.25):
        model, _, _ = attached(by_ids(tiny_llama(layers=4, hidden=32)), ratio=ratio, scores=scores)
        model.train()
        rows = [{"ids": [(i + j) % 40 + 5 for j in range(64)]} for i in range(2)]
        with saved_bytes(model.network) as saved:
            hidden = model.hidden(model.forest(batch(model, rows).sequences))
            kept[ratio] = saved.now
        assert hidden.requires_grad
    assert kept[0.5] < 0.65 * kept[1.0], "three of four layers at half would be 0.625"
    steps = [kept[a] - kept[b] for a, b in ((1.0, 0.75), (0.75, 0.5), (0.5, 0.25))]
    assert steps[1] == pytest.approx(steps[2], rel=0.05) and steps[0] > 0.7 * steps[1], "linear in the ratio"


def test_gradient_checkpointing_chooses_the_same_tokens_again():
    found = []
    for again in (False, True):
        model, _, _ = attached(ratio=0.5, scores="random")
        if again:
            model.network.enable_input_require_grads()
            model.network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        torch.manual_seed(3)
        model.score(batch(model)).logp.mean().backward()
        found.append([p.grad for p in model.network.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_predictor_learns_what_it_is_shown():
    """Blocks that carry a mark attract attention; the net finds them on sequences it has not seen, and is smaller afterwards."""
    rng = torch.Generator().manual_seed(0)

    def sequence():
        marked = torch.zeros(8)
        marked[torch.randperm(8, generator=rng)[:3]] = 1
        x = torch.randn(1, 32, 8, generator=rng) * 0.3
        x[..., 0] += 1 - 2 * marked.repeat_interleave(4)
        a = (marked[:, None] + marked[None]) + 0.1
        return x, a[None]

    seen, held = [sequence() for _ in range(40)], [sequence() for _ in range(20)]
    net = Predictor(2, 8, 4, 32, rng)
    before = recall(net, held, 3 / 8)
    fit_predictor(net, seen, 300, rng)
    assert recall(net, held, 3 / 8) > max(0.85, before)
    assert not any(p.requires_grad for p in net.parameters()) and net.nets[0].shape[1] <= 32
    x = sequence()[0]
    assert torch.equal(net(x), net(x).transpose(1, 2)), "mirrored"


def test_shrinking_drops_what_is_never_above_zero():
    net = Predictor(2, 8, 4, 6, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for layer in (net.nets[i] for i in (0, 1, 3, 4)):
            layer[:, :4] = -layer[:, :4].abs()
    x = torch.rand(1, 32, 8)
    wanted = net(x)
    net.shrink([x], 0.0)
    assert net.nets[0].shape[1] <= 2 and net.nets[1].shape[1] <= 12 and net.nets[2].shape == (net.nets[1].shape[1], 4)
    torch.testing.assert_close(net(x), wanted)


def test_one_pair_of_nets_serves_all_heads():
    """By hand for two heads; the number of weights does not grow with the heads."""
    net, x = Predictor(2, 8, 4, 6, torch.Generator().manual_seed(0)), torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(1))
    a, b, c, d, e, f = net.nets
    total = torch.zeros(2, 2)
    for head in (0, 1):
        part = torch.stack([x[0, 4 * i : 4 * i + 4, 4 * head : 4 * head + 4].reshape(-1) for i in (0, 1)])
        total += ((part @ a).relu() @ b).relu() @ c @ (((part @ d).relu() @ e).relu() @ f).T
    torch.testing.assert_close(net(x)[0], torch.stack([total[0, 0], total[1, 0], total[1, 0], total[1, 1]]).view(2, 2))
    assert sum(p.numel() for p in Predictor(4, 16, 4, 6).nets) == sum(p.numel() for p in net.nets)


def test_predictors_are_reported_and_saved():
    model, method, parts = attached(scores="predictor", predictor_steps=5, samples=4, hidden=8)
    assert set(method.report) == {"0", "1"} and all(0 <= r["recall"] <= 1 and r["hidden"] <= 8 for r in method.report.values())
    assert all("lora" in n for g in parts.groups for n in g.params)
    again = attached(scores="predictor", predictor_steps=1, samples=4, hidden=8)[1]
    again.load_state_dict(copy.deepcopy(method.state_dict()))
    assert all(torch.equal(a, b) for i in (0, 1) for a, b in zip(method.routers[i].predictor.nets, again.routers[i].predictor.nets))
    model.train()
    assert torch.isfinite(model.score(batch(model)).logp).all()


def test_what_is_refused():
    for bad in ({"ratio": 0.0}, {"ratio": 1.5}, {"threshold": 2.0}, {"block_size": 0}, {"first": -1}, {"scores": "best"}):
        with pytest.raises(RecipeError, match=next(iter(bad))):
            LeMo(**bad)
    with pytest.raises(RecipeError, match="'first' is 2"):
        attached(first=2)
    with pytest.raises(RecipeError, match="lower 'block_size'"):
        attached(block_size=64, scores="predictor")
    with pytest.raises(ModelError, match="Llama-like"):
        LeMo(first=0).attach(tiny_bert())
