"""`luthier merge`: the same numbers as by hand, folders that transformers loads, interruptions, and what cannot be merged."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.cli import main
from luthier.errors import ModelError, RecipeError, UserError
from luthier.merging import merge
from luthier.testing.toys import model_folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and two fine-tunes of it, as folders."""
    root = tmp_path_factory.mktemp("models")
    shutil.copytree(model_folder("causal-lm"), root / "base")
    for i in (1, 2):
        shutil.copytree(root / "base", root / f"t{i}")
        generator = torch.Generator().manual_seed(i)
        tuned = {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in weights(root / "base").items()}
        save_file(tuned, root / f"t{i}" / "model.safetensors", {"format": "pt"})
    return root


def weights(folder):
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


def test_a_soup_is_the_mean_and_loads_with_transformers(models, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert main(["merge", str(models / "t1"), str(models / "t2"), "--out", str(tmp_path / "soup")]) == 0
    assert "uniform-soup of 2 models" in capsys.readouterr().out
    a, b, made = (weights(f) for f in (models / "t1", models / "t2", tmp_path / "soup"))
    assert made.keys() == a.keys() and all(torch.allclose(made[n], (a[n] + b[n]) / 2, atol=1e-7) for n in a)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "soup")
    assert torch.equal(loaded.state_dict()[next(iter(made))], made[next(iter(made))])
    assert len(AutoTokenizer.from_pretrained(tmp_path / "soup")) == len(AutoTokenizer.from_pretrained(models / "base"))


def test_updates_of_a_base_and_options_from_the_command_line(models, tmp_path):
    words = [str(models / "t1"), str(models / "t2"), "scale=0.5", "weights=[1.0, 0.5]"]
    assert main(["merge", *words, "--method", "task-arithmetic", "--base", str(models / "base"), "--out", str(tmp_path / "sum"), "--quiet"]) == 0
    base, a, b, made = (weights(f) for f in (models / "base", models / "t1", models / "t2", tmp_path / "sum"))
    assert all(torch.allclose(made[n], base[n] + 0.5 * ((a[n] - base[n]) + 0.5 * (b[n] - base[n])), atol=1e-6) for n in base)


def adapter(models, folder, base, rank, targets):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(rank)
    made = get_peft_model(AutoModelForCausalLM.from_pretrained(models / base), LoraConfig(r=rank, target_modules=targets, init_lora_weights=False))
    made.save_pretrained(folder)
    return {n: t.clone() for n, t in made.merge_and_unload().state_dict().items()}


def test_adapters_of_different_rank_are_merged_as_the_updates_they_stand_for(models, tmp_path, capsys):
    whole = [adapter(models, tmp_path / f"a{r}", "base", r, targets) for r, targets in ((2, ["q_proj"]), (4, ["q_proj", "v_proj"]))]
    assert main(["merge", str(tmp_path / "a2"), str(tmp_path / "a4"), "--method", "task-arithmetic", "scale=0.5", "--out", str(tmp_path / "both")]) == 0
    said = capsys.readouterr().out
    assert "differ in their rank" in said and "target modules" in said
    base, made = weights(models / "base"), weights(tmp_path / "both")
    assert all(torch.allclose(made[n], (whole[0][n] + whole[1][n]) / 2, atol=1e-6) for n in made) and not all(torch.equal(made[n], base[n]) for n in made)


def test_an_interrupted_merge_goes_on_where_it_was(models, tmp_path):
    out, seen = tmp_path / "out", []

    def stop(done, total, name):
        seen.append(name)
        if done == total // 2:
            raise KeyboardInterrupt

    given = {"how": "task-arithmetic", "base": models / "base", "max_shard_bytes": 20_000}
    pair = [models / "t1", models / "t2"]
    with pytest.raises(KeyboardInterrupt):
        merge(pair, out=out, progress=stop, **given)
    assert not list(out.glob("*.safetensors")) and (out / ".partial" / "0").exists()
    times = {f.name: f.stat().st_mtime_ns for f in (out / ".partial").glob("[0-9]*") if f.suffix == ""}
    found = merge(pair, out=out, **given)
    whole = merge(pair, out=tmp_path / "whole", **given)
    a, b = weights(found.folder), weights(whole.folder)
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(a) and not (out / ".partial").exists()
    kept = sorted(f.stat().st_mtime_ns for f in out.glob("model-*.safetensors"))[: len(times)]
    assert kept == sorted(times.values())


def test_another_merge_into_the_same_folder_begins_anew(models, tmp_path):
    out = tmp_path / "out"

    def stop(done, total, name):
        if done == total - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge([models / "t1"], "uniform-soup", out, max_shard_bytes=20_000, progress=stop)
    merge([models / "t2"], "uniform-soup", out, max_shard_bytes=20_000)
    a, b = weights(out), weights(models / "t2")
    assert all(torch.equal(a[n], b[n]) for n in b)


def changed(models, tmp_path, change):
    """A copy of a fine-tune whose tensors were changed."""
    folder = tmp_path / "other"
    shutil.copytree(models / "t1", folder)
    tensors = weights(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_what_cannot_be_merged_is_refused_with_a_sentence(models, tmp_path, capsys):
    names = list(weights(models / "t1"))
    other = changed(models, tmp_path, lambda t: t.update({names[3]: torch.zeros(3, 3)}))
    with pytest.raises(ModelError, match=rf"cannot be combined.*The first is '{names[3]}'"):
        merge([models / "t2", other], "uniform-soup", tmp_path / "x")
    with pytest.raises(ModelError, match="common base; name the model"):
        merge([models / "t1"], "task-arithmetic", tmp_path / "x")
    with pytest.raises(RecipeError, match="no option 'scael'.*Did you mean 'scale'"):
        merge([models / "t1"], "task-arithmetic", tmp_path / "x", models / "base", {"scael": 1})
    with pytest.raises(UserError, match="already holds something"):
        merge([models / "t1"], "uniform-soup", models / "t2")
    config = json.loads((other / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="quantised by gptq"):
        merge([models / "t1", other], "uniform-soup", tmp_path / "x")
    assert main(["merge"]) == 2 and "Name the models to merge" in capsys.readouterr().err
    assert main(["merge", str(models / "t1"), "--shard", "big", "--out", str(tmp_path / "y")]) == 2 and "500MB or 5GB" in capsys.readouterr().err


def test_adapters_of_different_bases_are_refused(models, tmp_path):
    for name, base in (("a", "base"), ("b", "t1")):
        adapter(models, tmp_path / name, base, 2, ["q_proj"])
    with pytest.raises(ModelError, match="belong to different models"):
        merge([tmp_path / "a", tmp_path / "b"], "task-arithmetic", tmp_path / "out")


def test_integer_tensors_are_the_bases(models, tmp_path):
    other = changed(models, tmp_path, lambda t: t.update(counter=torch.tensor([7])))
    base = tmp_path / "base"
    shutil.copytree(models / "base", base)
    save_file(weights(base) | {"counter": torch.tensor([3])}, base / "model.safetensors", {"format": "pt"})
    merge([other], "task-arithmetic", tmp_path / "out", base)
    assert weights(tmp_path / "out")["counter"].tolist() == [3]


def test_candidates_are_scored_on_validation_rows(models, tmp_path):
    rows = [{"prompt": "w1 w2", "completion": "w3"}] * 4
    found = merge([models / "t1", models / "t2"], "greedy-soup", tmp_path / "out", val=rows)
    assert found.report and weights(tmp_path / "out").keys() == weights(models / "t1").keys()
