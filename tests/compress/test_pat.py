"""PAT: the model is unchanged at the start, and the small network is the hard-masked one exactly."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from luthier.compress.pat import PAT, count_loss, decay, pat
from luthier.core.context import Context
from luthier.core.models import load
from luthier.core.rows import Rows
from luthier.errors import RecipeError
from luthier.recipe import Recipe, check
from luthier.run import tune
from luthier.testing import toys
from luthier.testing.tiny import tiny_llama

ROWS = toys.rows(frozenset({"prompt", "completion"}), 6)


def context(model):
    return Context(model, 0, {"train": Rows.of(ROWS)})


def logp(model):
    with model.evaluating():
        return model.score(model.collate(ROWS)).logp


# the mathematics ------------------------------------------------------------------------------------------------------------
def test_the_mask_is_one_at_first_and_hard_at_the_end():
    w, horizon = torch.linspace(-0.5, 0.5, 11), 1000.0
    assert torch.equal(pat(torch.zeros(5), 0, horizon), torch.ones(5))
    for s in (1, 40, 300, 799):
        tau = 1 / (1 - math.log(s) / math.log(horizon) + 1e-6)
        expected = 1 / (1 + np.exp(np.minimum(-tau * w.double().numpy(), 10))) + max(0.5 - s / horizon, 0)
        np.testing.assert_allclose(pat(w, s, horizon), expected, rtol=1e-5)
    late = pat(w.requires_grad_(), 900, horizon)
    assert not late.requires_grad and torch.equal(late, pat(w, 800, horizon)) and pat(w, 700, horizon).requires_grad
    assert float(late[0]) < 1e-4 and float(late[-1]) > 0.9999
    far = torch.tensor([2.0, -2.0], requires_grad=True)
    assert pat(far, 700, horizon).tolist() == [1.0, pytest.approx(1 / (1 + math.exp(10)))], "the exponent is bounded where it is large only"
    assert not pat(far, 800, 1001.0).requires_grad and pat(far, 799, 1001.0).requires_grad, "int(0.8 S)"
    assert torch.equal(pat(w, 900, 1001.0), pat(w, 800, 1001.0))


def test_given_channels_fade_continuously():
    values = [float(decay(8, 6, s, 100.0)[7]) for s in (0, 50, 100, 150, 200)]
    np.testing.assert_allclose(values, [1, math.exp(-1.385), math.exp(-2.77), math.exp(-5.54), math.exp(-8.31)], rtol=1e-5)
    assert float(decay(8, 6, 200, 100.0)[:6].min()) == 1


def test_the_count_is_pulled_to_what_shall_stay():
    w = torch.tensor([0.5, 0.5, 0.5, -0.5], requires_grad=True)
    assert float(count_loss(w, 3)) == 0
    assert float(count_loss(w, 2)) == pytest.approx(5.0)
    assert torch.equal(torch.autograd.grad(count_loss(w, 2), w)[0], torch.full((4,), 5.0)), "too many: all are pushed down"
    assert torch.equal(torch.autograd.grad(count_loss(w, 4), w)[0], torch.full((4,), -2.5)), "too few: all are pushed up"
    v = torch.tensor([0.2, -0.1], requires_grad=True)
    assert float(count_loss(v, 1)) == pytest.approx(0.09 + 0.16)


# the network ----------------------------------------------------------------------------------------------------------------
def moved(method, seed=0):
    """Operators and mask as after some training."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for operator in method._operators:
            for p in operator.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=rng))
        method._mask.weight.copy_(torch.randn(len(method._mask.weight), generator=rng))


def test_the_model_is_unchanged_at_the_start():
    model = tiny_llama()
    before, method = logp(model), PAT(rank=3)
    parts = method.attach(model, context(model))
    torch.testing.assert_close(logp(model), before, atol=1e-5, rtol=1e-5)
    assert [g.role for g in parts.groups] == ["operator", "mask"] and len(method._operators) == 5
    (-model.score(model.collate(ROWS)).logp.mean()).backward()
    assert all(bool(o.up.grad.any()) and bool(o.gain.grad.any()) for o in method._operators) and bool(method._mask.weight.grad.any())


@pytest.mark.parametrize(("keep", "tied"), [(0.75, True), (0.5, False)])
def test_the_small_network_is_the_masked_one(tmp_path, keep, tied):
    from luthier.core.models import save_network

    model, method = tiny_llama(tie_word_embeddings=tied, attention_bias=True), PAT(keep=keep, rank=3)
    with torch.no_grad():
        for n, p in model.network.named_parameters():
            if "norm" in n or "bias" in n:
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    method.attach(model, context(model))
    moved(method)
    with method.folded(model):
        masked = logp(model)
    small = method.compress(model)
    width = round(keep * 32)
    assert small.network.model.embed_tokens.weight.shape[1] == width and small.config.hidden_size == width
    torch.testing.assert_close(logp(small), masked, atol=1e-4, rtol=1e-4)
    save_network(small, tmp_path)
    torch.testing.assert_close(logp(load(str(tmp_path))), masked, atol=1e-4, rtol=1e-4)
    assert method.report["parameters"] == sum(p.numel() for p in small.network.parameters()) < method.report["parameters_before"] + 64 * 32
    with method.folded(model):
        torch.testing.assert_close(logp(model), masked)


def recipe(folder, **more):
    plan = toys.recipe({"adapt": "lora"}, "causal-lm", folder)
    plan["compress"] = [{"method": "pat", "rank": 2, "keep": 0.5, "mask_rate": 20.0}]
    plan["train"] |= {"steps": 5, "save_every": 2}
    return plan | more


@pytest.mark.parametrize("adapt", [{"method": "lora", "rank": 2}, {"method": "full"}])
def test_a_run_writes_a_plain_network_of_half_the_width(tmp_path, adapt):
    done = tune(Recipe.from_dict(recipe(tmp_path / "run", adapt=adapt)))
    model = load(str(done.model_path))
    assert not hasattr(model.network, "peft_config") and model.config.hidden_size == 16
    facts = json.loads((tmp_path / "run" / "report.json").read_text())["stages"][0]["compress"][0]
    assert facts["width"] == 16 and facts["parameters"] == sum(p.numel() for p in model.network.parameters())
    assert len(model.generate(["w1 w2"])[0]) == 1


def test_bad_values_and_partners_are_refused(tmp_path):
    for bad in ({"keep": 1.0}, {"keep": 0.0}, {"rank": 0}, {"mask": "none"}, {"mask_rate": 0.0}, {"horizon": 0.0}, {"count_weight": -1.0}):
        with pytest.raises(RecipeError, match=next(iter(bad))):
            PAT(**bad)
    with pytest.raises(RecipeError, match="needs a run"):
        PAT().compress({"a": torch.zeros(2, 2)})
    with pytest.raises(RecipeError, match="cannot be merged"):
        check(Recipe.from_dict(recipe(tmp_path, merge={"method": "lines"})))
