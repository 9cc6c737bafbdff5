"""The short path computes what the usual one does, gives the same gradients and keeps less."""

from __future__ import annotations

import copy
import statistics
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from luthier.core.lean import lean
from luthier.core.meters import saved_bytes


def network(bias: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, mlp_bias=bias, attention_bias=bias)
    made = LlamaForCausalLM(config)
    for name, param in made.named_parameters():
        if "norm" in name or "bias" in name:
            nn.init.normal_(param, 1.0, 0.1)
    return made


def adapted(targets: list[str], bias: bool = False, **fields: object) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    made = get_peft_model(network(bias), LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False, **fields))  # type: ignore[arg-type]
    return made


IDS = torch.arange(24).reshape(2, 12) % 50
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def passed(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    return out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def alike(one: tuple, other: tuple) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=1e-5)
    assert one[1].keys() == other[1].keys()
    for name, grad in one[1].items():
        torch.testing.assert_close(grad, other[1][name], rtol=1e-4, atol=1e-6, msg=name)


MODELS = {
    "all weights": network,
    "all weights and biases": lambda: network(True),
    "lora": lambda: adapted(ALL),
    "lora beside biases": lambda: adapted(ALL, True),
    "lora in some places": lambda: adapted(["q_proj", "down_proj"]),
    "lora that drops": lambda: adapted(ALL, lora_dropout=0.5),
    "dora": lambda: adapted(ALL, use_dora=True),
    "some tensors": lambda: some(network()),
}


def some(model: nn.Module) -> nn.Module:
    """Trained: a gate, one layer's down projection and a norm."""
    for name, param in model.named_parameters():
        param.requires_grad_(name in ("model.layers.1.mlp.gate_proj.weight", "model.layers.0.mlp.down_proj.weight", "model.layers.1.input_layernorm.weight"))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_the_same_numbers(name):
    model = MODELS[name]()
    torch.manual_seed(1)
    usual = passed(model)
    with lean(model):
        torch.manual_seed(1)
        short = passed(model)
    alike(short, usual)


CAST = {
    "all weights and biases": lambda: network(True),
    "lora": lambda: adapted(ALL),
    "lora in some places": lambda: adapted(["q_proj", "down_proj"]),
    "lora on a base in half precision": lambda: halved(adapted(ALL)),
}


def halved(model: nn.Module) -> nn.Module:
    for name, param in model.named_parameters():
        if "lora" not in name and "norm" not in name:
            param.data = param.data.bfloat16()
    return model


def apart(grads: dict[str, torch.Tensor], whole: dict[str, torch.Tensor]) -> float:
    return sum(float((grads[n].float() - g).square().sum()) for n, g in whole.items()) ** 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CAST)
def test_under_autocast_it_is_as_near_to_full_precision_as_the_usual_path(name, dtype):
    """Rounding falls one way or the other, so the errors are compared over several models."""
    ratios = []
    for seed in range(10):
        model = CAST[name]()
        torch.manual_seed(seed)
        for param in model.parameters():
            param.data += 0.03 * torch.randn_like(param)
        whole = passed(copy.deepcopy(model).float())
        with torch.autocast("cpu", dtype):
            usual = passed(model)
            with lean(model):
                short = passed(model)
        assert short[1].keys() == usual[1].keys() and all(short[1][n].dtype == g.dtype for n, g in usual[1].items())
        assert short[0].dtype == usual[0].dtype and not torch.equal(short[0], whole[0])  # products were made in the other type
        ratios.append(apart(short[1], whole[1]) / apart(usual[1], whole[1]))
    assert statistics.geometric_mean(ratios) < 1.5


def test_under_autocast_no_cast_of_a_frozen_weight_is_kept():
    model, kept = adapted(ALL), []
    with torch.autocast("cpu", torch.bfloat16):
        for context in (nullcontext(), lean(model)):
            with context, saved_bytes(model) as saved:
                model(input_ids=IDS[:, :3]).logits.sum()
                kept.append(saved.peak)
    assert kept[1] < 0.5 * kept[0]


def test_gradients_of_gradients_under_autocast():
    model = adapted(ALL)
    model.set_attn_implementation("eager")
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def curvature(cast: bool) -> dict[str, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            grads = torch.autograd.grad(model(input_ids=IDS, labels=IDS).loss, list(params.values()), create_graph=True)
        return dict(zip(params, torch.autograd.grad(sum((g.float() ** 2).sum() for g in grads), list(params.values()))))

    whole, usual = curvature(False), curvature(True)
    with lean(model):
        assert apart(curvature(True), whole) < 2 * apart(usual, whole)


def test_less_is_kept_and_fewer_nodes_are_made():
    model, kept = adapted(ALL), []
    with saved_bytes(model) as saved:
        model(input_ids=IDS).logits.sum()
        kept.append(saved.peak)
    with lean(model), saved_bytes(model) as saved:
        model(input_ids=IDS).logits.sum()
        kept.append(saved.peak)
    assert kept[1] < 0.75 * kept[0]


def test_gradients_of_gradients():
    def curvature(model: nn.Module) -> list[torch.Tensor]:
        params = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(model(input_ids=IDS, labels=IDS).loss, params, create_graph=True)
        return list(torch.autograd.grad(sum((g**2).sum() for g in grads), params))

    model = adapted(ALL)
    model.set_attn_implementation("eager")
    usual = curvature(model)
    with lean(model):
        short = curvature(model)
    for a, b in zip(short, usual):
        torch.testing.assert_close(a, b, rtol=5e-3, atol=2e-4)


@pytest.mark.parametrize("name", ["lora", "all weights"])
def test_under_gradient_checkpoints(name):
    model = MODELS[name]().train()
    usual = passed(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if name == "lora":
        model.enable_input_require_grads()
    with lean(model):
        alike(passed(model), usual)


def test_hooks_of_inner_layers_see_what_they_saw():
    model = adapted(ALL)
    layer, seen = model.get_submodule("base_model.model.model.layers.0.mlp.gate_proj"), []
    layer.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    usual = passed(model)
    with lean(model):
        alike(passed(model), usual)
    assert len(seen) == 2
    torch.testing.assert_close(seen[0], seen[1])


def test_per_example_gradients_by_functorch():
    model = network()
    params = {n: p.detach() for n, p in model.named_parameters()}

    def loss(params, ids):
        return torch.func.functional_call(model, params, kwargs={"input_ids": ids[None], "labels": ids[None]}).loss

    def each():
        return torch.func.grad(loss)(params, IDS[0])

    usual = each()
    with lean(model):
        short = each()
    for name, value in usual.items():
        torch.testing.assert_close(short[name], value)


def test_classes_come_back_also_after_an_error_and_copies_live_on():
    model = adapted(ALL)
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError), lean(model):
        twin = copy.deepcopy(model)
        raise ValueError
    assert [type(m) for m in model.modules()] == before
    alike(passed(twin), passed(model))


def test_adapters_switched_off_and_merged():
    model = adapted(ALL)
    with torch.no_grad(), model.disable_adapter():
        usual = model(input_ids=IDS).logits
        with lean(model):
            torch.testing.assert_close(model(input_ids=IDS).logits, usual)
    with torch.no_grad():
        whole = model(input_ids=IDS).logits
        assert not torch.allclose(whole, usual)
        model.merge_adapter()
        with lean(model):
            torch.testing.assert_close(model(input_ids=IDS).logits, whole, rtol=1e-4, atol=1e-5)
            with model.disable_adapter():
                torch.testing.assert_close(model(input_ids=IDS).logits, usual, rtol=1e-4, atol=1e-5)
