"""Prefix-RFT: forced prefixes, the entropy mask, and its limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from luthier.core.context import Clock, Context
from luthier.errors import RecipeError
from luthier.objective.grpo import GRPO, grpo
from luthier.objective.prefix_rft import PrefixRFT, prefix_length, prefix_mask, prefix_rft
from tests.helpers import tiny_llama
from tests.objective.lm_batches import engine, gradients, logps_of

DEMO = " ".join(f"w{i}" for i in range(10, 20))
ROWS = [{"prompt": "w1 w2", "completion": DEMO}, {"prompt": "w3 w4", "label": "w9"}, {"messages": [{"role": "user", "content": "w5"}, {"role": "assistant", "content": DEMO}]}]


def context(family, fraction=0.0, reward=None, seed=0, **kw):
    helpers = {"reward": reward or (lambda a, r: [float(len(x.split()) % 3) for x in a])}
    return Context(family, seed=seed, helpers=helpers, clock=Clock(step=round(1000 * fraction), steps=1000), **kw)


def drawn(method, rows=ROWS, **kw):
    family = tiny_llama()
    ctx = context(family, **kw)
    start = method.collate(rows, None, ctx)
    return start, method.rollout(start, ctx), ctx


def demo_ids(batch, row):
    (s,) = [s for s in batch.sequences if s.branch == "demonstration" and s.row == row]
    return s.ids[s.supervised]


# the pieces -----------------------------------------------------------------------------------------------------------


def test_share_falls_by_a_cosine_from_high_to_low():
    shares = [prefix_length(10_000, f, 0.0) / 10_000 for f in np.linspace(0, 1, 21)]
    assert shares[0] == 0.95 and shares[-1] == pytest.approx(0.05, abs=1e-4)
    assert (np.diff(shares) <= 0).all()
    for f, s in zip(np.linspace(0, 1, 21), shares):
        assert s == pytest.approx(0.5 + 0.45 * math.cos(math.pi * f), abs=1e-4)
    assert prefix_length(100, 1.0, 0.5) == 50 and prefix_length(100, 1.0, 0.5, law="decayed") == 5 and prefix_length(20, 0.0, 0.3) == 19


@pytest.mark.parametrize("prefix", [0, 1, 4, 5, 15, 25])
def test_mask_keeps_the_most_uncertain_fifth_of_the_prefix(prefix):
    entropy = np.random.default_rng(prefix).random(30)
    kept = prefix_mask(entropy, prefix)
    assert kept[prefix:].all() and kept[:prefix].sum() == math.ceil(prefix / 5)
    if prefix > 0:
        left_out = entropy[:prefix][~kept[:prefix]]
        assert not len(left_out) or entropy[:prefix][kept[:prefix]].min() > left_out.max()
    assert prefix_mask(np.ones(30), prefix)[:prefix].sum() == math.ceil(prefix / 5)
    assert prefix_mask(entropy, prefix, keep=1.0).all()


def test_without_a_prefix_the_loss_is_plain_reinforcement():
    g = torch.Generator().manual_seed(0)
    logp, old, advantage = torch.randn(9, generator=g), torch.randn(9, generator=g), torch.randn(9, generator=g)
    owner = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    everything = torch.ones(9, dtype=torch.bool)
    expected = grpo(logp, old, advantage, owner, 3, "dr_grpo", 0.2, 0.28, max_length=7)
    torch.testing.assert_close(prefix_rft(logp, old, advantage, everything, owner, 3, 7), expected)


def test_prefix_of_everything_with_advantage_one_is_sft_on_the_kept_tokens():
    logp = torch.randn(6, requires_grad=True)
    kept = torch.tensor([True, False, True, True, False, True])
    loss = prefix_rft(logp, None, torch.ones(6), kept, torch.tensor([0, 0, 0, 1, 1, 1]), 2, 5)
    (gradient,) = torch.autograd.grad(loss, logp)
    torch.testing.assert_close(gradient, -kept.float() / 10)


# the method -----------------------------------------------------------------------------------------------------------


def test_one_answer_of_each_group_starts_with_the_demonstrations_own_ids():
    method = PrefixRFT(group_size=4, max_new_tokens=16, share=0.5)
    start, batch, ctx = drawn(method)
    assert len(batch) == 12
    for row in (0, 2):
        gold = demo_ids(start, row)
        assert len(gold) == 11  # ten words and the end
        group = [s for s in batch.sequences if batch.ids[s.row] == row]
        prompt = next(s for s in start.sequences if s.row == row and s.branch == "prompt").ids
        assert all(s.ids[: len(prompt)].tolist() == prompt.tolist() for s in group)
        hybrid = [s for s in group if s.ids[len(prompt) : len(prompt) + 5].tolist() == gold[:5].tolist()]
        assert len(hybrid) == 1
        masked = hybrid[0].mask[len(prompt) :]
        assert masked[:5].sum() == 1 and masked[5:].all()
        assert len(hybrid[0]) - len(prompt) <= 16
    group = [s for s in batch.sequences if batch.ids[s.row] == 1]
    assert all(s.mask[-(len(s) - int(s.supervised[0])) :].all() for s in group)
    for row in range(3):
        assert sum(s.data["advantage"] for s in batch.sequences if batch.ids[s.row] == row) == pytest.approx(0, abs=1e-5)
    method.prepare(batch, ctx)
    assert 0 < ctx.logged["rollout/prefix_share"] <= 1


def test_data_stay_aligned_under_the_mask():
    method = PrefixRFT(group_size=3, max_new_tokens=16, share=0.7)
    _, batch, ctx = drawn(method)
    for s in batch.sequences:
        assert len(s.data["behaviour"]) == len(s.supervised) == len(s.data["entropy"])
        with torch.no_grad():
            np.testing.assert_allclose(s.data["behaviour"], logps_of(ctx.current, s), atol=1e-4)
    # right after the draw every ratio is one: the loss is minus the advantages of the kept tokens over the constant
    expected = -sum(s.data["advantage"] * len(s.supervised) for s in batch.sequences) / (16 * len(batch))
    assert float(method.loss(ctx.current, batch, ctx).mean().detach()) == pytest.approx(expected, abs=1e-4)


def test_share_zero_is_grpo_with_the_same_draws():
    mine, theirs = PrefixRFT(group_size=4, max_new_tokens=8, share=0.0), GRPO(group_size=4, max_new_tokens=8, advantage="dr-grpo", loss_type="dr_grpo", eps_high=0.28)
    rows = ROWS[:2]
    _, a, ctx = drawn(mine, rows)
    _, b, _ = drawn(theirs, rows)
    assert [s.ids.tolist() for s in a.sequences] == [s.ids.tolist() for s in b.sequences]
    one, two = mine.loss(ctx.current, a, ctx).mean(), theirs.loss(ctx.current, b, ctx).mean()
    assert float(one.detach()) == float(two.detach())
    for x, y in zip(gradients(ctx.current, one), gradients(ctx.current, two)):
        assert torch.equal(x, y)


def test_equal_rewards_give_no_gradient():
    method = PrefixRFT(group_size=3, max_new_tokens=12)
    _, batch, ctx = drawn(method, reward=lambda a, r: [0.0] * len(a))
    assert max(float(g.abs().max()) for g in gradients(ctx.current, method.loss(ctx.current, batch, ctx).mean())) == 0


def test_whole_demonstrations_and_tight_limits():
    start, batch, _ = drawn(PrefixRFT(group_size=2, max_new_tokens=16, share=1.0), ROWS[:1])
    assert any(s.ids[-11:].tolist() == demo_ids(start, 0).tolist() for s in batch.sequences)
    start, batch, _ = drawn(PrefixRFT(group_size=2, max_new_tokens=4, share=0.9), ROWS[:1])
    prompt = len(start.sequences[0])
    assert start.sequences[0].branch == "prompt" and max(len(s) - prompt for s in batch.sequences) <= 4
    # a prefix leaves room for one own token
    hybrid = next(s for s in batch.sequences if s.ids[prompt : prompt + 3].tolist() == demo_ids(start, 0)[:3].tolist())
    assert len(hybrid) == prompt + 4 and hybrid.mask[-1]


def test_it_runs_in_the_loop_with_its_falling_share(tmp_path):
    family = tiny_llama()
    ctx = context(family)
    outcome = engine(family, [PrefixRFT(group_size=3, max_new_tokens=12)], ROWS, ctx, tmp_path, steps=3, batch=3).run()
    assert outcome.steps == 3 and math.isfinite(outcome.losses["loss"])


@pytest.mark.parametrize("bad", [{"low": 0.9, "high": 0.5}, {"share": 1.5}, {"keep": -0.1}, {"law": "normal"}, {"eps_low": 1.0}, {"group_size": 1}])
def test_bad_fields_are_refused(bad):
    with pytest.raises(RecipeError, match=next(iter(bad))):
        PrefixRFT(**bad)
