"""The residual stream: folding norms and turning the basis leave the model as it was; other architectures are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from luthier.core.plugin import Group, give_up
from luthier.core.quant import Rotation, fake_quant
from luthier.core.residual import Residual
from luthier.core.simulate import Site, release, release_attention, simulate, simulate_attention
from luthier.errors import ModelError
from luthier.testing.tiny import tiny_bert, tiny_llama

IDS = torch.arange(5, 29).reshape(2, 12)


def logits(model):
    with torch.no_grad():
        return model.network(input_ids=IDS).logits


@pytest.mark.parametrize("hidden", [32, 24])
def test_the_model_is_the_same_in_another_basis(hidden):
    model = tiny_llama(hidden=hidden, tie_word_embeddings=True, attention_bias=True)
    with torch.no_grad():
        for n, p in model.network.named_parameters():
            if "norm" in n or "bias" in n:
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    before, residual = logits(model), Residual(model)
    assert residual.untie() and not residual.untie()
    residual.fold_norms()
    assert all(bool((p == 1).all()) for p in residual.gains.values()) and len(residual.gains) == 5
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)
    rotation, weight = Rotation(hidden, 0), model.network.model.embed_tokens.weight.clone()
    residual.rotate(rotation)
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(weight, model.network.model.embed_tokens.weight)
    residual.rotate(rotation, back=True)
    torch.testing.assert_close(model.network.model.embed_tokens.weight, weight, atol=1e-5, rtol=1e-5)


def test_other_architectures_are_refused_with_a_sentence():
    with pytest.raises(ModelError, match="Llama kind"):
        Residual(tiny_bert(), "roste")
    model = tiny_llama()
    model.network.model.norm = nn.LayerNorm(32)
    with pytest.raises(ModelError, match="RMS norms"):
        Residual(model, "roste")


def test_a_simulated_layer_rounds_and_is_released():
    layer, x = nn.Linear(16, 8), torch.randn(3, 16)
    rotation = Rotation(16, 2)
    simulate(layer, Site(4, 3, 1.0, 0.9, rotation))
    expected = nn.functional.linear(fake_quant(rotation(x), 3, 0.9), fake_quant(layer.weight, 4), layer.bias)
    assert torch.equal(layer(x), expected) and isinstance(layer, nn.Linear) and set(layer.state_dict()) == {"weight", "bias"}
    layer.site.on = False
    torch.testing.assert_close(layer(x), nn.functional.linear(rotation(x), layer.weight, layer.bias))
    release(layer)
    assert type(layer) is nn.Linear and torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("inner", ["eager", "sdpa"])
def test_attention_rounds_keys_and_values_and_rotating_both_sides_changes_nothing(inner):
    model = tiny_llama(num_key_value_heads=2)
    model.network.set_attn_implementation(inner)
    before = logits(model)
    attentions = [layer.self_attn for layer in model.network.model.layers]
    sites = [Site(rotation=Rotation(8, i)) for i in range(2)]
    simulate_attention(model.network, dict(zip(attentions, sites)))
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)
    seen = []
    for site in sites:
        site.input_bits, site.watch = 3, lambda k, v: seen.append((k.shape, v.shape))
    assert not torch.allclose(logits(model), before, atol=1e-2) and seen == [((2, 2, 12, 8), (2, 2, 12, 8))] * 2
    release_attention(model.network)
    assert torch.equal(logits(model), before)


def test_what_a_later_plugin_names_leaves_the_earlier_groups():
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    first, second = Group("body", {"a": a, "b": b}), Group("codes", {"b2": b})
    give_up([first], [second])
    assert list(first.params) == ["a"] and list(second.params) == ["b2"]
