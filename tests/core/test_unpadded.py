"""Texts in one row give the vectors and gradients of the padded batch, and of each text alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from luthier.core import unpadded
from luthier.core.encoders import TextEncoder
from tests.helpers import tiny_bert, tiny_tokenizer

TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w1", "w8", "w2 w2 w2", "w9 w8 w7 w6 w5 w4 w3 w2 w1"]
SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "pad_token_id": 0, "max_position_embeddings": 40}
KINDS = {
    "bert": transformers.BertConfig(**SIZES), "roberta": transformers.RobertaConfig(**SIZES), "xlm-roberta": transformers.XLMRobertaConfig(**SIZES),
    "camembert": transformers.CamembertConfig(**SIZES), "electra": transformers.ElectraConfig(**SIZES), "albert": transformers.AlbertConfig(**SIZES, embedding_size=8),
    "distilbert": transformers.DistilBertConfig(vocab_size=64, dim=16, n_layers=2, n_heads=2, hidden_dim=24, pad_token_id=0, max_position_embeddings=40),
    "mpnet": transformers.MPNetConfig(**SIZES),
}  # fmt: skip


def family(config: transformers.PretrainedConfig, how: str = "mean") -> TextEncoder:
    torch.manual_seed(0)
    network = transformers.AutoModel.from_config(config)
    for param in network.parameters():
        param.data.normal_(0, 0.3)
    return TextEncoder(network.eval(), tiny_tokenizer(), pooling=how)


def passed(model: TextEncoder, texts: list[object]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The vectors, and the gradients of a sum over them that counts each number differently."""
    model.network.zero_grad()
    found = model.embed(texts)
    (found * torch.linspace(-1, 1, found.numel()).view_as(found)).sum().backward()
    return found.detach(), {n: p.grad.clone() for n, p in model.network.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("kind", sorted(unpadded.FIRST))
@pytest.mark.parametrize("how", ["mean", "cls", "max", "last"])
def test_vectors_and_gradients_are_those_of_the_padded_batch(kind, how, monkeypatch):
    model = family(KINDS[kind], how)
    assert unpadded.fits(model.encoder)
    found, grads = passed(model, TEXTS)
    monkeypatch.setattr(unpadded, "fits", lambda encoder: False)
    usual, wanted = passed(model, TEXTS)
    torch.testing.assert_close(found, usual, rtol=1e-4, atol=1e-5)
    assert {n for n, g in wanted.items() if g.abs().max() > 1e-4} <= set(grads)
    for name in grads:
        torch.testing.assert_close(grads[name], wanted.get(name, torch.zeros_like(grads[name])), rtol=1e-3, atol=1e-4)


def test_segments_of_pairs_of_texts_are_kept():
    model = family(KINDS["bert"])
    pairs = [("w1 w2", "w3"), ("w4", "w5 w6 w7"), "w8 w9 w1 w2 w3"]
    together = model.embed(pairs)
    for pair, vector in zip(pairs, together):
        torch.testing.assert_close(vector, model.embed([pair])[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], model.embed(["w1 w2 w3"])[0], atol=1e-3)


def test_positions_that_attention_counts_itself_are_left_padded():
    model = family(KINDS["mpnet"])
    assert not unpadded.fits(model.encoder)
    for text, vector in zip(TEXTS, model.embed(TEXTS)):
        torch.testing.assert_close(vector, model.embed([text])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "mpnet"])
def test_dropout_falls_alike_with_a_gradient_and_without(kind):
    """Cached gradients embed everything twice and replay what chance drew."""
    model = family(KINDS[kind])
    model.network.train()
    found = []
    for grad in (True, False):
        torch.manual_seed(3)
        with torch.set_grad_enabled(grad):
            found.append(model.embed(TEXTS * 20).detach())
    assert torch.equal(*found) and not torch.equal(found[0][:6], found[0][6:12])


def test_who_looks_on_sees_the_padded_batch():
    model, seen = tiny_bert(), []
    model.embed(TEXTS)
    handle = model.encoder.encoder.layer[0].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    watched = model.embed(TEXTS)
    handle.remove()
    assert seen == [torch.Size([6, 11, 32])]
    torch.testing.assert_close(watched, model.embed(TEXTS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", ["eager", "decoder", "own layer", "own forward"])
def test_other_networks_get_a_padded_batch(change):
    class Own(torch.nn.Linear):
        pass

    model = tiny_bert()
    layer = model.encoder.encoder.layer[0].output
    assert unpadded.fits(model.encoder)
    if change == "eager":
        model.encoder.set_attn_implementation("eager")
    elif change == "decoder":
        model.encoder.config.is_decoder = True
    elif change == "own layer":
        layer.dense = Own(layer.dense.in_features, layer.dense.out_features)
    else:
        layer.dense.forward = lambda x: x
    assert not unpadded.fits(model.encoder)


def test_the_mask_says_the_same_to_those_who_read_it():
    model = tiny_bert()
    sequences = sorted((model.encode(t) for t in TEXTS), key=len)
    groups, inputs = unpadded.inputs(model.encoder, sequences, model.device)
    assert groups.sizes == ((2, 3), (2, 5), (1, 8), (1, 11))
    with torch.no_grad():
        fast = model.encoder(**inputs).last_hidden_state
        read = model.encoder(**{**inputs, "attention_mask": inputs["attention_mask"].clone()}).last_hidden_state
    torch.testing.assert_close(fast, read, rtol=1e-4, atol=1e-5)


def test_rows_hold_texts_of_like_length_and_so_many_tokens(monkeypatch):
    model = tiny_bert()
    rng = np.random.default_rng(0)
    sequences = [model.encode(rng.integers(5, 30, n)) for n in rng.integers(1, 40, 100)]
    monkeypatch.setattr(unpadded, "TOKENS", 120)
    for packed in (True, False):
        rows = list(unpadded.rows_of(sequences, 8, packed))
        assert sorted(i for row in rows for i in row) == list(range(100))
        lengths = [[len(sequences[i]) for i in row] for row in rows]
        every = [n for row in lengths for n in row]
        assert every == sorted(every)
        assert all(len(row) <= 8 for row in rows)
        assert all(sum(row) <= 120 for row in lengths) is packed
