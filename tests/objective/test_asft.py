"""ASFT against formulas written out on the network's own logits, torch's kl_div and peft's disabled adapter."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from luthier.core.context import Context
from luthier.errors import RecipeError, UserError
from luthier.objective.asft import ASFT, asft
from tests.helpers import tiny_llama
from tests.objective.lm_batches import batch_of, gradients, logits_of, random_batch, sequence


def by_hand(logits, target, reference, kl, weighting="dft", direction="forward"):
    """As the release computes it: token cross-entropy, detached probability, F.kl_div."""
    nll = F.cross_entropy(logits, target, reduction="none")
    p = torch.softmax(logits, -1).gather(1, target[:, None])[:, 0].detach()
    a, b = (logits, reference) if direction == "forward" else (reference, logits)
    drift = F.kl_div(F.log_softmax(a, -1), F.softmax(b, -1), reduction="none").sum(-1)
    return (nll * p if weighting == "dft" else nll) + kl * drift


@pytest.mark.parametrize("weighting", ["dft", "none"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_value_and_gradient_equal_the_formula(weighting, direction):
    target, reference = torch.randint(13, (6,)), torch.randn(6, 13)
    a, b = (torch.randn(6, 13, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    mine, expected = asft(a, target, reference, 0.3, weighting, direction), by_hand(b, target, reference, 0.3, weighting, direction)
    torch.testing.assert_close(mine, expected)
    mine.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_dft_gradient_is_p_times_p_minus_onehot():
    logits, target = torch.randn(5, 9, requires_grad=True), torch.randint(9, (5,))
    asft(logits, target, kl=0.0).sum().backward()
    p = torch.softmax(logits.detach(), -1)
    expected = p.gather(1, target[:, None]) * (p - F.one_hot(target, 9))
    torch.testing.assert_close(logits.grad, expected)


def test_no_kl_without_drift_and_none_on_certain_tokens():
    logits, target = torch.randn(4, 7, requires_grad=True), torch.randint(7, (4,))
    gap = asft(logits, target, logits.detach(), kl=5.0) - asft(logits, target, kl=0.0)
    assert gap.abs().max() == 0
    (gradient,) = torch.autograd.grad(gap.sum(), logits)
    assert gradient.abs().max() < 1e-6
    sure = (60.0 * F.one_hot(target, 7)).requires_grad_()
    for weighting in ("dft", "none"):
        (gradient,) = torch.autograd.grad(asft(sure, target, kl=0.0, weighting=weighting).sum(), sure)
        assert gradient.abs().max() < 1e-6


def test_class_equals_the_formula_on_plain_forwards():
    family, start = tiny_llama(seed=1), tiny_llama(seed=2)
    batch, ctx = random_batch(rows=3, weights=[1.0, 2.0, 0.5]), Context(family, models={"stage": start})
    parts, weights = [], []
    for s, w in zip(batch.sequences, [1.0, 2.0, 0.5]):
        logits, target = logits_of(family, s), torch.from_numpy(s.ids[s.supervised])
        parts.append(w * by_hand(logits, target, logits_of(start, s).detach(), 0.1))
        weights += [w] * len(target)
    expected = torch.cat(parts).sum() / sum(weights)
    loss = ASFT(kl=0.1).loss(family, batch, ctx)
    torch.testing.assert_close(loss.mean(), expected, atol=1e-5, rtol=1e-4)
    for a, b in zip(gradients(family, loss.value(batch.counts())), gradients(family, expected)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)
    assert ctx.logged["drift"] > 0
    assert all(p.grad is None for p in start.network.parameters())


def test_adapter_off_reference_equals_a_frozen_copy_even_with_an_adapter_on_the_head():
    from contextlib import contextmanager

    from peft import LoraConfig, get_peft_model

    family = tiny_llama()
    frozen = family.frozen_copy()
    torch.manual_seed(0)
    family.network = get_peft_model(family.network, LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False))

    @contextmanager
    def off():
        with family.network.disable_adapter():
            yield

    batch = random_batch()
    switched = ASFT().loss(family, batch, Context(family, switch=off)).mean()
    copied = ASFT().loss(family, batch, Context(family, models={"stage": frozen})).mean()
    plain = ASFT(kl=0).loss(family, batch).mean()
    torch.testing.assert_close(switched, copied, atol=1e-6, rtol=1e-6)
    assert float((switched - plain).detach()) > 1e-4
    for a, b in zip(torch.autograd.grad(switched, trained(family)), torch.autograd.grad(copied, trained(family))):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def trained(family):
    return [p for p in family.network.parameters() if p.requires_grad]


def test_reference_runs_without_dropout():
    family = tiny_llama(attention_dropout=0.5)
    start = copy.deepcopy(family)
    batch, ctx = random_batch(), Context(family, models={"stage": start})
    start.network.train()
    first, second = (ASFT(kl=1.0).loss(family, batch, ctx).mean().detach() for _ in range(2))
    assert float(first) == float(second)
    assert start.network.training


def test_needs_a_reference_only_with_kl():
    family = tiny_llama()
    assert ASFT(kl=0).needs == frozenset() and ASFT().needs == {"reference"}
    assert torch.isfinite(ASFT(kl=0).loss(family, random_batch()).mean())
    with pytest.raises(UserError, match="reference"):
        ASFT().loss(family, random_batch())


def test_nothing_supervised_is_zero():
    family = tiny_llama()
    empty = batch_of([sequence([5, 6, 7], prompt=3)])
    assert float(ASFT().loss(family, empty, Context(family, models={"stage": family})).mean().detach()) == 0.0


@pytest.mark.parametrize("bad", [{"kl": -0.1}, {"weighting": "sft"}, {"direction": "both"}])
def test_bad_fields_are_refused(bad):
    with pytest.raises(RecipeError, match=next(iter(bad))):
        ASFT(**bad)
