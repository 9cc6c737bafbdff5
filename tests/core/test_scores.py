"""TokenScores against full logits, and both ways of forming gradients against autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from luthier.core.batch import Sequence
from luthier.core.families import CausalLM
from luthier.core.scores import Head, TokenScores, entropy, kl, log_prob
from tests.helpers import tiny_llama, tiny_tokenizer


def scores_of(n: int = 11, width: int = 6, vocab: int = 9, chunk: int = 4, frozen: bool = False, bias: bool = False, scale: float = 1.0, softcap=None):
    generator = torch.Generator().manual_seed(n)
    projection = nn.Linear(width, vocab, bias=bias)
    with torch.no_grad():
        for p in projection.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    projection.requires_grad_(not frozen)
    hidden = torch.randn(n, width, generator=generator).requires_grad_()
    target = torch.randint(vocab, (n,), generator=generator)
    sequence = torch.tensor([0] * (n // 2) + [2] * (n - n // 2))
    return TokenScores(hidden, Head(projection, scale, softcap), target, sequence, 3, chunk)


def full(scores: TokenScores) -> torch.Tensor:
    logits = scores.head.projection(scores.hidden) * scores.head.scale
    return logits if scores.head.softcap is None else scores.head.softcap * torch.tanh(logits / scores.head.softcap)


@pytest.mark.parametrize("chunk", [1, 4, 1000])
@pytest.mark.parametrize("more", [{}, {"bias": True, "scale": 0.3}, {"softcap": 2.0}, {"frozen": True}])
def test_values_equal_the_full_softmax(chunk, more):
    scores, other = scores_of(chunk=chunk, **more), scores_of(chunk=chunk, width=5)
    other.target = scores.target
    p, q = torch.softmax(full(scores), -1), torch.softmax(full(other), -1)
    torch.testing.assert_close(scores.logp, p.log()[torch.arange(len(p)), scores.target])
    torch.testing.assert_close(scores.entropy, torch.distributions.Categorical(p).entropy())
    torch.testing.assert_close(scores.kl(other), F.kl_div(p.log(), q, reduction="none").sum(-1))
    torch.testing.assert_close(scores.kl(other, "reverse"), F.kl_div(q.log(), p, reduction="none").sum(-1))
    assert torch.equal(scores.hit, p.argmax(-1) == scores.target)


@pytest.mark.parametrize("more", [{}, {"bias": True, "scale": 0.3}])
def test_frozen_and_trainable_heads_give_the_body_the_same_gradient(more):
    frozen, trainable = scores_of(frozen=True, **more), scores_of(**more)
    weights = torch.randn(11, generator=torch.Generator().manual_seed(1))
    grads = [torch.autograd.grad((s.logp * weights).sum(), s.hidden)[0] for s in (frozen, trainable)]
    logp = F.log_softmax(full(trainable), -1)[torch.arange(11), trainable.target]
    (wanted,) = torch.autograd.grad((logp * weights).sum(), trainable.hidden)
    torch.testing.assert_close(grads[0], wanted)
    torch.testing.assert_close(grads[1], wanted)


def test_the_head_itself_gets_its_gradient():
    scores = scores_of(bias=True)
    wanted = torch.autograd.grad(F.cross_entropy(full(scores), scores.target, reduction="sum"), list(scores.head.projection.parameters()))
    found = torch.autograd.grad(-scores.logp.sum(), list(scores.head.projection.parameters()))
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("what", ["entropy", "kl", "reverse"])
def test_gradients_of_entropy_and_kl(what):
    scores, other = scores_of(), scores_of(width=5)
    other.hidden.requires_grad_()
    p, q = F.log_softmax(full(scores), -1), F.log_softmax(full(other), -1).detach()
    if what == "entropy":
        found, wanted = scores.entropy, -(p.exp() * p).sum(-1)
    elif what == "kl":
        found, wanted = scores.kl(other), (q.exp() * (q - p)).sum(-1)
    else:
        found, wanted = scores.kl(other, "reverse"), (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), scores.hidden, retain_graph=True)[0], torch.autograd.grad(wanted.sum(), scores.hidden)[0])
    assert what == "entropy" or torch.autograd.grad(found.sum(), other.hidden, allow_unused=True)[0] is None


def test_map_joins_tuples_and_never_holds_more_than_a_chunk():
    scores = scores_of(chunk=4)
    rows = []
    scores.head.projection.register_forward_hook(lambda m, given, out: rows.append(len(out)))
    best, logits = scores.map(lambda z, at: (z.argmax(-1), z))
    assert max(rows) == 4 and sum(rows) == 11
    torch.testing.assert_close(logits, full(scores))
    assert torch.equal(best, logits.argmax(-1))


def test_rows_sum_and_mean():
    scores = scores_of()
    logp = scores.logp
    torch.testing.assert_close(scores.rows("sum"), torch.stack([logp[:5].sum(), torch.tensor(0.0), logp[5:].sum()]))
    torch.testing.assert_close(scores.rows("mean"), torch.stack([logp[:5].mean(), torch.tensor(0.0), logp[5:].mean()]))
    torch.testing.assert_close(scores.rows("mean", torch.arange(11.0)), torch.tensor([2.0, 0.0, 7.5]))


def test_nothing_supervised():
    scores = scores_of(n=1)
    scores.hidden, scores.target, scores.sequence = scores.hidden[:0], scores.target[:0], scores.sequence[:0]
    for value in (scores.logp, scores.entropy, scores.kl(scores.detach())):
        assert value.shape == (0,)
        value.sum().backward()
    assert scores.hit.shape == (0,) and scores.hit.dtype == torch.bool
    assert [v.shape for v in scores.map(lambda z, at: (z, z.argmax(-1)))] == [(0, 9), (0,)]
    assert scores.rows("mean").tolist() == [0, 0, 0]


def test_impossible_tokens_give_no_nan():
    logits = torch.tensor([[0.0, 1.0, -torch.inf]]).requires_grad_()
    other = torch.tensor([[2.0, 1.0, -torch.inf]])
    for value in (entropy(logits), kl(logits, other), kl(other, logits), log_prob(logits, torch.tensor([1]))):
        assert torch.isfinite(value).all()
        assert torch.isfinite(torch.autograd.grad(value.sum(), logits)[0]).all()
    assert kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -torch.inf]])).item() == torch.inf


@pytest.mark.parametrize(
    "kind, more",
    [("Gemma2", {"final_logit_softcapping": 1.5, "attn_logit_softcapping": None}), ("Granite", {"logits_scaling": 4.0}), ("Cohere", {"logit_scale": 0.25})],
)
def test_heads_that_change_their_logits(kind, more):
    fields = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
              "head_dim": 8, "initializer_range": 0.4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3}  # fmt: skip
    torch.manual_seed(0)
    network = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**fields, **more)).eval()
    family = CausalLM(network, tiny_tokenizer(32))
    ids = np.array([5, 9, 7, 20, 11])
    with torch.no_grad():
        found = family.score([Sequence(ids, np.arange(5) > 0)]).logp
        logits = network(input_ids=torch.from_numpy(ids)[None]).logits[0, :-1]
    torch.testing.assert_close(found, torch.log_softmax(logits, -1)[torch.arange(4), torch.from_numpy(ids[1:])], rtol=1e-5, atol=1e-5)


def test_lora_on_the_head_is_scored_with_it():
    from peft import LoraConfig, get_peft_model

    family = tiny_llama()
    family.network = get_peft_model(family.network, LoraConfig(target_modules=["lm_head", "q_proj"], init_lora_weights=False))
    assert not family.head.linear
    ids = np.array([5, 9, 7, 20, 11])
    with torch.no_grad():
        logits = family.network(input_ids=torch.from_numpy(ids)[None]).logits[0, :-1]
        found = family.score([Sequence(ids, np.arange(5) > 0)]).logp
    torch.testing.assert_close(found, torch.log_softmax(logits, -1)[torch.arange(4), torch.from_numpy(ids[1:])], rtol=1e-5, atol=1e-5)


def test_autocast_keeps_scores_close():
    family = tiny_llama()
    rows = [Sequence(np.array([5, 6, 7, 8, 9, t]), np.arange(6) > 2) for t in (10, 11)]
    assert family.forest(rows).shared
    with torch.no_grad():
        exact = family.score(rows).logp
        with torch.autocast("cpu", torch.bfloat16):
            rough = family.score(rows).logp
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.1, atol=0.3)


def test_kl_between_vocabularies_of_different_size():
    """Tokens that were added to one of the models: impossible for the other as p, left out of the other as q."""
    from scipy.special import rel_entr, softmax

    small, large = torch.randn(5, 7), torch.randn(5, 9)
    p, q = softmax(small.numpy(), -1), softmax(large.numpy(), -1)
    np.testing.assert_allclose(kl(small, large), rel_entr(np.pad(p, ((0, 0), (0, 2))), q).sum(-1), rtol=1e-4)
    known = q[:, :7] / q[:, :7].sum(-1, keepdims=True)
    np.testing.assert_allclose(kl(large, small), rel_entr(known, p).sum(-1), rtol=1e-4)
