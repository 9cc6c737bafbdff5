"""Attention by parts is attention over the whole bin: the same outputs and gradients, with fewer products."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from luthier.core import prefix_attention, tree_attention
from luthier.core.batch import Sequence, TokenForest
from luthier.core.families import CausalLM

SHARED = [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6], [1, 2, 3, 9, 9], [1, 2, 3, 9, 8, 7], [1, 2, 3, 9, 8, 7], [30, 31, 32, 33], [30, 31, 34]]
"""A tree of several levels, a sequence twice, one that is another's beginning, and a second root."""


def sequences(ids: list[list[int]]) -> list[Sequence]:
    return [Sequence(np.array(i), np.arange(len(i)) > 0) for i in ids]


@pytest.fixture(params=["copied", "in place"])
def always(request, monkeypatch):
    """Every bin taken apart; keys and values of beginnings copied to each sequence behind them, or read where they are."""
    monkeypatch.setattr(tree_attention, "WORTH", -(10**9))
    monkeypatch.setattr(prefix_attention, "CALL", 0 if request.param == "in place" else 10**9)


def model(kv: int = 2) -> CausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=kv)
    return CausalLM(LlamaForCausalLM(config), None)


def passed(lm: CausalLM, forest: TokenForest) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Hidden states where something is predicted, and the gradients of a sum over them that counts each differently."""
    lm.network.zero_grad()
    found = lm.hidden(forest).flatten(0, 1)[forest.source]
    (found * torch.linspace(-1, 1, found.numel()).view_as(found)).sum().backward()
    return found.detach(), {n: p.grad.clone() for n, p in lm.network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kv", [1, 2, 4])
@pytest.mark.parametrize("limit", [8, 16, 64])
def test_the_numbers_of_separate_rows(always, kv, limit):
    lm, rows = model(kv), sequences(SHARED)
    forest = TokenForest.pack(rows, limit=limit, min_gain=0.0)
    assert forest.shared
    assert getattr(lm._masks(forest), "attention", None) is not None
    apart, grads = passed(lm, TokenForest.pack(rows, share=False))
    packed, found = passed(lm, forest)
    torch.testing.assert_close(packed, apart, rtol=1e-4, atol=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-5, msg=name)


def test_every_token_asks_once_and_nothing_of_other_paths(always):
    forest = TokenForest.pack(sequences(SHARED), min_gain=0.0)
    tree = tree_attention.Tree.of(forest, torch.float32, 16)
    whole = forest.allowed().squeeze(1)
    length, asked = forest.ids.shape[1], []
    place = tree.place.tolist()
    start = 0
    for part in tree.parts:
        q, k = part.queries.shape[1], part.keys.shape[1]
        for row in range(len(part.queries)):
            for i in range(q):
                at = int(part.queries[row, i])
                if place[at] != start + row * q + i:
                    continue  # padding
                asked.append(at)
                sees = part.mask[row, 0, i] == 0 if part.mask is not None else torch.arange(k) <= i
                keys = sorted(part.keys[row][sees].tolist())
                assert keys == (whole[at // length, at % length].nonzero().flatten() + at // length * length).tolist()
        start += part.queries.numel()
    assert sorted(asked) == sorted({int(p) + b * length for b, path in forest.slots for p in path})


@pytest.mark.parametrize("mode", ["dropout", "other kernels", "function mode", "second derivatives"])
def test_copies_where_the_kernel_may_not_be_called_by_hand(mode, monkeypatch):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.overrides import TorchFunctionMode

    monkeypatch.setattr(tree_attention, "WORTH", -(10**9))
    monkeypatch.setattr(prefix_attention, "CALL", 0)
    tree = tree_attention.Tree.of(TokenForest.pack(sequences(SHARED[:5]), min_gain=0.0), torch.float32, 16)
    assert tree.prefixes is not None
    length = len(tree.place)
    q, k, v = (torch.randn(1, heads, length, 8, requires_grad=True) for heads in (4, 2, 2))
    usual = tree(q, k, v, 0.0, None)
    monkeypatch.setattr(tree, "prefixes", lambda *_: pytest.fail("it was called by hand"))
    if mode == "dropout":
        assert tree(q, k, v, 0.5, None).shape == usual.shape
    elif mode == "function mode":

        class Looks(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                return func(*args, **(kwargs or {}))

        with Looks():
            torch.testing.assert_close(tree(q, k, v, 0.0, None), usual)
    else:
        with sdpa_kernel(SDPBackend.MATH):
            again = tree(q, k, v, 0.0, None)
            torch.testing.assert_close(again, usual)
            (first,) = torch.autograd.grad(again.square().sum(), q, create_graph=True)
            assert first.sum().requires_grad


def test_joined_parts_in_half_precision_and_with_a_scale(monkeypatch):
    monkeypatch.setattr(prefix_attention, "CALL", 0)
    monkeypatch.setattr(tree_attention, "WORTH", -(10**9))
    forest = TokenForest.pack(sequences(SHARED), min_gain=0.0, limit=16)
    tree, whole = tree_attention.Tree.of(forest, torch.float32, 16), forest.allowed()
    bins, length = forest.ids.shape
    real = torch.from_numpy(forest.nodes >= 0)
    for dtype, near in ((torch.float64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 4e-2)):
        q, k, v = (torch.randn(bins, length, 4, 8, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3))
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=whole, scale=0.3).transpose(1, 2)
        found = tree.prefixes(q, k, v, 0.3)
        torch.testing.assert_close(found[real], expected[real], rtol=near, atol=near)
        weight = torch.randn_like(found) * real[..., None, None]
        for a, b in zip(*(torch.autograd.grad((o * weight).sum(), (q, k, v)) for o in (found, expected))):
            torch.testing.assert_close(a, b, rtol=near, atol=near)


def test_under_gradient_checkpoints(always):
    lm, forest = model(), TokenForest.pack(sequences(SHARED), min_gain=0.0)
    usual = passed(lm, forest)
    lm.network.train()
    lm.network.gradient_checkpointing_enable({"use_reentrant": False})
    again = passed(lm, forest)
    for name, grad in usual[1].items():
        torch.testing.assert_close(again[1][name], grad)


def test_fewer_products():
    from luthier.core.meters import Flops

    prompt = list(np.random.default_rng(0).integers(1, 50, 120))
    forest = TokenForest.pack(sequences([[*prompt, *([i] * 30)] for i in range(6)]))
    lm, spent = model(), []
    for worth in (10**12, 0):
        tree_attention.WORTH, kept = worth, tree_attention.WORTH
        try:
            with torch.no_grad(), Flops() as flops:
                lm.hidden(forest)
        finally:
            tree_attention.WORTH = kept
        spent.append(flops.total)
    pairs = 300 * 300 - (150 * 150 + 5 * 30 * 150)
    assert spent[0] - spent[1] == 2 * 4 * pairs * 16  # two layers, two products of 2 * 16 each


def test_small_bins_and_two_way_prefixes_keep_their_mask():
    assert tree_attention.Tree.of(TokenForest.pack(sequences(SHARED), min_gain=0.0), torch.float32, 16) is None
    rows = sequences(SHARED)
    rows[0].prefix = 3
    assert tree_attention.Tree.of(TokenForest.pack(rows), torch.float32, 10**9) is None
