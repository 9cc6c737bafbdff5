"""The map of every architecture the library knows, from its own module names and from plain state-dict names."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from luthier.core.modelmap import Heads, ModelMap, block_index, category, depth
from luthier.errors import ModelError
from tests.helpers import tiny_bert, tiny_clip, tiny_llama, tiny_vit


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=20, n_positions=16))


def distilbert():
    return transformers.DistilBertForMaskedLM(transformers.DistilBertConfig(n_layers=2, dim=16, n_heads=2, hidden_dim=16, vocab_size=20))


def swin():
    config = transformers.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 2], num_heads=[1, 2], window_size=4)
    return transformers.SwinForImageClassification(config)


def t5():
    return transformers.T5ForConditionalGeneration(transformers.T5Config(num_layers=2, d_model=8, d_ff=8, num_heads=2, d_kv=4, vocab_size=20))


BLOCKS = {
    "llama": (lambda: tiny_llama().network, ["model.layers.0", "model.layers.1"]),
    "gpt2": (gpt2, ["transformer.h.0", "transformer.h.1"]),
    "bert": (lambda: tiny_bert().network, ["bert.encoder.layer.0", "bert.encoder.layer.1"]),
    "vit": (lambda: tiny_vit().network, ["vit.layers.0", "vit.layers.1"]),
    "clip": (lambda: tiny_clip(layers=1).network, ["text_model.encoder.layers.0", "vision_model.encoder.layers.0"]),
    "distilbert": (distilbert, ["distilbert.transformer.layer.0", "distilbert.transformer.layer.1"]),
    "swin": (swin, ["swin.encoder.layers.0.blocks.0", "swin.encoder.layers.1.blocks.0", "swin.encoder.layers.1.blocks.1"]),
    "t5": (t5, ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_partition_the_parameters(name):
    make, wanted = BLOCKS[name]
    network = make()
    found = ModelMap(network)
    assert [path for path, _ in found.blocks] == wanted
    for place, (path, module) in enumerate(found.blocks):
        for own, _ in module.named_parameters():
            assert found.block_of(f"{path}.{own}") == place
    inside = {n for n, _ in network.named_parameters() if found.block_of(n) is not None}
    assert inside == {f"{path}.{own}" for path, m in found.blocks for own, _ in m.named_parameters()}


CATEGORIES = {
    "model.embed_tokens.weight": "embedding", "model.layers.3.self_attn.q_proj.weight": "attention", "model.layers.3.self_attn.q_norm.weight": "norm",
    "model.layers.3.mlp.gate_proj.weight": "ffn", "model.layers.3.post_attention_layernorm.weight": "norm", "model.norm.weight": "norm", "lm_head.weight": "head",
    "transformer.wte.weight": "embedding", "transformer.h.1.attn.c_proj.bias": "attention", "transformer.h.1.mlp.c_proj.bias": "ffn",
    "transformer.h.1.ln_2.bias": "norm", "transformer.ln_f.weight": "norm",
    "bert.embeddings.word_embeddings.weight": "embedding", "bert.embeddings.LayerNorm.bias": "norm", "bert.encoder.layer.0.attention.output.dense.weight": "attention",
    "bert.encoder.layer.0.attention.output.LayerNorm.weight": "norm", "bert.encoder.layer.0.output.dense.weight": "ffn",
    "bert.encoder.layer.0.intermediate.dense.bias": "ffn", "bert.pooler.dense.weight": "other", "classifier.weight": "head", "cls.predictions.bias": "head",
    "vit.embeddings.cls_token": "embedding", "vit.encoder.layer.2.attention.attention.query.weight": "attention", "vit.encoder.layer.2.output.dense.weight": "ffn",
    "vit.encoder.layer.2.layernorm_before.weight": "norm", "vision_model.pre_layrnorm.weight": "norm", "vision_model.encoder.layers.0.mlp.fc1.weight": "ffn",
    "visual_projection.weight": "head", "logit_scale": "other", "base_model.model.model.layers.1.self_attn.v_proj.lora_A.default.weight": "attention",
    "decoder.block.1.layer.2.DenseReluDense.wo.weight": "ffn", "decoder.block.1.layer.1.EncDecAttention.k.weight": "attention",
}  # fmt: skip


@pytest.mark.parametrize("name", CATEGORIES)
def test_categories(name):
    assert category(name) == CATEGORIES[name]


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("model.layers.11.mlp.up_proj.weight", (11, "")),
        ("base_model.model.model.layers.7.self_attn.q_proj.lora_B.default.weight", (7, "")),
        ("transformer.h.4.attn.c_attn.weight", (4, "")),
        ("text_model.encoder.layers.2.mlp.fc1.weight", (2, "text_model")),
        ("vision_model.encoder.layers.9.mlp.fc1.weight", (9, "vision_model")),
        ("vision_model.embeddings.class_embedding", (None, "vision_model")),
        ("decoder.block.3.layer.2.DenseReluDense.wi.weight", (3, "decoder")),
        ("model.decoder.layers.5.fc1.weight", (5, "decoder")),
        ("bert.encoder.layer.0.output.dense.weight", (0, "")),
        ("classifier.1.weight", (None, "")),
        ("mlp.0.weight", (None, "")),
        ("lm_head.weight", (None, "")),
    ],
)
def test_block_index_of_plain_names(name, wanted):
    assert block_index(name) == wanted


def test_depth_counts_each_tower_and_numbers_nested_blocks_through():
    found = depth([n for n, _ in tiny_clip(layers=2).network.named_parameters()] + ["vision_model.encoder.layers.2.mlp.fc1.weight"])
    assert found["text_model.encoder.layers.1.mlp.fc1.weight"] == (1, 2)
    assert found["vision_model.encoder.layers.1.mlp.fc1.weight"] == (1, 3)
    assert found["text_projection.weight"] is None and found["vision_model.embeddings.class_embedding"] is None
    nested = depth([n for n, _ in swin().named_parameters()])
    assert nested["swin.encoder.layers.0.blocks.0.mlp.fc1.weight"] == (0, 3)
    assert nested["swin.encoder.layers.1.blocks.1.mlp.fc1.weight"] == (2, 3)
    assert nested["swin.encoder.layers.0.downsample.reduction.weight"] is None
    assert depth(["model.layers.10.x.weight", "model.layers.2.x.weight"]) == {"model.layers.10.x.weight": (1, 2), "model.layers.2.x.weight": (0, 2)}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "clip", "distilbert", "t5"])
def test_output_projections_are_what_attention_and_ffn_end_with(name):
    """Zeroed output projections leave only the residual stream: a block then adds nothing but its biases, which are zeroed too."""
    network = BLOCKS[name][0]().eval()
    found = ModelMap(network)
    outputs = {**found.projections("attention_output"), **found.projections("ffn_output")}
    extra = 2 if name == "t5" else 0  # its decoder blocks attend to the encoder as well
    assert len(outputs) == 2 * len(found.blocks) + extra
    for module in outputs.values():
        assert isinstance(module, (nn.Linear, Conv1D))
        nn.init.zeros_(module.weight)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
    if name in ("llama", "gpt2"):
        seen = []
        for _, block in found.blocks:
            block.register_forward_hook(lambda m, given, out: seen.append((given[0], out if torch.is_tensor(out) else out[0])))
        with torch.no_grad():
            network(input_ids=torch.tensor([[5, 6, 7]]))
        assert len(seen) == 2
        for before, after in seen:
            torch.testing.assert_close(before, after)


def test_projection_kinds():
    llama = ModelMap(tiny_llama(num_key_value_heads=1))
    assert {k: len(llama.projections(k)) for k in ("query", "key", "value", "qkv", "ffn_gate", "ffn_input")} == {
        "query": 2, "key": 2, "value": 2, "qkv": 0, "ffn_gate": 2, "ffn_input": 2,
    }  # fmt: skip
    assert list(llama.projections("key", block=1)) == ["model.layers.1.self_attn.k_proj"] and not llama.fused
    fused = ModelMap(gpt2())
    assert fused.fused and list(fused.projections("qkv")) == ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]
    with pytest.raises(ModelError, match="no projection kind 'keys'"):
        llama.projections("keys")


def test_heads():
    assert ModelMap(tiny_llama(num_key_value_heads=1)).heads == Heads(4, 8, 1)
    assert ModelMap(tiny_llama(head_dim=16)).heads == Heads(4, 16, 2)
    assert ModelMap(gpt2()).heads == Heads(2, 8, 2)
    clip = ModelMap(tiny_clip())
    assert clip.heads_of("text_model") == clip.heads_of("vision_model") == Heads(4, 8, 4)
    assert clip.towers == {"text_model": [0, 1], "vision_model": [2, 3]}
    with pytest.raises(ModelError, match="not known"):
        _ = ModelMap(nn.Linear(2, 2)).heads


def test_linears_and_paths_inside_peft():
    from peft import LoraConfig, get_peft_model

    family = tiny_llama()
    plain = ModelMap(family)
    assert len(plain.linears()) == 14 and len(plain.linears(block=1)) == 7
    assert set(plain.linears(everywhere=True)) - set(plain.linears()) == {"lm_head"}
    assert all(isinstance(m, Conv1D) for m in ModelMap(gpt2()).linears().values())
    family.network = get_peft_model(family.network, LoraConfig(target_modules=["q_proj"]))
    wrapped = ModelMap(family)
    assert [p for p, _ in wrapped.blocks] == ["base_model.model.model.layers.0", "base_model.model.model.layers.1"]
    assert len(wrapped.linears()) == 14 and not any("lora" in n for n in wrapped.linears())
    assert wrapped.block_of("base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight") == 1
    assert list(wrapped.projections("query")) == [f"base_model.model.model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
