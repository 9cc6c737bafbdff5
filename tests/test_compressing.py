"""`luthier compress`: what it writes loads elsewhere, what it says is measured, and what cannot be compressed is refused."""

import functools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.catalog import method
from luthier.cli import main
from luthier.compress.compeft import load_packed
from luthier.compress.pv_tuning import load_packed as load_codes
from luthier.compressing import compress
from luthier.core import speed
from luthier.core.models import load
from luthier.core.speed import decoding, scoring, side_by_side
from luthier.errors import ModelError, RecipeError, UserError
from luthier.measure._shared import gold_nll
from luthier.run import tune
from luthier.testing import tiny
from luthier.testing.toys import model_folder, rows
from tests.toy_runs import PAIRS, recipe, write_rows

CODES = {"group": 4, "codes": 4, "codebooks": 1}
IDS = torch.tensor([[1, 20, 21, 22, 23]])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base, a fine-tune of it, an adapter on it, and rows."""
    root = tmp_path_factory.mktemp("models")
    shutil.copytree(model_folder("causal-lm"), root / "base")
    shutil.copytree(root / "base", root / "tuned")
    generator = torch.Generator().manual_seed(1)
    save_file({n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in weights(root / "base").items()}, root / "tuned" / "model.safetensors", {"format": "pt"})
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    get_peft_model(AutoModelForCausalLM.from_pretrained(root / "base"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)).save_pretrained(root / "adapter")
    write_rows(root / "train.jsonl", rows(PAIRS, 8))
    write_rows(root / "test.jsonl", rows(PAIRS, 4, 1))
    return root


@pytest.fixture(autouse=True)
def one_round(monkeypatch):
    """Models are timed once: what is asked here is whether, not how well."""
    monkeypatch.setattr(speed, "side_by_side", functools.partial(side_by_side, rounds=1))


def weights(folder):
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


def size(folder):
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def logits(folder):
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(IDS).logits


def test_a_shallower_model_loads_with_transformers_and_every_figure_is_measured(models, tmp_path, capsys):
    words = [str(models / "tuned"), "--method", "depth-prune", "drop=1", "--data", str(models / "train.jsonl"), "--test", str(models / "test.jsonl"), "--out", str(tmp_path / "out")]
    assert main(["compress", *words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    before, after = said["before"], said["after"]
    by_hand = load(str(models / "tuned"))
    del by_hand.network.model.layers[said["report"]["first"]]
    for i, layer in enumerate(by_hand.network.model.layers):
        layer.self_attn.layer_idx = i
    with torch.no_grad():
        assert torch.allclose(logits(tmp_path / "out"), by_hand.network(IDS, use_cache=False).logits, atol=1e-5)
    assert after["disk_bytes"] == size(tmp_path / "out") < before["disk_bytes"] == size(models / "tuned")
    assert after["parameters"] == sum(t.numel() for t in weights(tmp_path / "out").values()) and after["memory_bytes"] < before["memory_bytes"]
    held_out = rows(PAIRS, 4, 1)
    with torch.no_grad():
        assert before["loss"] == pytest.approx(gold_nll(load(str(models / "tuned")), held_out, None, 4), rel=1e-5)
        assert after["loss"] == pytest.approx(gold_nll(load(str(tmp_path / "out")), held_out, None, 4), rel=1e-5)
    assert min(f[k] for f in (before, after) for k in ("scored_per_second", "decoded_per_second")) > 0 and said["rows"] == 4
    assert json.loads((tmp_path / "out" / "compressed.json").read_text())["after"] == after


def test_the_table_names_what_changed(models, tmp_path, capsys):
    assert main(["compress", str(models / "base"), "--method", "depth-prune", "start=0", "drop=1", "--test", str(models / "test.jsonl"), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert f"depth-prune of {models / 'base'}, written to {tmp_path / 'out'} for transformers" in said and "loss on 4 held-out rows" in said
    assert "decoded tokens a second" in said and "packed" not in said


def test_an_adapter_becomes_signs_and_one_number_and_loads_with_peft(models, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    found = compress(models / "adapter", "compeft", tmp_path / "out", {"density": 0.3, "alpha": 2.0})
    assert found.adapter and found.after.packed_bytes * 2 < found.before.disk_bytes == size(models / "adapter") and found.report["ratio"] > 20
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(models / "base"), tmp_path / "out")
    own = {n: p.detach() for n, p in loaded.named_parameters() if "lora_" in n}
    entries = torch.cat([p.flatten() for p in own.values()]).abs()
    assert len(entries.unique()) == 2 and int(entries.count_nonzero()) == int(0.3 * len(entries))
    packed, written = load_packed(tmp_path / "out" / "packed" / "compeft.safetensors"), weights(tmp_path / "out")
    assert packed.keys() == written.keys() and all(torch.equal(packed[n], written[n]) for n in written)
    assert found.report["file"] == str(tmp_path / "out" / "packed" / "compeft.safetensors") and "packed" in found.notes[0]


def test_a_whole_model_needs_its_base(models, tmp_path):
    with pytest.raises(RecipeError, match=r"'compeft' stores what was changed of a base.*--base"):
        compress(models / "tuned", "compeft", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    compress(models / "tuned", "compeft", tmp_path / "out", base=models / "base")
    base, made, tuned = weights(models / "base"), weights(tmp_path / "out"), weights(models / "tuned")
    change = torch.cat([(made[n].double() - base[n].double()).flatten() for n in sorted(base)])
    kept = change.abs() > 1e-6
    assert int(kept.sum()) == int(0.2 * len(change))
    meant = torch.cat([(tuned[n].double() - base[n].double()).flatten() for n in sorted(base)])
    assert torch.allclose(change[kept], meant.std() * meant[kept].sign(), atol=1e-5)


@pytest.mark.parametrize("of", ["base", "adapter"])
def test_codes_are_decoded_into_a_model_that_transformers_loads(models, tmp_path, of):
    found = compress(models / of, "pv-tuning", tmp_path / "out", CODES)
    codes, made = load_codes(tmp_path / "out" / "packed" / "pv_tuning.safetensors"), weights(tmp_path / "out")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.allclose(codes[name], made[name], atol=1e-2) and torch.isfinite(logits(tmp_path / "out")).all()
    disk = size(models / "base") + (size(models / "adapter") if of == "adapter" else 0)
    assert not found.adapter and found.before.disk_bytes == disk and found.after.packed_bytes < found.after.disk_bytes
    assert found.before.loss is None and "--test" in found.notes[-1]


def test_rounded_and_rotated_weights_load_with_transformers(models, tmp_path):
    found = compress(models / "base", "roste", tmp_path / "out", {"calibration": 4}, data=models / "train.jsonl")
    assert found.after.loss is not None and found.rows == 1  # a tenth of eight rows is held out
    assert torch.isfinite(logits(tmp_path / "out")).all()


def test_a_run_brings_its_rows_its_base_and_its_measures(tmp_path):
    run = tune(recipe(tmp_path, adapt="full", measure=["task", "weights"]), tmp_path / "run", report=False)
    found = compress(tmp_path / "run", "compeft", tmp_path / "out")
    measured = {k: v for k, v in run.numbers().items() if k.startswith("task/")}
    assert measured and found.before.measures == pytest.approx(measured) and found.after.measures.keys() == measured.keys()
    assert found.better["task/nll"] == "lower" and found.before.loss == pytest.approx(measured["task/nll"], rel=1e-5) and found.rows == 4
    pruned = compress(tmp_path / "run", "depth-prune", tmp_path / "pruned", {"drop": 1})
    assert pruned.report["distances"] and pruned.after.parameters < pruned.before.parameters


def test_half_precision_stays_half_precision(models, tmp_path):
    shutil.copytree(models / "base", tmp_path / "half")
    save_file({n: t.bfloat16() for n, t in weights(models / "base").items()}, tmp_path / "half" / "model.safetensors", {"format": "pt"})
    compress(tmp_path / "half", "depth-prune", tmp_path / "out", {"start": 0, "drop": 1})
    assert {t.dtype for t in weights(tmp_path / "out").values()} == {torch.bfloat16}


def test_an_encoder_is_timed_by_its_rows(tmp_path):
    made = rows(frozenset({"text", "label"}), 6)
    found = compress(model_folder("text-encoder"), "pv-tuning", tmp_path / "out", CODES, test=made)
    assert found.unit == "rows" and found.after.scored_per_second > 0 and found.after.decoded_per_second is None and found.after.loss > 0


def test_answers_have_the_full_length_whatever_the_model_would_say(monkeypatch):
    model = tiny.tiny_llama()
    monkeypatch.setattr(model, "end_ids", lambda: list(range(60)))
    assert decoding(model, rows=2, prompt=4, tokens=5)() == 10 and scoring(model, rows=3, tokens=9)() == 27
    times = iter([1, 100, 2, 50, 3, 75])
    done = []
    speeds = side_by_side({"a": lambda: done.append("a") or next(times), "b": lambda: done.append("b") or 0}, rounds=3)
    assert done == ["a", "b"] * 4 and speeds["a"] > speeds["b"] == 0


def test_what_cannot_be_compressed_is_refused_with_a_sentence(models, tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.raises(RecipeError, match="Did you mean 'depth-prune'"):
        compress(models / "base", "depth-prun", out)
    with pytest.raises(RecipeError, match="has no option 'dorp'.*Did you mean 'drop'"):
        compress(models / "base", "depth-prune", out, {"dorp": 1})
    with pytest.raises(RecipeError, match="'pat' compresses a model while it is tuned"):
        compress(models / "base", "pat", out)
    with pytest.raises(RecipeError, match="'depth-prune' looks at rows.*--data"):
        compress(models / "base", "depth-prune", out, {"drop": 1})
    with pytest.raises(RecipeError, match="serves causal-lm"):
        compress(model_folder("text-encoder"), "roste", out)
    with pytest.raises(UserError, match="already holds something"):
        compress(models / "base", "pv-tuning", models / "tuned", CODES)
    with pytest.raises(ModelError, match="no model at"):
        compress(models / "missing", "pv-tuning", out, CODES)
    shutil.copytree(models / "base", tmp_path / "four-bit")
    config = json.loads((models / "base" / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "four-bit" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="quantised by gptq; compressing takes floating-point weights"):
        compress(tmp_path / "four-bit", "pv-tuning", out, CODES)
    assert main(["compress", "--method", "pv-tuning"]) == 2 and "Name one model" in capsys.readouterr().err
    assert not out.exists() and sorted(p.name for p in tmp_path.iterdir()) == ["four-bit"]


def test_only_compressors_that_train_are_refused_for_it():
    assert [name for name in ("compeft", "depth-prune", "pat", "pv-tuning", "roste") if method("compress", name).tunes] == ["pat"]
