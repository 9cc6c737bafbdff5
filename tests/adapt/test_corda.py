"""CorDA: exact splits, its special cases, the optimality of what it discards, and equality with peft's own preprocessing."""

from __future__ import annotations

import copy
import dataclasses
import sys
import types

import pytest
import torch

from luthier.adapt.corda import CorDA, corda, decompose, discard
from luthier.core.collect import collect
from luthier.errors import RecipeError
from tests.adapt._rows import ROWS, context, llama


def case(out=9, into=7, tokens=200, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(tokens, into) @ torch.randn(into, into)
    return torch.randn(out, into), x.T @ x / tokens, x


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
@pytest.mark.parametrize("shape", [(9, 7), (7, 9)])
def test_residual_and_factors_give_the_weight_back(mode, shape):
    weight, covariance, _ = case(*shape)
    residual, b, a, damp = corda(weight, covariance, 3, mode)
    assert b.shape == (shape[0], 3) and a.shape == (3, shape[1]) and damp == 0.01
    assert float((residual + b @ a - weight).abs().max()) < 1e-4
    assert weight.dtype == residual.dtype


def test_without_covariance_it_is_pissa_and_milora():
    """C = I: the plain SVD's leading (ipm) or trailing (kpm) components, up to the sign of a pair of vectors."""
    weight, _, _ = case()
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    for mode, part in (("ipm", slice(0, 3)), ("kpm", slice(len(s) - 3, len(s)))):
        product = (u[:, part] * s[part]) @ vh[part]
        for context_ in (torch.eye(7), torch.eye(7) * 5.0, None):
            _, b, a, _ = corda(weight, context_, 3, mode)
            torch.testing.assert_close(b @ a, product, atol=1e-5, rtol=1e-4)


def test_pissa_of_peft_is_the_ipm_mode_without_orientation():
    from luthier.adapt.pissa import Pissa

    one, two = llama(), llama()
    Pissa(rank=4).attach(one)
    CorDA(rank=4, mode="ipm", orientation="none").attach(two)
    for (n, p), (_, q) in zip(one.network.named_parameters(), two.network.named_parameters()):
        if "base_layer" in n:
            torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


def test_discarding_loses_least_in_the_context():
    """||(W - W_k) C'||_F is minimal over all rank-k weights: no random or plain-SVD truncation comes below."""
    weight, covariance, _ = case()
    fixed = covariance + 0.01 * covariance.diagonal().mean() * torch.eye(7)
    loss = lambda w: float(((weight - w) @ fixed).norm())  # noqa: E731
    ours = loss(discard(weight, covariance, 3))
    _, s, _ = torch.linalg.svd(weight @ fixed)
    assert ours == pytest.approx(float(s[4:].norm()), rel=1e-3)
    assert ours < loss(discard(weight, None, 3))
    for seed in range(20):
        q = torch.linalg.qr(torch.randn(9, 4, generator=torch.Generator().manual_seed(seed))).Q
        assert ours < loss(q @ q.T @ weight)


def test_asvd_scales_columns():
    weight, _, x = case()
    scales = x.abs().mean(0)
    u, s, vh, _ = decompose(weight, scales)
    torch.testing.assert_close((u * s @ vh).float(), weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(s.float(), torch.linalg.svdvals(weight * (scales + 1e-6)), atol=1e-4, rtol=1e-4)


def test_a_rank_deficient_covariance_is_damped_until_it_inverts():
    weight, _, x = case(into=7)
    thin = x[:2].T @ x[:2]
    residual, b, a, damp = corda(weight, thin, 2)
    assert damp >= 0.01 and torch.isfinite(residual).all() and float((residual + b @ a - weight).abs().max()) < 1e-3
    assert corda(weight, torch.zeros(7, 7), 2)[3] == 0.01


def peft_corda():
    """peft's module needs `attr` for a plain dataclass; the standard library's serves where it is missing."""
    sys.modules.setdefault("attr", types.SimpleNamespace(dataclass=dataclasses.dataclass))
    from peft.tuners.lora import corda as module

    return module


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_equals_pefts_preprocessing(mode):
    """With the release's scaling (`scale: max`) and unpadded rows, peft's own collector and decomposition give the same split."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.config import CordaConfig

    rows = [r for r in ROWS if len(r["ids"]) == 8]
    ours = llama()
    theirs = copy.deepcopy(ours.network)
    CorDA(rank=4, mode=mode, scale="max", targets=["down_proj"], samples=20).attach(ours, context(ours, rows))
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["down_proj"], init_lora_weights="corda", corda_config=CordaConfig(corda_method=mode))

    def run():
        for row in rows:
            theirs(input_ids=torch.tensor([row["ids"]]))

    peft_corda().preprocess_corda(theirs, config, run)
    wrapped = get_peft_model(theirs, config)
    pairs = [(m, ours.network.get_submodule(n)) for n, m in wrapped.named_modules() if hasattr(m, "lora_A")]
    assert len(pairs) == 2
    for t, o in pairs:
        torch.testing.assert_close(o.get_base_layer().weight, t.get_base_layer().weight, atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(o.get_delta_weight("default"), t.get_delta_weight("default"), atol=2e-4, rtol=1e-3)


def test_modes_take_opposite_ends():
    model = llama()
    stats = collect(model, ROWS, {"second_moment"}, sites=["model.layers.0.mlp.up_proj"], scale="abs_max")["model.layers.0.mlp.up_proj"]
    weight = model.network.model.layers[0].mlp.up_proj.weight.detach()
    covariance = stats["second_moment"] / stats["sequences"]
    sizes = [float((b @ a @ covariance).norm()) for mode in ("kpm", "ipm") for _, b, a, _ in [corda(weight, covariance, 4, mode)]]
    assert sizes[0] < sizes[1]


def test_logits_are_unchanged_and_padding_does_not_matter():
    one, two = llama(), llama()
    ids = torch.tensor([ROWS[3]["ids"]])
    before = one.network(input_ids=ids).logits
    tuner = CorDA(rank=4, samples=12)
    tuner.attach(one, context(one))
    torch.testing.assert_close(one.network(input_ids=ids).logits, before, atol=1e-4, rtol=1e-3)
    assert tuner.report and max(tuner.report.values()) == 0.01
    alone = context(two)
    alone.batch_size = 1
    CorDA(rank=4, samples=12).attach(two, alone)
    for (_, p), (_, q) in zip(one.network.named_parameters(), two.network.named_parameters()):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


def test_a_calibration_stream_is_preferred():
    one, two = llama(), llama()
    from luthier.core.context import Context

    ctx = Context(one, streams={"train": ROWS[:3], "calibration": ROWS[3:]}, batch_size=6)
    CorDA(rank=4, samples=9).attach(one, ctx)
    CorDA(rank=4, samples=9).attach(two, context(two, ROWS[3:]))
    for (_, p), (_, q) in zip(one.network.named_parameters(), two.network.named_parameters()):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


def test_bad_values():
    for bad in ({"mode": "both"}, {"damp": 0.0}, {"samples": 0}, {"scale": "mean"}):
        with pytest.raises(RecipeError, match=next(iter(bad))):
            CorDA(**bad)
    with pytest.raises(RecipeError, match="smallest side"):
        CorDA(rank=64).attach(llama(), context())
    with pytest.raises(RecipeError, match="calibration"):
        CorDA(rank=4).attach(llama())
