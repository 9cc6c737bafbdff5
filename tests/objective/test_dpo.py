"""DPO and its links against trl's own loss on the same tensors, and against its closed forms."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from luthier.core.batch import Batch
from luthier.core.context import Context
from luthier.errors import DataError, RecipeError, UserError
from luthier.objective._shared import preference
from luthier.objective.dpo import DPO, dpo
from tests.helpers import tiny_llama
from tests.objective.lm_batches import batch_of, gradients, logps_of, random_pairs, sequence, through_checkpoint


def trl_loss(token_logps, ref_logps, mask, link, beta, smoothing):
    """trl.DPOTrainer's loss on given per-token log-probabilities: chosen rows first, then rejected."""
    from trl.trainer.dpo_trainer import DPOTrainer

    plain = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False), accelerator=plain, aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True,
        f_divergence_type="reverse_kl", loss_types=[link], loss_weights=[1.0], beta=beta, label_smoothing=smoothing, use_weighting=False,
        _metrics={"eval": defaultdict(list)}, _total_train_tokens=0, args=SimpleNamespace(),
    )  # fmt: skip
    full = torch.cat([torch.zeros(len(mask), 1), mask], 1).long()  # the prompt is one token here
    zeros = torch.zeros_like(token_logps)
    out = SimpleNamespace(log_probs=token_logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    sums = ref_logps.sum(1)
    half = len(sums) // 2
    inputs = {"input_ids": full, "attention_mask": full, "completion_mask": full, "ref_chosen_logps": sums[:half], "ref_rejected_logps": sums[half:]}
    return DPOTrainer._compute_loss(trainer, lambda **kw: out, inputs, False)


@pytest.mark.parametrize("link", ["sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down"])
def test_every_link_equals_trl(link):
    smoothing = 0.1 if link in ("robust", "exo_pair") else 0.0
    rng = torch.Generator().manual_seed(0)
    mask = (torch.rand(6, 5, generator=rng) < 0.7).float()
    mask[:, 0] = 1
    base = -5 * torch.rand(6, 5, generator=rng)
    reference = -5 * torch.rand(6, 5, generator=rng) * mask
    a, b = (base.clone().requires_grad_() for _ in range(2))
    expected = trl_loss(a * mask, reference, mask, link, 0.3, smoothing)
    size = mask.sum(1) if link == "ipo" else torch.ones(6)
    lp, ref = (b * mask).sum(1) / size, reference.sum(1) / size
    mine = dpo(lp[:3], lp[3:], ref[:3], ref[3:], 0.3, link, smoothing).mean()
    torch.testing.assert_close(mine, expected)
    for x in (mine, expected):
        x.backward()
    torch.testing.assert_close(b.grad, a.grad)


def test_cdpo_is_trls_published_smoothing():
    h = torch.linspace(-3, 3, 7)
    zero = torch.zeros(7)
    expected = -F.logsigmoid(0.4 * h) * 0.8 - F.logsigmoid(-0.4 * h) * 0.2
    torch.testing.assert_close(dpo(h, zero, zero, zero, 0.4, label_smoothing=0.2), expected)
    each = torch.linspace(0, 0.6, 7)
    torch.testing.assert_close(dpo(h, zero, None, None, 0.4, label_smoothing=each), -F.logsigmoid(0.4 * h) * (1 - each) - F.logsigmoid(-0.4 * h) * each)


def test_listwise_of_two_hard_answers_is_the_sigmoid_link():
    logp, reference = torch.randn(5, 2), torch.randn(5, 2)
    torch.testing.assert_close(preference(logp, reference, None, "listwise", 0.7), preference(logp, reference, None, "sigmoid", 0.7))
    soft = torch.rand(5)
    entropy = -(torch.xlogy(soft, soft) + torch.xlogy(1 - soft, 1 - soft))
    torch.testing.assert_close(preference(logp, reference, soft, "listwise", 0.7) + entropy, preference(logp, reference, soft, "sigmoid", 0.7))


def sums(family, batch):
    return torch.stack([logps_of(family, s).sum() for s in batch.sequences]).reshape(-1, 2)


def test_class_equals_the_formula_on_separate_rows():
    family, start = tiny_llama(seed=1), tiny_llama(seed=2)
    batch, ctx = random_pairs(rows=3), Context(family, models={"stage": start})
    lp, ref = sums(family, batch), sums(start, batch).detach()
    h = (lp - ref)[:, 0] - (lp - ref)[:, 1]
    expected = -F.logsigmoid(0.1 * h).mean()
    loss = DPO().loss(family, batch, ctx)
    torch.testing.assert_close(loss.mean(), expected, atol=1e-5, rtol=1e-5)
    for a, b in zip(gradients(family, loss.value(batch.counts())), gradients(family, expected)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)
    assert ctx.logged["dpo/margin"] == pytest.approx(0.1 * float(h.detach().mean()), abs=1e-5)
    assert ctx.logged["dpo/accuracy"] == pytest.approx(float((h > 0).float().mean()))
    assert ctx.logged["dpo/chosen_logp"] == pytest.approx(float(lp[:, 0].detach().mean()), abs=1e-4)


def test_at_the_reference_it_is_log_2_with_half_the_gradient():
    """Self-play's start: loss log 2 for every pair, gradient -(beta/2) (grad log p(y) - grad log p(y'))."""
    family = tiny_llama()
    ctx, batch = Context(family, models={"round": family.frozen_copy()}), random_pairs(rows=2)
    loss = DPO(beta=0.3, reference="round").loss(family, batch, ctx).mean()
    assert float(loss.detach()) == pytest.approx(math.log(2), abs=1e-5)
    lp = sums(family, batch)
    for a, b in zip(gradients(family, loss), gradients(family, -0.15 * (lp[:, 0] - lp[:, 1]).mean())):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_equal_answers_have_no_gradient():
    family = tiny_llama()
    ids = [5, 6, 7, 8, 9, 10]
    batch = batch_of([sequence(ids, 3, 0, "chosen"), sequence(ids, 3, 0, "rejected")])
    loss = DPO().loss(family, batch, Context(family, models={"stage": tiny_llama(seed=3)})).mean()
    assert float(loss.detach()) == pytest.approx(math.log(2), abs=1e-6)
    assert max(float(g.abs().max()) for g in gradients(family, loss)) < 1e-6


def test_order_of_sequences_and_micro_batches_do_not_matter():
    family = tiny_llama()
    ctx = Context(family, models={"stage": tiny_llama(seed=3)})
    batch = random_pairs(rows=4)
    whole = DPO().loss(family, batch, ctx).mean()
    turned = Batch(batch.rows, batch.ids, batch.sequences[::-1])
    torch.testing.assert_close(DPO().loss(family, turned, ctx).mean(), whole, atol=1e-5, rtol=1e-5)
    parts = batch.split(24)
    assert len(parts) > 1
    method = DPO()
    torch.testing.assert_close(sum(method.loss(family, p, ctx).value(batch.counts()) for p in parts), whole, atol=1e-5, rtol=1e-5)
    assert ctx.logged["dpo/accuracy"] in {0.0, 0.25, 0.5, 0.75, 1.0}


def test_columns_smoothing_and_weight_work_row_by_row():
    family = tiny_llama()
    rows = [{"label_smoothing": 0.3, "weight": 2.0}, {"weight": 1.0}]
    batch, ctx = random_pairs(rows=2, rows_data=rows), Context(family, models={"stage": tiny_llama(seed=3)})
    gap = sums(family, batch) - sums(ctx.model("stage"), batch)
    each = dpo(gap[:, 0], gap[:, 1], label_smoothing=torch.tensor([0.3, 0.05]))
    expected = (2 * each[0] + each[1]) / 3
    torch.testing.assert_close(DPO(label_smoothing=0.05).loss(family, batch, ctx).mean(), expected, atol=1e-5, rtol=1e-5)
    rows[0]["label_smoothing"] = 1.4
    with pytest.raises(DataError, match="Row 0"):
        DPO().loss(family, batch, ctx)


def test_simpo_and_rpo():
    family = tiny_llama()
    batch = random_pairs(rows=3)
    means = torch.stack([logps_of(family, s).mean() for s in batch.sequences]).reshape(-1, 2)
    simpo = -F.logsigmoid(2.0 * (means[:, 0] - means[:, 1]) - 0.7).mean()
    method = DPO(beta=2.0, reference_free=True, length_normalise=True, margin=0.7)
    assert method.needs == frozenset()
    torch.testing.assert_close(method.loss(family, batch).mean(), simpo, atol=1e-5, rtol=1e-5)
    nll = -torch.cat([logps_of(family, s) for s in batch.sequences if s.branch == "chosen"]).mean()
    rpo = DPO(beta=2.0, reference_free=True, length_normalise=True, margin=0.7, sft=0.5)
    loss = rpo.loss(family, batch)
    torch.testing.assert_close(loss.mean(), simpo + 0.5 * nll, atol=1e-5, rtol=1e-5)
    parts = [rpo.loss(family, p).value({**batch.counts(), **rpo.counts(batch)}) for p in batch.split(24)]
    assert len(parts) > 1
    torch.testing.assert_close(sum(parts), simpo + 0.5 * nll, atol=1e-5, rtol=1e-5)


def test_ipo_class_uses_token_means():
    family = tiny_llama()
    batch, ctx = random_pairs(rows=2), Context(family, models={"stage": tiny_llama(seed=3)})
    size = torch.tensor([[len(s.supervised)] for s in batch.sequences]).reshape(-1, 2)
    u = (sums(family, batch) - sums(ctx.model("stage"), batch)) / size
    expected = ((u[:, 0] - u[:, 1] - 1 / 0.4) ** 2).mean()
    torch.testing.assert_close(DPO(beta=0.2, link="ipo").loss(family, batch, ctx).mean(), expected, atol=1e-4, rtol=1e-5)


def test_reference_is_scored_once_and_travels_in_checkpoints():
    family, start = tiny_llama(), tiny_llama(seed=3)
    calls = []
    score = start.score
    start.score = lambda x: calls.append(len(x)) or score(x)
    batch, method, ctx = random_pairs(rows=3), DPO(), Context(family, models={"stage": start})
    first = method.loss(family, batch, ctx).mean().detach()
    again = method.loss(family, batch.take([2, 0, 1]), ctx).mean().detach()
    torch.testing.assert_close(first, again)
    assert calls == [6]
    other = DPO()
    other.load_state_dict(through_checkpoint(method.state_dict()))
    assert float(other.loss(family, batch, Context(family, models={"stage": start})).mean().detach()) == float(first)
    assert calls == [6]
    # other contents under the same row ids, and touched batches, are scored afresh
    method.loss(family, random_pairs(rows=3, seed=9), ctx)
    batch.touched = True
    method.loss(family, batch, ctx)
    assert [c if isinstance(c, int) else len(c) for c in calls][1] == 6 and len(calls) == 3
    # another run's reference is another reference
    assert float(method.loss(family, random_pairs(rows=3), Context(family, models={"stage": tiny_llama(seed=4)})).mean().detach()) != float(first)


def test_what_is_missing_is_said():
    family = tiny_llama()
    with pytest.raises(UserError, match="reference"):
        DPO().loss(family, random_pairs())
    with pytest.raises(DataError, match="no 'rejected' answer"):
        DPO(reference_free=True).loss(family, batch_of([sequence(np.arange(5, 10), 2, 0, "chosen")]))
    with pytest.raises(DataError, match="listwise"):
        preference(torch.zeros(1, 3))


@pytest.mark.parametrize("bad", [{"beta": 0.0}, {"link": "logistic"}, {"label_smoothing": 0.5, "link": "robust"}, {"label_smoothing": 0.0, "link": "exo_pair"},
                                 {"sft": -1.0}, {"margin": 1.0, "link": "hinge"}])  # fmt: skip
def test_bad_fields_are_refused(bad):
    with pytest.raises(RecipeError, match=next(iter(bad))):
        DPO(**bad)
