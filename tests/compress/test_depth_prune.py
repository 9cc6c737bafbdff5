"""Depth pruning: what goes is what does least, and what is left is a plain model that generates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from luthier.compress.depth_prune import DepthPrune, depth_prune, distances
from luthier.core.context import Context
from luthier.core.depth import drop_blocks, without_blocks
from luthier.core.families import Decode
from luthier.core.models import save_network
from luthier.errors import ModelError, RecipeError
from luthier.testing.toys import model_folder, rows
from tests.helpers import tiny_llama

ROWS = rows(frozenset({"prompt", "completion"}), 5)


def context(family):
    return Context(family, streams={"train": ROWS})  # type: ignore[dict-item]


def silenced(family, blocks):
    """Blocks whose residual branches write nothing."""
    with torch.no_grad():
        for i in blocks:
            block = family.network.model.layers[i]
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    return family


def test_angular_distance():
    a, b = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)), torch.randn(50, 7, generator=torch.Generator().manual_seed(1))
    found = depth_prune(a, b)
    wanted = [np.arccos(np.dot(x, y) / np.linalg.norm(x) / np.linalg.norm(y)) / np.pi for x, y in zip(a.double().numpy(), b.double().numpy())]
    np.testing.assert_allclose(found, wanted, rtol=1e-9)
    assert torch.equal(found, depth_prune(b, a)) and bool(((found >= 0) & (found <= 1)).all())
    torch.testing.assert_close(depth_prune(a, -3 * a), torch.ones(50, dtype=torch.float64))
    assert float(depth_prune(a, 2 * a).max()) < 1e-7


@pytest.mark.parametrize("tokens", ["last", "mean"])
def test_distances_are_those_of_transformers_hidden_states(tokens):
    family = tiny_llama(layers=4)
    family.network.model.norm = torch.nn.Identity()  # transformers' last hidden state is behind the norm, a block's output is not
    found = distances(family, ROWS, 2, tokens, batch=3)
    wanted = []
    for row in ROWS:
        ids = torch.from_numpy(family.collate([row]).sequences[0].ids)[None]
        h = family.network.model(ids, output_hidden_states=True).hidden_states
        apart = torch.stack([depth_prune(h[i], h[i + 2])[0] for i in range(3)])
        wanted.append(apart[:, -1] if tokens == "last" else apart.mean(1))
    np.testing.assert_allclose(found, torch.stack(wanted).mean(0).detach(), atol=1e-6)


def test_blocks_that_write_nothing_go_and_nothing_changes():
    family = silenced(tiny_llama(layers=5), (2, 3))
    before = {n: t.clone() for n, t in family.network.state_dict().items()}
    method = DepthPrune(drop=2)
    lighter = method.compress(family, context(family))
    assert method.report["first"] == 2 and method.report["distances"][2] < 1e-6 < min(method.report["distances"][:2])
    batch = family.collate(ROWS)
    torch.testing.assert_close(lighter.score(batch).logp, family.score(batch).logp)
    assert len(lighter.network.model.layers) == 3 == lighter.config.num_hidden_layers and family.config.num_hidden_layers == 5
    assert all(torch.equal(t, before[n]) for n, t in family.network.state_dict().items())
    block = sum(p.numel() for p in family.network.model.layers[0].parameters())
    assert method.report["parameters_before"] - method.report["parameters_after"] == 2 * block


def test_the_pruned_model_generates_with_its_cache_and_loads_with_transformers(tmp_path):
    family = tiny_llama(layers=4)
    lighter = DepthPrune(drop=2, start=1).compress(family, context(family))
    assert [b.self_attn.layer_idx for b in lighter.network.model.layers] == [0, 1]
    save_network(lighter, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    batch = family.collate(ROWS[:2])
    answer = lighter.generate([[20, 21, 22]], Decode(max_new_tokens=6))[0][0].ids
    ids = [20, 21, 22]
    for token in answer:  # without a cache, by the loaded model
        assert int(loaded(torch.tensor([ids])).logits[0, -1].argmax()) == token
        ids.append(int(token))
    torch.testing.assert_close(lighter.score(batch).logp, type(family)(loaded, family.processor).score(batch).logp)


def test_an_adapter_is_merged_in_before():
    from peft import LoraConfig, get_peft_model

    family = tiny_llama(layers=3)
    family.network = get_peft_model(family.network, LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
    wanted = family.frozen_copy()
    wanted.network = wanted.network.merge_and_unload()
    drop_blocks(wanted.network, 0, 1)
    lighter = DepthPrune(drop=1, start=0).compress(family, context(family))
    batch = family.collate(ROWS)
    torch.testing.assert_close(lighter.score(batch).logp, wanted.score(batch).logp)
    assert hasattr(family.network, "peft_config") and not hasattr(lighter.network, "peft_config")


def test_lists_with_one_entry_a_layer_are_cut():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    kinds = ["full_attention", "sliding_attention", "full_attention"]
    config = Qwen2Config(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2, layer_types=kinds, sliding_window=4, use_sliding_window=True)
    network = Qwen2ForCausalLM(config)
    drop_blocks(network, 0, 1)
    assert network.config.layer_types == kinds[1:] and network(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 32)


def test_state_dicts_are_cut_alike():
    family = tiny_llama(layers=4)
    cut = without_blocks(family.network.state_dict(), 1, 2)
    drop_blocks(family.network, 1, 2)
    wanted = family.network.state_dict()
    assert set(cut) == set(wanted) and all(torch.equal(cut[n], wanted[n]) for n in wanted)
    with pytest.raises(RecipeError, match="set `start`"):
        DepthPrune().compress(dict(family.network.state_dict()))
    for wrong in ({"start": 7}, {"start": 0, "drop": 4}, {"start": 3, "drop": 2}):
        with pytest.raises(RecipeError, match="lower `drop`"):
            DepthPrune(**wrong).compress(dict(tiny_llama(layers=4).network.state_dict()))


def test_bad_input():
    family = tiny_llama(layers=2)
    with pytest.raises(RecipeError, match="lower `drop`"):
        DepthPrune(drop=2).compress(family, context(family))
    with pytest.raises(RecipeError, match="calibration"):
        DepthPrune(drop=1).compress(family, Context(family))
    with pytest.raises(ModelError, match="at least one"):
        drop_blocks(family.network, 0, 2)
    for bad in ({"drop": 0}, {"start": -1}, {"tokens": "first"}, {"samples": 0}):
        with pytest.raises(RecipeError, match=next(iter(bad))):
            DepthPrune(**bad)


def test_prune_then_tune_on_the_originals_words(tmp_path):
    from luthier.run import tune

    stages = [
        {"name": "prune", "adapt": "lora", "compress": [{"method": "depth-prune", "drop": 1, "samples": 4}]},
        {"name": "recover", "adapt": {"method": "lora", "rank": 2}, "synthesize": [{"method": "self-data-distillation", "mode": "own", "verify": None, "max_new_tokens": 3}]},
    ]
    data = {"train": ROWS, "test": ROWS[:2]}
    run = tune({"model": str(model_folder("causal-lm")), "data": data, "stages": stages, "measure": [], "train": {"steps": 1, "batch": 4, "save_every": 0, "device": "cpu"}, "run": str(tmp_path / "run")})
    assert run.model().config.num_hidden_layers == 1
