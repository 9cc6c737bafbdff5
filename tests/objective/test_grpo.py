"""GRPO from prompts to gradient: what is drawn, what it is worth, and the loop around it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from luthier.core.context import Context
from luthier.errors import RecipeError, UserError
from luthier.objective.grpo import GRPO
from tests.helpers import tiny_llama
from tests.objective.lm_batches import batch_of, engine, gradients, logps_of, sequence
from tests.objective.test_policy import trl_grpo

ROWS = [{"prompt": f"w{i} w{i + 1}", "answer": "w5"} for i in range(6)]


def shortest(answers, rows):
    return [-float(len(a.split())) for a in answers]


def drawn(method, family=None, **models):
    family = family or tiny_llama()
    ctx = Context(family, helpers={"reward": shortest}, models=models)
    return method.rollout(method.collate(ROWS[:3], None, ctx), ctx), ctx


def padded(batch, values):
    width = max(len(s.supervised) for s in batch.sequences)
    out, mask = torch.zeros(len(batch.sequences), width), torch.zeros(len(batch.sequences), width)
    for i, (s, v) in enumerate(zip(batch.sequences, values)):
        out[i, : len(s.supervised)], mask[i, : len(s.supervised)] = torch.as_tensor(v), 1
    return out, mask


def test_rollout_has_whole_groups_with_rewards_and_behaviour():
    method = GRPO(group_size=4, max_new_tokens=6)
    batch, ctx = drawn(method)
    assert len(batch) == 12 and batch.ids.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    tokenizer = ctx.current.processor
    for s in batch.sequences:
        start = int(s.supervised[0])
        assert s.ids[:start].tolist() == method.collate([batch.rows[s.row]], None, ctx).sequences[0].ids.tolist()
        assert 1 <= len(s) - start <= 6 and s.branch == "rollout"
        text = tokenizer.decode(s.ids[start:], skip_special_tokens=True)
        assert s.data["reward"] == -len(text.split())
        with torch.no_grad():
            np.testing.assert_allclose(s.data["behaviour"], logps_of(ctx.current, s), atol=1e-4)
    for i in (0, 4, 8):
        rewards = np.array([s.data["reward"] for s in batch.sequences[i : i + 4]])
        expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4) if rewards.std() else np.zeros(4)
        np.testing.assert_allclose([s.data["advantage"] for s in batch.sequences[i : i + 4]], expected, atol=1e-5)
    method.prepare(batch, ctx)
    assert 0 <= ctx.logged["rollout/uniform_groups"] <= 1 and ctx.logged["rollout/length"] > 0


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_loss_equals_trl_on_the_same_rollouts(loss_type):
    family, start = tiny_llama(seed=1), tiny_llama(seed=2)
    method = GRPO(group_size=4, max_new_tokens=6, loss_type=loss_type, beta=0.2, eps_high=0.28)
    batch, ctx = drawn(method, family, stage=start)
    with torch.no_grad():  # a step later the policy is another one
        for p in family.network.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    logp, mask = padded(batch, [logps_of(family, s) for s in batch.sequences])
    old, _ = padded(batch, [s.data["behaviour"] for s in batch.sequences])
    with torch.no_grad():
        reference, _ = padded(batch, [logps_of(start, s) for s in batch.sequences])
    expected = trl_grpo(logp, old, batch.gather("advantage"), mask, loss_type, low=0.2, high=0.28, beta=0.2, reference=reference, max_length=6)
    loss = method.loss(family, batch, ctx)
    torch.testing.assert_close(loss.mean(), expected, atol=1e-5, rtol=1e-4)
    parts = batch.split(40, method.together)
    assert len(parts) > 1
    split = sum(method.loss(family, p, ctx).value(batch.counts()) for p in parts)
    torch.testing.assert_close(split, expected, atol=1e-5, rtol=1e-4)
    for a, b in zip(gradients(family, split), gradients(family, expected)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)
    assert float(loss.terms["clipped"].total) > 0 and loss.terms["kl"].weight == 0.2


def test_equal_rewards_have_no_gradient():
    family = tiny_llama()
    method = GRPO(group_size=3, max_new_tokens=4)
    ctx = Context(family, helpers={"reward": lambda a, r: [1.0] * len(a)})
    batch = method.rollout(method.collate(ROWS, None, ctx), ctx)
    assert batch.extra["rollout"]["rollout/uniform_groups"] == 1.0
    assert max(float(g.abs().max()) for g in gradients(family, method.loss(family, batch, ctx).mean())) == 0


def test_cut_answers_can_be_left_out():
    method = GRPO(group_size=3, max_new_tokens=2, mask_cut=True)
    batch, ctx = drawn(method)
    kept = [len(s.supervised) for s in batch.sequences]
    ended = [int(s.ids[-1]) == 2 for s in batch.sequences]
    assert not all(ended) and all((k > 0) == e for k, e in zip(kept, ended))
    assert torch.isfinite(method.loss(ctx.current, batch, ctx).mean())


def test_other_temperatures_enter_the_ratio():
    family = tiny_llama()
    method = GRPO(group_size=3, max_new_tokens=5, temperature=0.5)
    batch, ctx = drawn(method, family)
    loss = method.loss(family, batch, ctx)
    # the policy that drew the answers has ratio one everywhere, so the loss is minus the token mean of the advantages
    expected = -torch.cat([torch.full((len(s.supervised),), s.data["advantage"]) for s in batch.sequences]).mean()
    torch.testing.assert_close(loss.mean().detach(), expected, atol=1e-4, rtol=1e-4)


def test_training_raises_the_reward_in_the_loop(tmp_path):
    """Rewarding an answer's first word teaches it; the record of every step holds the draw."""
    family = tiny_llama(layers=1)
    reward = lambda answers, rows: [float(a.startswith("w7")) for a in answers]  # noqa: E731
    ctx = Context(family, helpers={"reward": reward})
    engine(family, [GRPO(group_size=16, max_new_tokens=1)], ROWS, ctx, tmp_path, steps=16, reuse=2, tokens_per_micro_batch=512).run()
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rewards = [line["rollout/reward"] for line in lines if "rollout/reward" in line]
    assert len(rewards) == 16 and np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.2


def test_handmade_batches_without_behaviour_are_on_policy():
    family = tiny_llama()
    batch = batch_of([sequence([5, 6, 7, 8], 2, 0, "rollout", advantage=1.0), sequence([5, 6, 9, 4], 2, 1, "rollout", advantage=-1.0)])
    found = gradients(family, GRPO().loss(family, batch).mean())
    expected = -(logps_of(family, batch.sequences[0]).sum() - logps_of(family, batch.sequences[1]).sum()) / 4
    for a, b in zip(found, gradients(family, expected)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)
    with pytest.raises(UserError, match="advantage"):
        GRPO().loss(family, batch_of([sequence([5, 6, 7], 2)]))
    with pytest.raises(UserError, match="context"):
        GRPO().collate(ROWS, None, None)


@pytest.mark.parametrize("bad", [{"group_size": 1}, {"temperature": 0.0}, {"advantage": "std"}, {"loss_type": "ppo"}, {"importance": "sequence"}, {"eps_low": 1.0},
                                 {"delta": 1.1}, {"beta": -1.0}, {"max_new_tokens": 0}])  # fmt: skip
def test_bad_fields_are_refused(bad):
    with pytest.raises(RecipeError, match=next(iter(bad))):
        GRPO(**bad)
    assert GRPO().needs == {"generation"} and GRPO(beta=0.1).needs == {"generation", "reference"}
