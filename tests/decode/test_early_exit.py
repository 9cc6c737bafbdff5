"""Early exit: caches and answers are the full model's where it never exits, drafts change nothing, sampling keeps the distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from luthier.core.exits import Segments
from luthier.core.families import Decode
from luthier.core.meters import Flops
from luthier.decode.early_exit import Depths, EarlyExit, accepted, early_exit
from luthier.errors import ModelError, RecipeError
from tests.helpers import tiny_llama

PROMPTS = [np.array([20 + i, 21, 22, 23, 24][: 2 + i % 4]) for i in range(5)]
SHORT = Decode(max_new_tokens=7)


@pytest.fixture(scope="module")
def model():
    return tiny_llama(layers=4, seed=3)


def ids(answers):
    return [[a.ids.tolist() for a in group] for group in answers]


@pytest.mark.parametrize("settings", [{"threshold": 1.0}, {"mode": "speculative"}, {"mode": "speculative", "draft": 1, "exits": [2]}, {"mode": "fixed", "depth": 4}])
def test_greedy_answers_are_the_full_models(model, settings):
    found = EarlyExit(**{"exits": [1, 3], **settings}).wrap(model).generate(PROMPTS, SHORT)
    assert ids(found) == ids(model.generate(PROMPTS, SHORT))


def test_drafts_that_all_stand_save_passes():
    """A network whose deeper blocks add nothing agrees with its own first block."""
    model = tiny_llama(layers=3)
    with torch.no_grad():
        for block in model.network.model.layers[1:]:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    (answer,) = EarlyExit(mode="speculative", exits=[1], draft=3).wrap(model).generate(PROMPTS[:1], Decode(max_new_tokens=8))[0]
    assert answer.info["accepted"] == answer.info["drafted"] > 0
    assert ids([[answer]]) == ids(model.generate(PROMPTS[:1], Decode(max_new_tokens=8)))


def test_keys_and_values_are_exact_whatever_the_exits(model):
    """Tokens that exit at changing depths, then one that goes to the end: the cache is that of a plain pass."""
    segments = Segments(model, [0, 1, 3, 4])
    text, tokens = Depths(segments), [20, 25, 30, 31, 32, 40]
    with torch.no_grad():
        text.read(tokens[:2])
        for piece in range(3):
            text.through(piece)
        for token, deep in zip(tokens[2:], (1, 2, 1, 3)):
            text.read([token])
            for piece in range(deep):
                state = text.through(piece)
        plain = model.network(torch.tensor([tokens]), use_cache=True)
    assert text.layers == 4 * len(tokens), "all was computed in the end, and once"
    for mine, theirs in zip(text.cache.layers, plain.past_key_values.layers):
        torch.testing.assert_close(mine.keys, theirs.keys, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(mine.values, theirs.values, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.head(state[-1:]), plain.logits[0, -1:], atol=1e-4, rtol=1e-4)


def test_each_token_comes_from_the_first_sure_exit(model):
    with torch.no_grad():
        first = Segments(model, [0, 1, 4]).run(0, torch.arange(20, 60)[None])[1]
        threshold = float(model.head(first[0]).softmax(-1).amax(-1).median())
    (answer,) = EarlyExit(exits=[1, 3], threshold=threshold).wrap(model).generate(PROMPTS[:1], Decode(max_new_tokens=12))[0]
    text = PROMPTS[0].tolist()
    for token, depth in zip(answer.ids.tolist(), answer.info["depths"]):
        with torch.no_grad():
            states = model.network(torch.tensor([text]), output_hidden_states=True).hidden_states
            read = [model.head(model.network.model.norm(states[n][0, -1])) for n in (1, 3)] + [model.head(states[4][0, -1])]
        chosen = early_exit(read, threshold)
        assert depth == (1, 3, 4)[chosen] and token == int(read[chosen].argmax())
        text.append(token)
    assert len(set(answer.info["depths"])) > 1, "the threshold divides these tokens"


def test_fewer_operations_and_fixed_depth_for_scores(model):
    spent = {}
    for name, method in (("full", EarlyExit(threshold=1.0)), ("early", EarlyExit(exits=[1], threshold=1e-6))):
        wrapped = method.wrap(model)
        with Flops() as flops:
            wrapped.generate(PROMPTS[:2], SHORT)
        spent[name] = flops.total
    assert spent["early"] < spent["full"]
    fixed = EarlyExit(mode="fixed", depth=2).wrap(model)
    cut = tiny_llama(layers=4, seed=3)
    cut.network.model.layers = cut.network.model.layers[:2]
    assert ids(fixed.generate(PROMPTS, SHORT)) == ids(cut.generate(PROMPTS, SHORT))
    batch = model.collate([{"prompt": "w1 w2", "completion": "w3 w4"}])
    with torch.no_grad():
        torch.testing.assert_close(fixed.score(batch).logp, cut.score(batch).logp)
        assert len(model.network.model.layers) == 4 and not torch.allclose(model.score(batch).logp, cut.score(batch).logp)


def test_speculative_draws_are_distributed_as_the_full_models():
    rng = torch.Generator().manual_seed(0)
    q, p = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.2, 0.3, 0.5])
    first = torch.zeros(3)
    for _ in range(6000):
        token = int(torch.multinomial(q, 1, generator=rng))
        right, follows = accepted([token], q[None], torch.stack([p, p]), rng)
        first[token if right else follows] += 1
    torch.testing.assert_close(first / 6000, p, atol=0.025, rtol=0)
    hot = torch.eye(3)
    assert accepted([1, 0], hot[[1, 0]], hot[[1, 2, 0]]) == (1, 2), "greedy: the first that differs is replaced"
    assert accepted([1, 0], hot[[1, 0]], hot[[1, 0, 2]]) == (2, 2)


def test_sampling_is_seeded_and_gives_n(model):
    wrapped = EarlyExit(exits=[1], threshold=0.2).wrap(model)
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        found.append(ids(wrapped.generate(PROMPTS[:2], Decode(max_new_tokens=5, temperature=1.0), n=3)))
    assert found[0] == found[1] and [len(g) for g in found[0]] == [3, 3] and len({tuple(a) for a in found[0][0]}) > 1


def test_what_is_refused(model):
    for bad in ({"mode": "late"}, {"threshold": 0.0}, {"draft": 0}, {"exits": [0]}):
        with pytest.raises(RecipeError, match=next(iter(bad))):
            EarlyExit(**bad)
    with pytest.raises(RecipeError, match="depth 9"):
        EarlyExit(exits=[9]).wrap(model)
    from transformers import GPT2Config, GPT2LMHeadModel

    from luthier.core.families import CausalLM

    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)).eval()
    with pytest.raises(ModelError, match="parts"):
        EarlyExit(exits=[1]).wrap(CausalLM(gpt, model.tokenizer))
