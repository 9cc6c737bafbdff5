"""ORPO against its formula in fp64, its gradient, and its limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from luthier.core.context import Context
from luthier.errors import RecipeError
from luthier.objective.orpo import ORPO, log_odds, orpo
from tests.helpers import tiny_llama
from tests.objective.lm_batches import batch_of, engine, gradients, logps_of, random_pairs, sequence


def test_log_odds_are_exact_and_finite():
    p = torch.tensor([1e-30, 1e-6, 0.3, 0.5, 0.7, 1 - 1e-4], dtype=torch.float64)
    torch.testing.assert_close(log_odds(p.log()).double(), torch.logit(p), rtol=1e-3, atol=1e-5)
    ends = torch.tensor([0.0, -1e-9, -200.0], requires_grad=True)
    value = log_odds(ends)
    value.sum().backward()
    assert bool(torch.isfinite(value).all()) and bool(torch.isfinite(ends.grad).all())


def test_the_loss_is_the_formula_on_the_networks_own_log_probabilities():
    family, batch = tiny_llama(), random_pairs()
    values = []
    for i in range(3):
        pair = [next(s for s in batch.sequences if s.row == i and s.branch == b) for b in ("chosen", "rejected")]
        a, b = (float(logps_of(family, s).double().mean().detach()) for s in pair)
        ratio = math.log(math.exp(a) / (1 - math.exp(a))) - math.log(math.exp(b) / (1 - math.exp(b)))
        values.append(-a + 0.3 * math.log1p(math.exp(-ratio)))
    ctx = Context(family)
    found = ORPO(beta=0.3, likelihood="answer").loss(family, batch, ctx)
    assert float(found.mean().detach()) == pytest.approx(np.mean(values), rel=1e-4)
    assert {"orpo/log_odds_ratio", "orpo/accuracy"} <= set(ctx.logged)


def of_trl(family, batch, beta):
    """trl's own loss of these pairs, chosen first, padded on the right."""
    from types import SimpleNamespace

    from trl.experimental.orpo import ORPOTrainer

    fed = {}
    for branch in ("chosen", "rejected"):
        own = [next(s for s in batch.sequences if s.row == i and s.branch == branch) for i in range(len(batch))]
        length = max(len(s) for s in own)
        fed[f"{branch}_input_ids"] = torch.tensor([[*s.ids, *[0] * (length - len(s))] for s in own])
        fed[f"{branch}_attention_mask"] = torch.tensor([[1] * len(s) + [0] * (length - len(s)) for s in own])
        fed[f"{branch}_labels"] = torch.tensor([[*np.where(s.mask, s.ids, -100), *[-100] * (length - len(s))] for s in own])
    accelerator = SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(beta=beta, is_encoder_decoder=False, aux_loss_enabled=False, pad_token_id=0, padding_value=0, label_pad_token_id=-100, accelerator=accelerator)
    for name in ("odds_ratio_loss", "concatenated_forward"):
        setattr(trainer, name, getattr(ORPOTrainer, name).__get__(trainer))
    trainer.get_batch_logps, trainer.concatenated_inputs = ORPOTrainer.get_batch_logps, ORPOTrainer.concatenated_inputs
    return ORPOTrainer.get_batch_loss_metrics(trainer, family.network, fed)[0]


@pytest.mark.filterwarnings("ignore")
def test_loss_and_gradient_are_those_of_trl():
    pytest.importorskip("trl.experimental.orpo")
    family, batch = tiny_llama(), random_pairs()
    theirs = of_trl(family, batch, 0.3)
    expected = gradients(family, theirs)
    mine = ORPO(beta=0.3).loss(family, batch).mean()
    assert float(mine.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    for a, b in zip(gradients(family, mine), expected):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("likelihood", ["text", "answer"])
def test_the_gradient_does_not_depend_on_the_split(likelihood):
    rows = [{"prompt": " ".join(f"w{j}" for j in range(i + 1)), "chosen": "w2 w3", "rejected": "w4"} for i in range(4)]
    found = []
    for tokens in (8, 4096):
        family = tiny_llama()
        found.append(engine(family, [ORPO(likelihood=likelihood)], rows, Context(family), steps=2, tokens_per_micro_batch=tokens).run().losses["loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_equal_answers_cost_log_two_and_the_gradient_pulls_them_apart():
    better = torch.tensor([-1.2], requires_grad=True)
    other = torch.tensor([-1.2], requires_grad=True)
    loss = orpo(better, other, beta=0.5)
    assert float(loss) == pytest.approx(1.2 + 0.5 * math.log(2))
    loss.backward()
    # d log odds / d l = 1 / (1 - p), times beta / 2
    slope = 0.5 / 2 / (1 - math.exp(-1.2))
    assert float(other.grad) == pytest.approx(slope, rel=1e-4) and float(better.grad) == pytest.approx(-1 - slope, rel=1e-4)


def test_length_does_not_matter_but_order_does():
    a, b = torch.tensor([-0.5]), torch.tensor([-2.0])
    assert float(orpo(a, b)) < float(orpo(a, a)) and float(orpo(a, b) - orpo(a, a)) == pytest.approx(float(-0.1 * torch.nn.functional.logsigmoid(log_odds(a) - log_odds(b)) - 0.1 * math.log(2)))


def test_training_ranks_the_pair():
    family = tiny_llama()
    rows = [{"prompt": "w1", "chosen": "w2 w3", "rejected": "w4"}]
    before = family.score(batch_of([sequence([20, 23], 1)])).logp
    outcome = engine(family, [ORPO(beta=1.0)], rows, Context(family), steps=12).run()
    assert outcome.losses["loss"] < 5 and torch.isfinite(before).all()
    pairs = family.collate(rows)
    sums = family.score(pairs).rows("mean")
    assert float(sums[0]) > float(sums[1])


def test_bad_fields_are_refused():
    with pytest.raises(RecipeError, match="beta"):
        ORPO(beta=0)
    with pytest.raises(RecipeError, match="likelihood"):
        ORPO(likelihood="prompt")
