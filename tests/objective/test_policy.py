"""The policy-gradient primitives against trl's GRPO loss, numpy and closed forms."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from luthier.core.context import Context
from luthier.errors import DataError, RecipeError, UserError
from luthier.objective import _policy as pg
from luthier.objective import _rollout as ro
from tests.helpers import tiny_llama
from tests.objective.lm_batches import batch_of, logits_of, sequence


def trl_grpo(logp, old, advantage, mask, loss_type, level="token", low=0.2, high=0.2, beta=0.0, reference=None, max_length=9, delta=None):
    """trl.GRPOTrainer's loss on given log-probabilities [answers, tokens]."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    plain = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1, device="cpu")
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False), accelerator=plain, aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level=level, beta=beta, loss_type=loss_type, epsilon_low=low, epsilon_high=high, use_vllm=False,
        max_completion_length=max_length, _entropy_bonus_enabled=False, _metrics={"eval": defaultdict(list)},
        args=SimpleNamespace(delta=delta, use_bias_correction_kl=False), _get_per_token_logps_and_entropies=lambda *a, **k: (logp, torch.zeros_like(logp), None),
    )  # fmt: skip
    one = torch.ones(len(mask), 1, dtype=torch.long)
    inputs = {"prompt_ids": one, "prompt_mask": one, "completion_ids": mask.long(), "completion_mask": mask, "advantages": advantage,
              "old_per_token_logps": old, "num_items_in_batch": mask.sum()}  # fmt: skip
    if beta:
        inputs["ref_per_token_logps"] = reference
    return GRPOTrainer._compute_loss(trainer, None, inputs)


def problem(seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = (torch.arange(7) < torch.tensor([[7], [3], [5], [1]])).float()
    logp, old, reference = (-3 * torch.rand(4, 7, generator=g) for _ in range(3))
    return logp, old, reference, torch.randn(4, generator=g), mask


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("delta", [None, 1.5])
def test_loss_and_gradient_equal_trl(loss_type, beta, delta):
    from luthier.objective.grpo import grpo

    base, old, reference, advantage, mask = problem()
    a, b = (base.clone().requires_grad_() for _ in range(2))
    expected = trl_grpo(a, old, advantage, mask, loss_type, low=0.1, high=0.28, beta=beta, reference=reference, delta=delta)
    held = mask.bool()
    owner = torch.arange(4)[:, None].expand(4, 7)[held]
    mine = grpo(b[held], old[held], advantage[owner], owner, 4, loss_type, 0.1, 0.28, beta, reference[held], 9, delta=delta)
    torch.testing.assert_close(mine, expected)
    mine.backward()
    expected.backward()
    torch.testing.assert_close(b.grad, a.grad)


def test_sequence_ratio_equals_trls_gspo():
    from luthier.objective.grpo import grpo

    base, old, _, advantage, mask = problem(1)
    a, b = (base.clone().requires_grad_() for _ in range(2))
    expected = trl_grpo(a, old, advantage, mask, "grpo", level="sequence", low=0.05, high=0.05)
    held = mask.bool()
    owner = torch.arange(4)[:, None].expand(4, 7)[held]
    mine = grpo(b[held], old[held], advantage[owner], owner, 4, "grpo", 0.05, 0.05, importance="sequence")
    torch.testing.assert_close(mine, expected)
    mine.backward()
    expected.backward()
    torch.testing.assert_close(b.grad, a.grad)


def test_first_step_has_ratio_one_and_the_reinforce_gradient():
    logp, advantage = torch.randn(5, requires_grad=True), torch.randn(5)
    for old in (None, logp.detach()):
        (gradient,) = torch.autograd.grad(pg.policy_gradient(logp, old, advantage).sum(), logp)
        torch.testing.assert_close(gradient, -advantage)


def test_clipping_stops_the_gradient_only_where_it_should():
    logp = torch.log(torch.tensor([0.5, 1.5, 0.5, 1.5])).requires_grad_()
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0])
    old = torch.zeros(4)
    (gradient,) = torch.autograd.grad(pg.policy_gradient(logp, old, advantage).sum(), logp)
    assert (gradient == 0).tolist() == [False, True, True, False]
    assert pg.clipped(logp, old, advantage).tolist() == [False, True, True, False]


def test_k3_estimates_the_divergence_and_is_never_negative():
    g = torch.Generator().manual_seed(0)
    p, q = (torch.log_softmax(torch.randn(6, generator=g), -1) for _ in range(2))
    expected = (p.exp() * (p - q)).sum()
    torch.testing.assert_close((p.exp() * pg.k3(p, q)).sum(), expected)
    assert (pg.k3(p, q) >= 0).all() and (pg.k3(p, p) == 0).all()


# advantages -----------------------------------------------------------------------------------------------------------


def test_advantages_of_every_mode_equal_numpy():
    rewards, groups = np.array([1.0, 0, 0, 2, 5, 5, 4.0, 1]), np.array([7, 7, 7, 7, 2, 2, 2, 2])
    std, mean, rloo, batch = [], [], [], []
    for i, (r, k) in enumerate(zip(rewards, groups)):
        mine = rewards[groups == k]
        others = rewards[(groups == k) & (np.arange(8) != i)]
        std.append((r - mine.mean()) / (mine.std(ddof=1) + 1e-4))
        mean.append(r - mine.mean())
        rloo.append(r - others.mean())
        batch.append((r - mine.mean()) / (rewards.std(ddof=1) + 1e-4))
    for mode, expected in (("std", std), ("mean", mean), ("rloo", rloo), ("batch", batch)):
        found = pg.advantages(rewards, groups, mode)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        for k in (2, 7):
            assert abs(float(found[torch.tensor(groups == k)].sum())) < 1e-5


@pytest.mark.parametrize("mode", ["std", "mean", "rloo", "batch"])
def test_equal_rewards_give_exactly_zero(mode):
    found = pg.advantages([0.1 + 0.2, 0.3, 0.1 + 0.2, 0.7, 0.1], [0, 0, 0, 1, 1], mode)
    assert found[:3].tolist() == [0, 0, 0] and found[3] > 0 > found[4]
    assert pg.uniform_share([0.3, 0.3, 0.7, 0.1], [0, 0, 1, 1]) == 0.5


def test_unscored_answers_take_no_part():
    found = pg.advantages([1.0, float("nan"), 0.0, float("nan")], [0, 0, 0, 1], "mean")
    assert found.tolist() == [0.5, 0.0, -0.5, 0.0]


def test_gae_equals_the_discounted_sum_of_errors():
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=6), rng.normal(size=6)
    gamma, lam = 0.9, 0.7
    errors = rewards + gamma * np.append(values[1:], 0) - values
    expected = [sum((gamma * lam) ** (k - t) * errors[k] for k in range(t, 6)) for t in range(6)]
    found, returns = pg.gae(torch.tensor(rewards), torch.tensor(values), gamma, lam)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(returns, expected + values, rtol=1e-5)
    whole, _ = pg.gae(torch.tensor(rewards), torch.tensor(values), 1.0, 1.0)
    np.testing.assert_allclose(whole, np.cumsum(rewards[::-1])[::-1] - values, rtol=1e-5, atol=1e-6)


def test_an_answer_without_tokens_counts_zero():
    values, owner = torch.tensor([1.0, 3.0]), torch.tensor([0, 0])
    assert pg.normalise(values, owner, 2, "grpo", 10)[0].tolist() == [2.0, 0.0]
    assert pg.normalise(values, owner, 2, "dr_grpo", 10)[0].tolist() == pytest.approx([0.4, 0.0])


# from prompts to a scored batch -------------------------------------------------------------------------------------------


def rollouts():
    return [ro.Rollout(0, np.array([5, 6]), np.array([7, 8, 2]), "w", True), ro.Rollout(0, np.array([5, 6]), np.array([9]), "v", False),
            ro.Rollout(1, np.array([10]), np.array([11, 12]), "u", True)]  # fmt: skip


def test_behaviour_is_the_tempered_log_probability_of_the_drawn_ids():
    family, made = tiny_llama(), rollouts()
    ro.score_behaviour(made, family, temperature=0.7, tokens=5)
    ctx = Context(family, models={"stage": tiny_llama(seed=2)})
    ro.score_reference(made, ctx, "stage", temperature=0.7, tokens=5)
    for r in made:
        s = sequence(np.concatenate([r.prompt, r.answer]), len(r.prompt))
        with torch.no_grad():
            logits, other = logits_of(family, s), logits_of(ctx.model("stage"), s)
        target = torch.from_numpy(r.answer)
        np.testing.assert_allclose(r.data["behaviour"], torch.log_softmax(logits / 0.7, -1).gather(1, target[:, None])[:, 0], atol=1e-5)
        np.testing.assert_allclose(r.data["reference"], torch.log_softmax(other / 0.7, -1).gather(1, target[:, None])[:, 0], atol=1e-5)
        np.testing.assert_allclose(r.data["entropy"], torch.distributions.Categorical(logits=logits).entropy(), atol=1e-5)


def test_assembled_batch_keeps_rows_weights_and_cuts_masked_tokens():
    prompts = batch_of([sequence([5, 6], 2, 0, "prompt"), sequence([10], 1, 1, "prompt")], [{"a": 1}, {"a": 2}], weights=[2.0, 3.0])
    made = rollouts()
    for r in made:
        r.data = {"advantage": 1.0, "behaviour": np.arange(len(r.answer), dtype=float)}
    made[0].kept = np.array([True, False, True])
    batch = ro.assemble(made, prompts)
    assert [r["a"] for r in batch.rows] == [1, 1, 2] and batch.ids.tolist() == [0, 0, 1] and batch.weights.tolist() == [2, 2, 3]
    assert batch.sequences[0].supervised.tolist() == [2, 4] and batch.gather("behaviour").tolist() == [0, 2, 0, 0, 1]
    assert batch.gather("advantage").tolist() == [1, 1, 1] and batch.touched
    assert [s.row for s in ro.assemble(made, prompts, by="prompt").sequences] == [0, 0, 1]
    assert ro.together(batch) == [[0, 1], [2]] and ro.together(batch, limit=5) == [[0], [1], [2]]


def test_rewards_come_from_the_helper_or_the_verifier():
    made, rows = rollouts(), [{"answer": "w"}, {"answer": "u"}]
    ro.score_rewards(made, rows, Context(), "exact")
    assert [r.data["reward"] for r in made] == [1.0, 0.0, 1.0]

    def reward(answers, mine):
        assert answers == ["w", "v", "u"] and [r["answer"] for r in mine] == ["w", "w", "u"]
        return {"length": [1, 2, None], "style": [0.5, None, None]}

    parts = ro.score_rewards(made, rows, Context(helpers={"reward": reward}), "exact", {"style": 2.0})
    assert [r.data["reward"] for r in made[:2]] == [2.0, 2.0] and np.isnan(made[2].data["reward"])
    shown = ro.report(made, parts)
    assert shown["rollout/reward"] == 2.0 and shown["rollout/length_spread"] == pytest.approx(0.5)
    with pytest.raises(UserError, match="gave 1 numbers for 3"):
        ro.score_rewards(made, rows, Context(helpers={"reward": lambda a, r: [1.0]}), "exact")
    with pytest.raises(UserError, match="reward_weights"):
        ro.score_rewards(made, rows, Context(), "exact", {"tone": 1.0})


def test_prompts_and_fields_are_checked():
    batch = batch_of([sequence([5, 6, 7, 8], 2)])
    assert ro.prompts_of(batch)[0].tolist() == [5, 6]
    with pytest.raises(DataError, match="no prompt"):
        ro.prompts_of(batch_of([], [{}]))
    for bad in ((1, 1.0, 5, "exact"), (4, 0.0, 5, "exact"), (4, 1.0, 0, "exact"), (4, 1.0, 5, "exactly")):
        with pytest.raises(RecipeError):
            ro.check_sampling(*bad)
