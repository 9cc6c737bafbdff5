import json
import sys
import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.core.source import TensorSource, aligned, applied, compatible, delta, lora_delta
from luthier.errors import ModelError
from tests.counting import Counting


def llama(seed=0, tied=True, **more):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        tie_word_embeddings=tied, **more,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def state(seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(3, 4, generator=g).to(dtype), "a.bias": torch.randn(3, generator=g).to(dtype),
        "n.count": torch.tensor(seed + 7), "scale": torch.randn((), generator=g).to(dtype),
    }  # fmt: skip


# sources ----------------------------------------------------------------------------------------------------------------
def test_every_kind_of_checkpoint_gives_the_same_tensors(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    save_file({k: v.clone() for k, v in model.state_dict().items()}, tmp_path / "one.safetensors")
    truth = model.state_dict()
    for x in (model, truth, tmp_path / "whole", str(tmp_path / "sharded"), tmp_path / "one.safetensors", TensorSource.of(model)):
        source = TensorSource.of(x)
        assert set(source.distinct) | {"lm_head.weight"} == set(truth)
        assert all(torch.equal(source[name], truth[name]) for name in source)


def test_tied_tensors_are_known_and_written_once(tmp_path):
    source = TensorSource.of(llama())
    assert source.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    source.save(tmp_path / "model")
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")


def test_reading_is_lazy():
    base, tuned = Counting(state(0)), Counting(state(1))
    update = delta(base, tuned)
    merged = applied(base, update.map(lambda t: t * 2))
    assert base.read == [] and tuned.read == []
    merged["a.bias"]
    assert set(base.read) == {"a.bias"} and tuned.read == ["a.bias"]
    assert "a.bias" in merged and len(merged) == 4
    with pytest.raises(KeyError):
        merged["b"]


def test_arrays_and_odd_things():
    import numpy as np

    assert torch.equal(TensorSource.of({"w": np.ones((2, 2), np.float32)})["w"], torch.ones(2, 2))
    with pytest.raises(ModelError, match="int is no checkpoint"):
        TensorSource.of(3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "missing", "no checkpoint at"),
        (lambda p: (p / "x.bin").write_bytes(b"x") and p, "only pickled weights"),
        (lambda p: p, "no weights"),
        (lambda p: (p / "x.txt").write_text("x") and p / "x.txt", "not a safetensors file"),
        (lambda p: (p / "x.safetensors").write_bytes(b"broken") and p, "cannot be read"),
        (lambda p: (p / "m.safetensors.index.json").write_text('{"weight_map": {"w": "../../secret.safetensors"}}') and p, "not a file next to it"),
        (lambda p: (p / "m.safetensors.index.json").write_text("[]") and p, "not a safetensors index"),
    ],
)  # fmt: skip
def test_bad_checkpoints_are_refused_in_a_sentence(tmp_path, make, message):
    with pytest.raises(ModelError, match=message):
        TensorSource.of(make(tmp_path))


# saving -----------------------------------------------------------------------------------------------------------------
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.int8, torch.uint8, torch.bool]


def test_saved_files_are_what_safetensors_reads(tmp_path):
    tensors = {str(d): torch.arange(6).reshape(2, 3).to(d) for d in DTYPES} | {"empty": torch.zeros(0, 4), 'scalar "ä"': torch.tensor(2.5)}
    TensorSource.of(tensors).save(tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name].double(), tensor.double())
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_hold_few_tensors_in_memory_and_transformers_loads_them(tmp_path):
    model = llama(tied=False)
    truth = {k: v.clone() for k, v in model.state_dict().items()}
    alive = most = 0

    class Tracked(torch.Tensor):
        def __del__(self):
            nonlocal alive
            alive -= 1

    def read(name):
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return truth[name].clone().as_subclass(Tracked)

    heard = []
    files = TensorSource(truth, read).save(tmp_path / "m", max_shard_bytes=5000, progress=lambda done, total, name: heard.append((done, total, name)))
    assert most <= 4 and alive <= 2
    assert len(files) > 2 and all(f.stat().st_size < 5000 + 40 * 400 or len(load_file(f)) == 1 for f in files)
    assert heard[-1][:2] == (len(truth), len(truth)) and [n for _, _, n in heard] == list(truth)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(truth) and index["metadata"]["total_size"] == sum(v.numel() * 4 for v in truth.values())
    model.config.save_pretrained(tmp_path / "m")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "m").state_dict()
    assert all(torch.equal(again[k], truth[k]) for k in truth)
    TensorSource.of(truth).save(tmp_path / "m")
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]


def test_a_failed_save_leaves_what_was_there(tmp_path):
    TensorSource.of({"w": torch.ones(3)}).save(tmp_path)

    def broken(name):
        if name == "b":
            raise ModelError("stop")
        return torch.zeros(2)

    for target in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(ModelError, match="stop"):
            TensorSource(["a", "b"], broken).save(target)
        assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
        assert torch.equal(TensorSource.of(tmp_path)["w"], torch.ones(3))


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files")
@pytest.mark.parametrize("where", ["model.safetensors", "folder"])
@pytest.mark.parametrize("size", [1 << 10, 1 << 22])
def test_a_file_that_cannot_grow_ends_the_save(tmp_path, where, size):
    """The writer works behind whoever computes, and its errors reach the caller all the same, with small tensors and large ones."""
    import resource

    computed = []
    source = TensorSource(map(str, range((1 << 25) // size)), lambda name: computed.append(name) or torch.ones(size), lambda _: ((size,), torch.float32))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            source.save(tmp_path / where)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(computed) < len(source)  # it stops soon, not at the end
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tensorfile")]
    assert not list(tmp_path.rglob("*.safetensors"))
    source.save(tmp_path / where)


def test_a_source_can_be_saved_over_what_it_reads(tmp_path):
    TensorSource.of({"w": torch.ones(3)}).save(tmp_path)
    source = TensorSource.of(tmp_path)
    source.map(lambda t: t * 2).save(tmp_path)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], torch.full((3,), 2.0))


# arithmetic -------------------------------------------------------------------------------------------------------------
def test_delta_is_the_difference_of_the_floating_tensors():
    base, tuned = state(0), state(1)
    update = delta(base, tuned)
    assert set(update) == {"a.weight", "a.bias", "scale"}
    assert all(torch.equal(update[n], tuned[n] - base[n]) for n in update)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_fp32_and_comes_back_in_the_bases_type(dtype):
    base, tuned = state(0, dtype), state(1, dtype)
    update = delta(base, tuned)
    for name in update:
        assert update[name].dtype == torch.float32
        assert torch.equal(update[name], tuned[name].float() - base[name].float())
    total = applied(base, update.map(lambda t: t * 0.3))
    expected = (base["a.weight"].double() + 0.3 * (tuned["a.weight"].double() - base["a.weight"].double())).to(dtype)
    assert total["a.weight"].dtype == dtype
    torch.testing.assert_close(total["a.weight"], expected, rtol=torch.finfo(dtype).eps, atol=0)


def test_a_wide_delta_gives_the_tuned_model_back_exactly():
    base = {"w": torch.randn(10000, generator=torch.Generator().manual_seed(0))}
    tuned = {"w": base["w"] + 1e-3 * torch.randn(10000, generator=torch.Generator().manual_seed(1))}
    wide = delta(base, tuned, wide=True)
    assert wide["w"].dtype == torch.float64
    assert torch.equal(applied(base, wide)["w"], tuned["w"])


def test_integer_tensors_and_inputs_stay():
    base, tuned = state(0), state(1)
    merged = applied(base, delta(base, tuned))
    assert merged["n.count"] == base["n.count"]
    merged["n.count"].add_(1)
    dict(merged)["a.bias"].add_(1)
    assert base["n.count"] == 7 and torch.equal(base["a.bias"], state(0)["a.bias"])
    lazy = delta(Counting(base), Counting(tuned))
    assert not lazy["n.count"].any() and not lazy["n.count"].is_floating_point()


def test_differing_models_are_refused_with_counts_and_the_first_difference():
    base, tuned = state(0), state(1)
    tuned["a.weight"] = torch.zeros(3, 5)
    tuned["z"] = torch.zeros(1)
    del tuned["scale"]
    with pytest.raises(ModelError, match=r"1 tensors are only in the base, 1 only in the other model, 1 differ in shape. The first is 'a.weight' \(\[3, 4\]"):
        compatible(base, tuned)
    with pytest.raises(ModelError, match="'scale'"):
        delta(base, tuned, skip=["a"])
    assert set(delta(base, tuned, skip=["a", "sc*", "z"])) == set()
    other = aligned(TensorSource.of(base), TensorSource.of(tuned), ["a.weight", "scale", "z"])
    assert torch.equal(other["a.weight"], base["a.weight"]) and torch.equal(other["a.bias"], tuned["a.bias"])
    lazy = delta(Counting(base), Counting(tuned | {"scale": base["scale"]}), skip=["z"])
    with pytest.raises(ModelError, match=r"'a.weight' is \[3, 4\] in the base and \[3, 5\]"):
        lazy["a.weight"]


def test_a_tied_head_is_found_under_either_name(tmp_path):
    base, tuned = llama(0), llama(1)
    tuned.save_pretrained(tmp_path)
    update = delta(base, tmp_path)
    head = tuned.state_dict()["lm_head.weight"] - base.state_dict()["lm_head.weight"]
    assert torch.equal(update["lm_head.weight"], head) and update.aliases
    back = delta(tmp_path, base)
    assert "lm_head.weight" not in back and torch.equal(back["model.embed_tokens.weight"], -head)


# LoRA folders -----------------------------------------------------------------------------------------------------------
def lora_folder(path, base, seed=3, **options):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    peft_model = get_peft_model(base, LoraConfig(**options))
    for name, p in peft_model.named_parameters():
        if "lora_" in name or p.requires_grad:
            torch.nn.init.normal_(p, std=0.3)
    peft_model.save_pretrained(path)
    return peft_model


@pytest.mark.parametrize(
    "options",
    [
        {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]},
        {"r": 4, "lora_alpha": 2, "use_rslora": True, "target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 9}},
        {"r": 2, "target_modules": ["embed_tokens", "v_proj"], "modules_to_save": ["norm"]},
        {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
)  # fmt: skip
def test_a_lora_folder_is_what_peft_merges(tmp_path, options):
    base = llama(tied=False)
    truth = {k: v.clone() for k, v in base.state_dict().items()}
    peft_model = lora_folder(tmp_path, base, **options)
    merged = TensorSource.of(peft_model)
    source = TensorSource.of(tmp_path, base=truth)
    oracle = peft_model.merge_and_unload().state_dict()
    assert set(source) == set(oracle)
    for name in oracle:
        torch.testing.assert_close(source[name], oracle[name], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(merged[name], oracle[name], atol=1e-6, rtol=1e-6)
    changed = {n for n in truth if not torch.equal(oracle[n], truth[n])}
    update = lora_delta(tmp_path, truth)
    assert {n for n in update if update[n].any()} == changed and len(changed) >= 2


def test_a_lora_update_has_no_cancellation(tmp_path):
    base = {k: v.bfloat16() for k, v in llama(tied=False).state_dict().items()}
    peft_model = lora_folder(tmp_path, llama(tied=False), r=2, target_modules=["q_proj"], lora_alpha=1)
    name = "model.layers.0.self_attn.q_proj"
    layer = peft_model.base_model.model.get_submodule(name)
    update = delta(base, tmp_path)
    torch.testing.assert_close(update[name + ".weight"], layer.get_delta_weight("default").detach())
    assert not update["lm_head.weight"].any()


def test_adapters_that_cannot_be_used_are_refused(tmp_path):
    from peft import PromptTuningConfig, get_peft_model

    base = llama(tied=False)
    truth = {k: v.clone() for k, v in base.state_dict().items()}
    lora_folder(tmp_path / "lora", base, r=2, target_modules=["q_proj"])
    with pytest.raises(ModelError, match="give the base model"):
        TensorSource.of(tmp_path / "lora")
    with pytest.raises(ModelError, match="does not have"):
        TensorSource.of(tmp_path / "lora", base={"x": torch.ones(1)})
    wrong = {k: torch.zeros(2, 2) if "q_proj" in k else v for k, v in truth.items()}
    with pytest.raises(ModelError, match="made for"):
        lora_delta(tmp_path / "lora", wrong)["model.layers.0.self_attn.q_proj.weight"]
    lora_folder(tmp_path / "dora", llama(tied=False), r=2, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(ModelError, match="DoRA"):
        TensorSource.of(tmp_path / "dora", base=truth)
    prompted = get_peft_model(llama(tied=False), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ModelError, match="cannot be merged"):
        TensorSource.of(prompted)
