"""ADPO: DPO and distillation as its limits, soft targets against scipy, anchors, and the on-policy form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from luthier.core.batch import Batch
from luthier.core.context import Context
from luthier.errors import DataError, RecipeError
from luthier.objective._shared import AnchorScheduler
from luthier.objective.adpo import ADPO, adaptive_tau, adpo, soft_target
from luthier.objective.dpo import DPO, dpo
from tests.helpers import tiny_llama
from tests.objective.lm_batches import batch_of, engine, gradients, logps_of, random_pairs, sequence, through_checkpoint

LISTS = [{"prompt": "w1 w2", "responses": ["w3", "w4 w5", "w6 w7 w8"], "scores": [0.1, 2.0, -1.0]}, {"prompt": "w9", "responses": ["w3", "w4"], "scores": [1.0, 1.0]}]


# the formula ------------------------------------------------------------------------------------------------------------


def test_two_hard_answers_are_dpo_in_value_and_gradient():
    g = torch.Generator().manual_seed(0)
    base, reference = torch.randn(5, 2, generator=g), torch.randn(5, 2, generator=g)
    a, b = (base.clone().requires_grad_() for _ in range(2))
    mine = adpo(a, reference, torch.tensor([[1.0, 0.0]]), tau=1 / 0.3)
    theirs = dpo(b[:, 0], b[:, 1], reference[:, 0], reference[:, 1], beta=0.3)
    torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)
    mine.sum().backward()
    theirs.sum().backward()
    torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-6)


def test_constant_anchor_over_all_actions_is_distillation():
    logits, teacher = torch.randn(4, 6), torch.softmax(torch.randn(4, 6), -1)
    logp = torch.log_softmax(logits, -1)
    expected = F.kl_div(logp, teacher, reduction="none").sum(-1)
    torch.testing.assert_close(adpo(logp, None, teacher), expected)
    torch.testing.assert_close(adpo(logp, torch.full((4, 6), -3.0), teacher), expected)


def test_shift_invariance_start_value_gradient_and_hessian():
    q = torch.softmax(torch.randn(4), -1)
    lp, ref, tau = torch.randn(4), torch.randn(4), 0.7
    torch.testing.assert_close(adpo(lp + 5.0, ref, q, tau), adpo(lp, ref, q, tau))
    uniform = torch.full((4,), 0.25)
    torch.testing.assert_close(adpo(ref, ref, q, tau), (q * (q / uniform).log()).sum())
    z = lp.clone().requires_grad_()
    p = torch.softmax((lp - ref) / tau, -1)
    (gradient,) = torch.autograd.grad(adpo(z, ref, q, tau), z)
    torch.testing.assert_close(gradient, (p - q) / tau)
    hessian = torch.autograd.functional.hessian(lambda x: adpo(x, ref, q, tau), lp)
    torch.testing.assert_close(hessian, (torch.diag(p) - torch.outer(p, p)) / tau**2, atol=1e-6, rtol=1e-5)


def test_optimum_is_the_reference_times_the_target_to_the_tau():
    ref, q, tau = torch.randn(3), torch.tensor([0.2, 0.5, 0.3]), 1.7
    best = ref + tau * q.log()
    (gradient,) = torch.autograd.grad(adpo(z := best.clone().requires_grad_(), ref, q, tau), z)
    assert gradient.abs().max() < 1e-6 and abs(float(adpo(best, ref, q, tau))) < 1e-6


def test_absent_answers_and_hard_targets_give_no_nan():
    lp = torch.tensor([[0.3, -0.2, -torch.inf]], requires_grad=True)
    loss = adpo(lp, None, torch.tensor([[1.0, 0.0, 0.0]]))
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), adpo(lp[:, :2].detach(), None, torch.tensor([[1.0, 0.0]])))
    assert torch.isfinite(lp.grad).all()


# targets ----------------------------------------------------------------------------------------------------------------


def test_soft_targets():
    r = torch.tensor([[2.0, 0.0, -1.0]])
    torch.testing.assert_close(soft_target(r, "listwise", 0.5), torch.softmax(r / 0.5, -1))
    torch.testing.assert_close(soft_target(r + 100, "listwise", 0.5, scale=True), torch.softmax(r / (r.std() + 1e-4) / 0.5, -1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(soft_target(r[:, :2], "pairwise", 0.5)[0, 0], torch.sigmoid(torch.tensor(4.0)))
    assert soft_target(torch.tensor([[1.0, 3.0, 3.0]]), "hard").tolist() == [[0.0, 0.5, 0.5]]
    short = soft_target(r, "listwise", 0.5, mask=torch.tensor([[True, True, False]]))
    torch.testing.assert_close(short, torch.tensor([[*torch.softmax(r[0, :2] / 0.5, -1).tolist(), 0.0]]))
    with pytest.raises(DataError, match="pairwise"):
        soft_target(r, "pairwise")


def test_kde_target_equals_scipys_normal_kernels_and_tames_outliers():
    r = np.array([0.2, -0.4, 1.1, 50.0])
    iqr = np.subtract(*np.percentile(r, [75, 25])) / 1.34
    width = 0.9 * min(r.std(ddof=1), iqr) * 4**-0.2
    rank = stats.norm.cdf((r[:, None] - r[None]) / width).mean(1)
    logits = np.log(rank / (1 - rank)) / 0.5
    expected = np.exp(logits) / np.exp(logits).sum()
    found = soft_target(torch.tensor(r)[None], "kde", 0.5)[0]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert soft_target(torch.tensor(r)[None], "listwise", 0.5)[0, 2] < 1e-6 < found[2]
    assert soft_target(torch.ones(1, 4), "kde").tolist() == [[0.25] * 4]
    median = soft_target(torch.tensor(r)[None], "kde", 0.5, bandwidth="median")[0]
    rank = stats.norm.cdf((r[:, None] - r[None]) / np.sort(np.abs(r[:, None] - r[None])[np.triu_indices(4, 1)])[2]).mean(1)
    np.testing.assert_allclose(median, (o := (rank / (1 - rank)) ** 2) / o.sum(), atol=1e-5)


def test_adaptive_tau():
    tau = adaptive_tau(1.0, torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 0.0]))
    assert tau.tolist() == [1.0, 1.5, 2.0]
    assert adaptive_tau(1.0, torch.tensor([0.2]), torch.tensor([0.7])).tolist() == pytest.approx([1 + 0.1 + 0.8 * 0.5])
    assert adaptive_tau(40.0, torch.ones(2), torch.zeros(2)).tolist() == [5.0, 5.0]


# the method -------------------------------------------------------------------------------------------------------------


def test_pairs_without_scores_are_dpo():
    family, start = tiny_llama(seed=1), tiny_llama(seed=2)
    ctx = Context(family, models={"stage": start})
    batch = random_pairs(rows=3, rows_data=[{"chosen": "", "rejected": ""}] * 3)
    turned = Batch(batch.rows, batch.ids, batch.sequences[::-1])
    expected = DPO(beta=0.25).loss(family, batch, ctx).mean()
    for b in (batch, turned):
        torch.testing.assert_close(ADPO(tau=4.0).loss(family, b, ctx).mean(), expected, atol=1e-5, rtol=1e-5)


def test_lists_of_unequal_length_equal_the_formula():
    family, start = tiny_llama(seed=1), tiny_llama(seed=2)
    ctx = Context(family, models={"stage": start})
    method = ADPO(tau=0.8)
    batch = method.collate(LISTS, None, ctx)
    assert [s.branch for s in batch.sequences] == ["response"] * 5
    values = []
    for row, r in ((0, [0.1, 2.0, -1.0]), (1, [1.0, 1.0])):
        group = [s for s in batch.sequences if s.row == row]
        u = torch.stack([logps_of(family, s).sum() - logps_of(start, s).sum().detach() for s in group]) / 0.8
        q = torch.softmax(torch.tensor(r) / 0.5, -1)
        values.append((q * (q.log() - torch.log_softmax(u, -1))).sum())
    loss = method.loss(family, batch, ctx)
    torch.testing.assert_close(loss.mean(), torch.stack(values).mean(), atol=1e-5, rtol=1e-4)
    for a, b in zip(gradients(family, loss.value(batch.counts())), gradients(family, torch.stack(values).mean())):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_columns_that_state_the_target():
    family = tiny_llama()
    method = ADPO(anchor="none", length_normalise=True)
    assert method.needs == frozenset()
    rows = [{"chosen": "", "rejected": "", "agreement": 0.7}, {"chosen": "", "rejected": "", "target": [0.4, 0.6]}, {"chosen": "", "rejected": "", "scores": [0.0, 1.0]}]
    batch = random_pairs(rows=3, rows_data=rows)
    means = torch.stack([logps_of(family, s).mean() for s in batch.sequences]).reshape(3, 2)
    q = torch.tensor([[0.7, 0.3], [0.4, 0.6], torch.softmax(torch.tensor([0.0, 2.0]), -1).tolist()])
    torch.testing.assert_close(method.loss(family, batch).mean(), F.kl_div(torch.log_softmax(means, -1), q, reduction="none").sum(-1).mean(), atol=1e-5, rtol=1e-5)
    for bad, what in (({"target": [0.5, 0.6]}, "add up to 1"), ({"agreement": 2.0}, "between 0 and 1"), ({"scores": [1.0]}, "'scores'")):
        with pytest.raises(DataError, match=what):
            method.loss(family, random_pairs(rows=1, rows_data=[{"chosen": "", "rejected": "", **bad}]))
    with pytest.raises(DataError, match="at least 2"):
        method.loss(family, batch_of([sequence([5, 6, 7], 2)]))


def test_max_entropy_target_holds_the_reference():
    family, start = tiny_llama(seed=1), tiny_llama(seed=2)
    batch = random_pairs(rows=2, rows_data=[{"chosen": "", "rejected": "", "scores": [1.0, 0.5]}] * 2)
    lp, ref = (torch.stack([logps_of(f, s).sum() for s in batch.sequences]).reshape(2, 2) for f in (family, start))
    q = torch.softmax(ref.detach() + torch.tensor([2.0, 1.0]), -1)
    expected = F.kl_div(torch.log_softmax(lp, -1), q, reduction="none").sum(-1).mean()
    method = ADPO(target="max-entropy", anchor="none")
    torch.testing.assert_close(method.loss(family, batch, Context(family, models={"stage": start})).mean(), expected, atol=1e-4, rtol=1e-4)


def test_kl_to_the_anchor_is_added_token_by_token():
    family, start = tiny_llama(seed=1), tiny_llama(seed=2)
    batch, ctx = random_pairs(rows=2, rows_data=[{"chosen": "", "rejected": ""}] * 2), Context(family, models={"stage": start})
    d = torch.cat([logps_of(start, s) - logps_of(family, s) for s in batch.sequences])
    plain, more = (ADPO(kl=k).loss(family, batch, ctx).mean() for k in (0.0, 0.5))
    torch.testing.assert_close(more - plain, 0.5 * (d.exp() - d - 1).mean(), atol=1e-4, rtol=1e-4)


# anchors ----------------------------------------------------------------------------------------------------------------


def test_anchor_scheduler_follows_its_rule():
    p = torch.nn.Parameter(torch.tensor([1.0]))
    ema, periodic = AnchorScheduler("ema", decay=0.9), AnchorScheduler("periodic", every=3)
    for a in (ema, periodic):
        a.start([p])
    seen = []
    for step in range(1, 7):
        with torch.no_grad():
            p += 1.0
        ema.update([p], step)
        periodic.update([p], step)
        seen.append(float(periodic.shadow[0]))
    assert seen == [1, 1, 4, 4, 4, 7]
    expected = 1.0
    for value in range(2, 8):
        expected = 0.9 * expected + 0.1 * value
    assert float(ema.shadow[0]) == pytest.approx(expected)


@pytest.mark.parametrize("anchor", ["periodic", "ema"])
def test_moving_anchors_score_with_their_own_weights_and_resume(anchor):
    family = tiny_llama()
    start = family.frozen_copy()
    rows = [{"prompt": "w1 w2", "chosen": "w3 w4", "rejected": "w5"}, {"prompt": "w6", "chosen": "w3", "rejected": "w7 w8"}]
    ctx = Context(family, models={"stage": start})
    method = ADPO(anchor=anchor, anchor_every=100)
    engine(family, [method], rows, ctx, batch=2, steps=3).run()
    batch = method.collate(rows, None, ctx)
    moved = method.loss(family, batch, ctx).mean()
    fixed = ADPO().loss(family, batch, ctx).mean()
    weights = [p.detach().clone() for p in family.network.parameters()]
    if anchor == "periodic":  # not copied yet: still the start
        torch.testing.assert_close(moved, fixed, atol=1e-5, rtol=1e-5)
    else:
        other = tiny_llama()
        with torch.no_grad():
            for p, mine in zip(other.network.parameters(), method._anchor.shadow):
                p.copy_(mine)
        torch.testing.assert_close(moved, ADPO().loss(family, batch, Context(family, models={"stage": other})).mean(), atol=1e-5, rtol=1e-5)
        assert float(moved.detach()) != float(fixed.detach())
    assert all(torch.equal(p, w) for p, w in zip(family.network.parameters(), weights))
    assert all(p.requires_grad for p in family.network.parameters())
    again = ADPO(anchor=anchor, anchor_every=100)
    again.load_state_dict(through_checkpoint(method.state_dict()))
    again._params = method._params
    assert float(again.loss(family, batch, ctx).mean().detach()) == float(moved.detach())


# on-policy --------------------------------------------------------------------------------------------------------------

PROMPTS = [{"prompt": "w1 w2"}, {"prompt": "w3"}, {"prompt": "w4 w5"}]


def test_on_policy_loss_equals_the_release_on_the_same_rollouts():
    family = tiny_llama()
    ctx = Context(family, helpers={"reward": lambda a, r: [float(len(x.split()) % 4) for x in a]})
    method = ADPO(on_policy=True, group_size=4, max_new_tokens=6, tau=0.8, kl=0.1)
    batch = method.rollout(method.collate(PROMPTS, None, ctx), ctx)
    assert len(batch) == 3 and [s.row for s in batch.sequences] == [i for i in range(3) for _ in range(4)]
    assert method.needs == {"generation"}
    # before any step u = 0: the loss is KL(q || uniform)
    q = torch.softmax(torch.stack([torch.tensor([s.data["reward"] for s in batch.sequences if s.row == i]) for i in range(3)]) / 0.5, -1)
    first = method.loss(family, batch, ctx).mean().detach()
    torch.testing.assert_close(first, (q * (q * 4).log()).sum(-1).mean(), atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        for p in family.network.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    gap = [logps_of(family, s) - torch.from_numpy(s.data["behaviour"]) for s in batch.sequences]
    u = torch.stack([g.sum() for g in gap]).reshape(3, 4) / 0.8
    cross = -(q * torch.log_softmax(u, -1)).sum(-1).mean()  # the release's value; ours subtracts the target's entropy
    d = -torch.cat(gap)
    expected = cross + (q * q.log()).sum(-1).mean() + 0.1 * (d.exp() - d - 1).mean()
    loss = method.loss(family, batch, ctx)
    torch.testing.assert_close(loss.mean(), expected, atol=1e-4, rtol=1e-4)
    parts = batch.split(40, method.together)
    assert len(parts) > 1
    torch.testing.assert_close(sum(method.loss(family, p, ctx).value(batch.counts()) for p in parts), expected, atol=1e-4, rtol=1e-4)


def test_on_policy_options(tmp_path):
    family = tiny_llama()
    values = {"w1 w2": 0.0, "w3": 1.0, "w4 w5": 0.5}

    def reward(answers, rows):
        return [values[r["prompt"]] * (i % 2) for i, r in enumerate(rows)]

    ctx = Context(family, helpers={"reward": reward})
    method = ADPO(on_policy=True, group_size=4, max_new_tokens=4, drop_failed=True, adaptive_tau=True)
    batch = method.rollout(method.collate(PROMPTS, None, ctx), ctx)
    assert batch.ids.tolist() == [1, 2]
    assert batch.extra["rollout"]["rollout/failed"] == pytest.approx(1 / 3)
    taus = {int(batch.ids[s.row]): s.data["tau"] for s in batch.sequences}
    assert 1.0 < taus[1] < taus[2] <= 5.0  # equal rewards scaled over the batch: prompt 1 is best, prompt 2 in between
    assert math.isfinite(float(method.loss(family, batch, ctx).mean().detach()))
    nothing = ADPO(on_policy=True, group_size=2, max_new_tokens=2)
    blind = Context(family, helpers={"reward": lambda a, r: [None] * len(a)})
    batch = nothing.rollout(nothing.collate(PROMPTS, None, blind), blind)
    assert max(float(g.abs().max()) for g in gradients(family, nothing.loss(family, batch, blind).mean())) == 0
    outcome = engine(family, [ADPO(on_policy=True, group_size=4, max_new_tokens=4)], PROMPTS, ctx, tmp_path, batch=3, steps=2, reuse=2).run()
    assert outcome.steps == 2 and math.isfinite(outcome.losses["adpo"])


def test_offline_rows_pass_the_rollout_hook_untouched():
    batch = random_pairs(rows=1)
    assert ADPO().rollout(batch, Context(tiny_llama())) is batch


@pytest.mark.parametrize("bad", [{"target": "soft"}, {"anchor": "moving"}, {"tau": 0.0}, {"reward_temperature": -1.0}, {"kl": -1.0}, {"target": "max-entropy"},
                                 {"kl": 0.1, "anchor": "none"}, {"adaptive_tau": True}, {"anchor": "periodic", "anchor_every": 1}, {"anchor": "ema", "anchor_decay": 1.0},
                                 {"on_policy": True, "group_size": 1}])  # fmt: skip
def test_bad_fields_are_refused(bad):
    with pytest.raises(RecipeError, match=list(bad)[-1].replace("on_policy", "group_size")):
        ADPO(**bad)
