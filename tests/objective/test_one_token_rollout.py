"""One-token rollout: sampled against expected form, and both against the mathematics."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from luthier.core.context import Context
from luthier.errors import RecipeError
from luthier.objective.asft import asft
from luthier.objective.one_token_rollout import OneTokenRollout, draw, one_token_rollout
from tests.helpers import tiny_llama
from tests.objective.lm_batches import batch_of, engine, logits_of, random_batch, sequence


def gradient(logits, *args, **kw):
    z = logits.clone().requires_grad_()
    one_token_rollout(z, *args, **kw).sum().backward()
    return z.grad


def test_sampled_gradient_is_unbiased_for_the_expected_form():
    torch.manual_seed(0)
    logits, target = torch.randn(3, 6), torch.tensor([0, 3, 5])
    copies, targets = logits.repeat(400, 1), target.repeat(400)  # rows do not touch each other, so one pass holds 400 runs
    runs = gradient(copies, targets, draw(copies, 64)).reshape(400, 3, 6)
    error = runs.std(0) / 400**0.5
    assert ((runs.mean(0) - gradient(logits, target)).abs() <= 4 * error + 1e-7).all()


def test_sampled_value_equals_the_count_form():
    logits, target = torch.randn(4, 7), torch.randint(7, (4,))
    drawn = draw(logits, 50)
    counts = F.one_hot(drawn, 7).sum(1).float()
    assert (counts.sum(-1) == 50).all()
    reward = torch.full((4, 7), -0.1).scatter(1, target[:, None], 1.0)
    expected = -(counts * reward * torch.log_softmax(logits, -1)).sum(-1) / 50
    torch.testing.assert_close(one_token_rollout(logits, target, drawn), expected)


def test_draws_follow_the_tempered_distribution():
    logits = torch.randn(1, 5, generator=torch.Generator().manual_seed(3))
    counts = torch.bincount(draw(logits, 40_000, 1.7, torch.Generator().manual_seed(0))[0], minlength=5) / 40_000
    assert (counts - torch.softmax(logits[0] / 1.7, -1)).abs().max() < 0.01


def test_without_penalty_and_at_temperature_one_it_is_dft():
    logits, target = torch.randn(6, 9), torch.randint(9, (6,))
    torch.testing.assert_close(one_token_rollout(logits, target, wrong_reward=0.0, temperature=1.0), asft(logits, target, kl=0.0), atol=1e-6, rtol=1e-6)
    z = logits.clone().requires_grad_()
    asft(z, target, kl=0.0).sum().backward()
    torch.testing.assert_close(gradient(logits, target, wrong_reward=0.0, temperature=1.0), z.grad, atol=1e-6, rtol=1e-5)


def test_equal_rewards_have_no_gradient():
    """The score-function identity holds only if the sampling distribution is detached."""
    assert gradient(torch.randn(5, 8), torch.randint(8, (5,)), wrong_reward=1.0, temperature=1.0).abs().max() < 1e-6


def test_impossible_tokens_are_cut_at_the_floor():
    logits = torch.tensor([[0.0, -100.0]])
    value = one_token_rollout(logits, torch.tensor([0]), torch.tensor([[1, 1]]), wrong_reward=-0.1)
    assert float(value) == pytest.approx(-0.1 * 20)
    assert gradient(logits, torch.tensor([0]), torch.tensor([[1, 1]])).abs().max() == 0


def test_class_is_the_token_mean_and_repeats_with_the_stream():
    family, batch = tiny_llama(), random_batch()
    values = [one_token_rollout(logits_of(family, s), torch.from_numpy(s.ids[s.supervised])) for s in batch.sequences]
    exact = OneTokenRollout(expected=True).loss(family, batch)
    torch.testing.assert_close(exact.mean(), torch.cat(values).mean(), atol=1e-5, rtol=1e-5)
    first, again = (OneTokenRollout(samples=16).loss(family, batch, Context(family, seed=4)).mean().detach() for _ in range(2))
    ctx = Context(family, seed=4)
    OneTokenRollout(samples=16).loss(family, batch, ctx)
    assert float(first) == float(again) != float(OneTokenRollout(samples=16).loss(family, batch, ctx).mean().detach())
    many = OneTokenRollout(samples=4000).loss(family, batch, Context(family)).mean()
    assert abs(float((many - exact.mean()).detach())) < 0.05
    exact.mean().backward()


def test_nothing_supervised_is_zero():
    family = tiny_llama()
    assert float(OneTokenRollout().loss(family, batch_of([sequence([5, 6], prompt=2)])).mean().detach()) == 0.0


@pytest.mark.parametrize("bad", [{"samples": 0}, {"temperature": 0.0}, {"wrong_reward": 0.1}, {"floor": 1.0}])
def test_bad_fields_are_refused(bad):
    with pytest.raises(RecipeError, match=next(iter(bad))):
        OneTokenRollout(**bad)


def test_it_trains_in_the_loop():
    family = tiny_llama()
    rows = [{"prompt": "w1 w2", "completion": "w3 w4"}, {"prompt": "w5", "completion": "w6"}]
    ctx = Context(family)
    method = OneTokenRollout(samples=8)
    batch = method.collate(rows, None, ctx)
    before = float(family.score(batch).logp.mean().detach())
    engine(family, [method], rows, ctx, steps=10).run()
    assert float(family.score(batch).logp.mean().detach()) > before
