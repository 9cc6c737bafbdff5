"""Masked-thought: what may change, how often, and what must not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binom

from luthier.core.context import Clock, Context
from luthier.core.families import Decode
from luthier.errors import RecipeError
from luthier.objective.asft import ASFT
from luthier.objective.masked_thought import MaskedThought, add_mask_token, masked_thought
from luthier.objective.sft import SFT
from tests.helpers import tiny_llama
from tests.objective.lm_batches import batch_of, engine, logps_of, random_batch, sequence


def at(fraction: float, family=None, seed: int = 0) -> Context:
    return Context(family or tiny_llama(), seed=seed, clock=Clock(step=round(1000 * fraction), steps=1000))


def test_corruption_is_binomial_and_even_over_the_vocabulary():
    n, rate, vocabulary = 20_000, 0.3, 50
    ids = np.full(n, 60)
    new = masked_thought(ids, np.ones(n, bool), rate, vocabulary, torch.Generator().manual_seed(0))
    low, high = binom.interval(0.9999, n, rate)
    assert low <= (new != ids).sum() <= high
    counts = np.bincount(new[new != 60], minlength=vocabulary)
    assert len(counts) == vocabulary and counts.min() > 60
    assert (ids == 60).all()


def test_mask_id_and_response_positions():
    ids, response = np.arange(10), np.arange(10) >= 4
    assert masked_thought(ids, response, 1.0, 10, mask_id=99).tolist() == [0, 1, 2, 3, 99, 99, 99, 99, 99, 99]
    assert masked_thought(list(ids), response, 0.0, 10).tolist() == list(range(10))


@pytest.mark.parametrize("mode", ["random", "mask"])
def test_prompt_labels_and_end_token_stay(mode):
    family = tiny_llama()
    batch = batch_of([sequence([7, 8, 9, 10, 11, 12, 13, 2], prompt=3)])
    before = batch.sequences[0]
    for seed in range(20):
        new = MaskedThought(rate=1.0, mode=mode, schedule="constant").prepare(batch, at(0.0, family, seed))
        s = new.sequences[0]
        assert new.touched and not batch.touched
        assert s.ids[:3].tolist() == [7, 8, 9] and s.ids[-1] == 2
        assert s.labels.tolist() == before.labels.tolist() and s.mask.tolist() == before.mask.tolist()
        assert before.ids.tolist() == [7, 8, 9, 10, 11, 12, 13, 2]
        if mode == "mask":
            assert (s.ids[3:-1] == 4).all()


def test_rate_zero_is_plain_sft():
    family, batch = tiny_llama(), random_batch()
    same = MaskedThought(rate=0.4).prepare(batch, at(0.0, family))
    assert same is batch
    expected = -torch.cat([logps_of(family, s) for s in batch.sequences]).mean()
    torch.testing.assert_close(MaskedThought().loss(family, same).mean(), expected, atol=1e-5, rtol=1e-5)


def test_fully_masked_input_makes_the_order_of_the_answer_irrelevant():
    """With every input hidden the model sees the prompt only: permuting the answer with the labels held fixed changes nothing."""
    family = tiny_llama()
    method = MaskedThought(rate=1.0, mode="mask", schedule="constant")
    answer = np.array([20, 21, 22, 23, 24])
    losses = []
    for order in ([0, 1, 2, 3, 4], [3, 1, 4, 0, 2]):
        s = sequence(np.concatenate([[7, 8, 9], answer[order]]), prompt=3)
        s.targets = np.concatenate([[7, 8, 9], answer])
        losses.append(float(SFT().loss(family, method.prepare(batch_of([s]), at(0.0, family))).mean().detach()))
    assert losses[0] == losses[1]


def test_schedule():
    method = MaskedThought(rate=0.4, warmup=0.5)
    assert [round(method.rate_at(at(f)), 6) for f in (0.0, 0.25, 0.5, 1.0)] == [0.0, 0.2, 0.4, 0.4]
    assert MaskedThought(rate=0.4, schedule="constant").rate_at(at(0.0)) == 0.4
    ctx = at(0.0)
    drawn = [MaskedThought(rate=0.4, schedule="uniform").rate_at(ctx, ctx.rng("x")) for _ in range(300)]
    assert max(drawn) <= 0.4 and min(drawn) < 0.02 and abs(np.mean(drawn) - 0.2) < 0.03


def test_fresh_at_every_visit_and_repeatable_from_the_seed():
    family, batch = tiny_llama(), random_batch(rows=4)
    method = MaskedThought(rate=0.5, schedule="constant")
    ctx = at(0.0, family)
    first, second = (np.concatenate([s.ids for s in method.prepare(batch, ctx).sequences]) for _ in range(2))
    again = np.concatenate([s.ids for s in method.prepare(batch, at(0.0, family)).sequences])
    assert (first != second).any() and (first == again).all()


@pytest.mark.parametrize("tied", [False, True])
def test_a_new_mask_token_starts_at_the_mean_and_is_never_generated(tied):
    family = tiny_llama(tie_word_embeddings=tied)
    network = family.network
    into, out = network.get_input_embeddings().weight, network.get_output_embeddings().weight
    means = into.detach().mean(0), out.detach().mean(0)
    batch = random_batch()
    before = family.score(batch).map(lambda z, i: z).detach()
    ctx = Context(family, models={"stage": tiny_llama})
    MaskedThought(mode="mask", mask_token="<hole>").attach(family, ctx)
    index = family.processor.convert_tokens_to_ids("<hole>")
    assert index == 64 and network.get_input_embeddings().weight is into and network.get_output_embeddings().weight is out
    torch.testing.assert_close(into[index].detach(), means[0])
    torch.testing.assert_close(out[index].detach(), means[1])
    after = family.score(batch).map(lambda z, i: z).detach()
    torch.testing.assert_close(after[:, :64], before)
    # make it by far the likeliest token: it still never comes
    with torch.no_grad():
        network.get_output_embeddings().weight[index] = 50 * family.hidden(family.forest(batch.sequences[:1]))[0, -1]
    answers = family.generate([[7, 8, 9]], Decode(max_new_tokens=12, temperature=1.0), n=8)[0]
    assert not any(index in a.ids for a in answers)
    corrupted = MaskedThought(mode="mask", mask_token="<hole>", rate=1.0).prepare(batch, at(1.0, family))
    assert torch.isfinite(SFT().loss(family, corrupted).mean())
    # a reference of the same tokenizer reads the token too
    assert ctx.model("stage").network.get_input_embeddings().weight.shape[0] == 65
    assert add_mask_token(family, "<hole>") == index and into.shape[0] == 65


def test_a_known_mask_token_is_left_as_it_is():
    family = tiny_llama()
    before = family.network.get_input_embeddings().weight.detach().clone()
    MaskedThought(mode="mask").attach(family, Context(family))
    assert torch.equal(family.network.get_input_embeddings().weight, before)
    assert family.network.generation_config.suppress_tokens == [4]


@pytest.mark.parametrize("bad", [{"rate": 1.2}, {"warmup": -0.1}, {"mode": "drop"}, {"schedule": "cosine"}, {"mask_token": ""}])
def test_bad_fields_are_refused(bad):
    with pytest.raises(RecipeError, match=next(iter(bad))):
        MaskedThought(**bad)


def test_it_composes_with_another_supervised_loss_in_the_loop():
    family = tiny_llama()
    rows = [{"prompt": "w1 w2", "completion": "w3 w4 w5"}, {"prompt": "w5", "completion": "w6 w7"}]
    ctx = Context(family, models={"stage": family.frozen_copy()})
    seen = []
    method, loss = MaskedThought(rate=0.9, warmup=0.3), ASFT()
    inner = loss.loss
    loss.loss = lambda model, batch, ctx: seen.append(batch.touched) or inner(model, batch, ctx)  # type: ignore[method-assign]
    outcome = engine(family, [method, loss], rows, ctx, steps=4).run()
    assert seen == [False, True, True, True] and set(outcome.losses) == {"asft", "loss"}
