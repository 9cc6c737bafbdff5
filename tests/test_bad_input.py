"""What users get wrong, from files to disks: one clear sentence, exit code 2, and nothing that was there is lost."""

import errno
import json
import shutil
import subprocess

import pytest
import torch

from luthier import cli
from luthier.core import checkpoint
from luthier.core.journal import Journal
from luthier.errors import DataError, ModelError, TrainingError, UserError
from luthier.run import tune
from luthier.testing import tiny
from luthier.testing.toys import model_folder
from tests.toy_runs import python, recipe, same_weights, written

LINE = {"prompt": "w1 w2", "completion": "w3"}


@pytest.fixture
def refused(capsys, tmp_path):
    """Run a recipe on the command line; it must be refused with one sentence, before anything is written but the folder itself."""

    def run(made, *more, wrote=False):
        code = cli.main(["tune", made if isinstance(made, str) else written(tmp_path, made), "--run", str(tmp_path / "run"), "--quiet", *more])
        out, err = capsys.readouterr()
        assert code == 2 and out == ""
        assert "Traceback" not in err
        if not wrote:
            assert not any((tmp_path / "run").glob("*")), "a refused recipe leaves no run behind"
            assert len(err.strip().splitlines()) <= 2, err  # the sentence, and how to resume
        return err

    return run


def with_lines(folder, *lines, **changes):
    made = recipe(folder, **changes)
    (folder / "train.jsonl").write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return made


# -- rows ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lines, words", [
    ([], "train.jsonl is empty"),
    ([LINE, '{"prompt": "w1", "completion": '], "train.jsonl:2: malformed JSON"),
    ([LINE, "[1, 2]"], "train.jsonl:2:"),
    ([{"question_text": "w1", "reply": "w2"}], "found: question_text, reply"),
    ([LINE, {"prompt": "w1"}], "train.jsonl:2:"),
    ([LINE, {"prompt": "w1", "completion": 7}], "train.jsonl:2: 'completion'"),
    ([{"messages": "hello"}], "train.jsonl:1: 'messages'"),
    ([{"messages": [{"role": "user"}]}], "train.jsonl:1:"),
    ([LINE, {"text": "w1"}], "train.jsonl:2"),
    ([LINE, LINE | {"weight": "much"}], "train.jsonl:2: 'weight'"),
    ([LINE, {"prompt": "w1", "completion": ""}], "train.jsonl:2:"),
])  # fmt: skip
def test_bad_rows_are_named_by_file_and_line(tmp_path, refused, lines, words):
    assert words in refused(with_lines(tmp_path, *lines))


def test_missing_columns_are_named_with_what_was_found(tmp_path, refused):
    said = refused(with_lines(tmp_path, LINE, objective="dpo"))
    assert "chosen" in said and "rejected" in said and "prompt, completion" in said.replace("completion, prompt", "prompt, completion")


def test_bytes_that_are_no_text(tmp_path, refused):
    made = recipe(tmp_path)
    (tmp_path / "train.jsonl").write_bytes(json.dumps(LINE).encode() + b"\n" + b'{"prompt": "\xff\xfe"}\n')
    assert "train.jsonl:2" in refused(made)


def test_a_row_that_is_empty_after_templating(tmp_path, refused):
    """The template leaves the assistant's turn out, so nothing would be learned."""
    template = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }} {% endif %}{% endfor %}"
    said = refused(with_lines(tmp_path, LINE, LINE, model={"id": str(model_folder("causal-lm")), "template": template}))
    assert "row 1" in said or "train.jsonl:1" in said


@pytest.mark.parametrize("limit", [None, 20])
def test_an_over_long_row_is_refused_never_cut_in_silence(tmp_path, refused, limit):
    long = {"prompt": "w1 " * (600 if limit is None else 30), "completion": "w2"}
    said = refused(with_lines(tmp_path, LINE, LINE, long, data={"train": str(tmp_path / "train.jsonl"), "holdout": 0, **({"max_length": limit} if limit else {})}))
    assert "train.jsonl, row 3" in said and "too_long: skip" in said


@pytest.mark.parametrize("too_long, rows", [("skip", 2), ("cut", 3)])
def test_over_long_rows_are_left_out_or_cut_when_asked_and_that_is_reported(tmp_path, too_long, rows):
    long = {"prompt": "w1 " * 30 + "w9", "completion": "w2"}
    made = with_lines(tmp_path, LINE, LINE, long, data={"train": str(tmp_path / "train.jsonl"), "holdout": 0, "max_length": 20, "too_long": too_long}, train={"steps": 1, "batch": 3})
    tune(made, tmp_path / "run")
    step = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert step["rows"] == rows
    assert ("1 too long ones were set aside" in (tmp_path / "run" / "report.txt").read_text()) == (too_long == "skip")


LONGER = '''
from dataclasses import dataclass
from luthier.catalog import register
from luthier.synthesize import Synthesizer

@register("longer")
@dataclass
class Longer(Synthesizer):
    """Rows that are longer than asked for."""
    def synthesize(self, rows, ctx=None):
        return [{**r, "prompt": "w1 " * 30} for r in rows]
'''


def test_made_rows_are_checked_for_length_too(tmp_path):
    (tmp_path / "longer.py").write_text(LONGER)
    made = recipe(tmp_path, synthesize=[f"{tmp_path}/longer.py:Longer"])
    made["data"]["max_length"] = 20
    with pytest.raises(DataError, match="longer than 20 tokens"):
        tune(made, tmp_path / "run")


# -- recipes -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, words", [
    ({"objectives": "sft"}, "recipe.yaml:"), ({"objectives": "sft"}, "Did you mean 'objective'?"), ({"adapt": "lorra"}, "Did you mean 'lora'?"),
    ({"adapt": {"method": "lora", "rnak": 4}}, "Did you mean 'rank'?"), ({"adapt": {"method": "lora", "rank": "many"}}, "rank"),
    ({"train": {"epoch": 2}}, "Did you mean 'epochs'?"), ({"train": {"tracker": ["mlflow"]}}, "tracker"), ({"train": {"steps": -1}}, "at least 1"),
    ({"data": {"trian": "x.jsonl"}}, "Did you mean 'train'?"), ({"data": "nowhere.jsonl"}, "does not exist"), ({"model": "./nowhere"}, "does not exist"),
    ({"model": "smollm3"}, "smollm"), ({"asft": {}}, "recipe.yaml:"), ({"merge": {"method": "lines", "of": ["./nowhere", "this"]}}, "does not exist"),
])  # fmt: skip
def test_slips_in_a_recipe_are_told_with_the_nearest_name(tmp_path, refused, change, words):
    made = recipe(tmp_path)
    made = {**made, **change, "train": made["train"] | change.get("train", {})}
    assert words in refused(made)


def test_a_recipe_that_is_no_yaml(tmp_path, refused):
    (tmp_path / "broken.yaml").write_text("model: [a\ndata: b\n")
    assert "broken.yaml" in refused(str(tmp_path / "broken.yaml"))


def test_a_tracker_that_is_not_installed_is_told_before_anything_runs(tmp_path, refused, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    assert "pip install tensorboard" in refused(recipe(tmp_path, train={"tracker": ["tensorboard"]}))


# -- models --------------------------------------------------------------------------------------------------------------------


def test_a_model_folder_without_a_tokenizer(tmp_path, refused):
    shutil.copytree(model_folder("causal-lm"), tmp_path / "lm")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "lm" / name).unlink(missing_ok=True)
    assert "no tokenizer" in refused(recipe(tmp_path, model=str(tmp_path / "lm")))
    made = recipe(tmp_path, model={"id": str(tmp_path / "lm"), "tokenizer": str(model_folder("causal-lm"))}, train={"steps": 1})
    assert tune(made, tmp_path / "other").ask(["w1 w2"], 2)


def test_weights_that_are_cut_off(tmp_path, refused):
    shutil.copytree(model_folder("causal-lm"), tmp_path / "lm")
    file = tmp_path / "lm" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert str(tmp_path / "lm") in refused(recipe(tmp_path, model=str(tmp_path / "lm")))


def test_an_adapter_for_another_base(tmp_path, refused):
    """One whose base is gone, and one whose base was replaced by a wider model."""
    from luthier.core.models import save_network

    base = tmp_path / "base"
    save_network(tiny.tiny_llama(), base)
    run = tune(recipe(tmp_path, model=str(base), train={"steps": 1}), tmp_path / "adapter")
    shutil.rmtree(base)
    assert "base" in refused(recipe(tmp_path, model=str(run.model_path)))
    save_network(tiny.tiny_llama(hidden=16), base)
    assert "does not fit" in refused(recipe(tmp_path, model=str(run.model_path)))
    said = refused(recipe(tmp_path, merge={"method": "lines", "alpha": 0.5, "of": [str(run.folder), "this"]}), wrote=True)
    assert "does not fit" in said or "cannot be combined" in said


def test_an_adapter_merged_into_a_model_that_is_not_its_base(tmp_path):
    from luthier.core.models import save_network

    save_network(tiny.tiny_llama(layers=3), tmp_path / "deep")
    run = tune(recipe(tmp_path, model=str(tmp_path / "deep"), train={"steps": 1}), tmp_path / "adapter")
    with pytest.raises(ModelError, match="cannot be combined"):
        tune(recipe(tmp_path, merge={"method": "lines", "alpha": 0.5, "of": [str(run.folder), "this"]}), tmp_path / "run")


# -- numbers -------------------------------------------------------------------------------------------------------------------


def test_a_rate_that_explodes_stops_the_run_with_no_broken_checkpoint(tmp_path, refused):
    made = recipe(tmp_path, adapt="full", optimize={"method": "adamw", "lr": 1e30}, train={"steps": 6, "save_every": 1, "schedule": "constant"})
    said = refused(made, wrote=True)
    assert "not a number" in said or "no longer finite" in said
    assert "lr" in said and "resume with" in said
    newest = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert newest is None or all(t.abs().max() < 1e10 for t in checkpoint.load(newest)["weights"].values())
    assert not (tmp_path / "run" / "model").exists()
    made["optimize"]["lr"] = 1e-3
    tune(made, tmp_path / "run", resume=True)
    tune(made, tmp_path / "whole")
    assert newest is not None or same_weights(tmp_path / "run", tmp_path / "whole")


BAD = '''
from dataclasses import dataclass
from luthier.objective.sft import SFT

@dataclass
class Bad(SFT):
    """Supervised, and no number at step 3."""
    def loss(self, model, batch, ctx=None):
        made = super().loss(model, batch, ctx)
        return made.add("bad", next(iter(made.terms.values())).total.reshape(1) * FACTOR, per="batch") if ctx.clock.step == 3 else made
'''


def test_a_loss_that_is_no_number_names_the_step_and_the_rows_and_keeps_the_good_checkpoint(tmp_path, refused):
    (tmp_path / "bad.py").write_text(BAD.replace("FACTOR", "float('nan')"))
    said = refused(recipe(tmp_path, objective=f"{tmp_path}/bad.py:Bad", train={"steps": 6, "save_every": 1}), wrote=True)
    assert "not a number at step 3" in said and "bad = nan" in said
    named = [int(i) for i in said.partition("on rows ")[2].partition(".")[0].split(", ")]
    assert len(named) == 4 and all(0 <= i < 12 for i in named)
    assert "step-00000002" in said and checkpoint.latest(tmp_path / "run" / "checkpoints").name == "step-00000002"
    assert f"resume with: luthier tune {tmp_path}/run --resume" in said


def test_a_gradient_that_is_no_number_stops_before_it_moves_a_weight(tmp_path):
    (tmp_path / "bad.py").write_text(BAD.replace("made.terms.values())).total.reshape(1) * FACTOR", "made.terms.values())).total.reshape(1).sub(next(iter(made.terms.values())).total.detach()).abs().sqrt()"))
    with pytest.raises(TrainingError, match="gradient is not a number at step 3"):
        tune(recipe(tmp_path, objective=f"{tmp_path}/bad.py:Bad", train={"steps": 6, "save_every": 1}), tmp_path / "run")


# -- folders and disks -----------------------------------------------------------------------------------------------------------


def test_a_run_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "taken").write_text("mine")
    for folder in (tmp_path / "taken", tmp_path / "taken" / "below"):
        assert cli.main(["tune", written(tmp_path, recipe(tmp_path)), "--run", str(folder)]) == 2
        assert "cannot be written to" in capsys.readouterr().err
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_run_folder_without_permission(tmp_path, monkeypatch):
    """Root may write anywhere, so the system's answer is put in its place."""
    from pathlib import Path

    def denied(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "write_text", denied)
    with pytest.raises(UserError, match="cannot be written to: Permission denied"):
        tune(recipe_in_memory(), tmp_path / "run")


def recipe_in_memory():
    return {"model": tiny.tiny_llama(), "data": [LINE] * 4, "measure": [], "train": {"steps": 1}}


def test_an_existing_run_is_neither_overwritten_nor_continued_by_accident(tmp_path, capsys):
    name = written(tmp_path, recipe(tmp_path, train={"steps": 1}))
    assert cli.main(["tune", name, "--run", str(tmp_path / "run"), "--quiet"]) == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    capsys.readouterr()
    assert cli.main(["tune", name, "--run", str(tmp_path / "run")]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 3 MB, where mounting is allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True).returncode == 0 if shutil.which("mount") else False
    if not mounted:
        pytest.skip("this machine allows no mounting")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_told_and_the_last_checkpoint_is_whole(tmp_path, small_disk, capsys):
    made = recipe(tmp_path, adapt="full", train={"steps": 16, "save_every": 1, "keep": 20})
    code = cli.main(["tune", written(tmp_path, made), "--run", str(small_disk / "run"), "--quiet"])
    err = capsys.readouterr().err
    assert code == 2 and "the disk is full" in err and "is intact" in err and "resume with" in err
    newest = checkpoint.latest(small_disk / "run" / "checkpoints")
    assert newest is not None and newest.name in err and checkpoint.load(newest)["weights"]
    assert not list((small_disk / "run" / "checkpoints").glob(".writing*"))
    subprocess.run(["mount", "-o", "remount,size=60m", str(small_disk)], check=True)
    tune(made, small_disk / "run", resume=True)
    tune(made, tmp_path / "whole")
    assert same_weights(small_disk / "run", tmp_path / "whole")


@pytest.mark.parametrize("where", ["checkpoint", "metrics", "model"])
def test_a_disk_that_fills_up_while_anything_is_written(tmp_path, monkeypatch, where):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    made = recipe(tmp_path, train={"steps": 3, "save_every": 1})
    with monkeypatch.context() as patch:
        if where == "checkpoint":
            patch.setattr(checkpoint, "save_file", full)
        elif where == "metrics":
            patch.setattr(Journal, "write", full)
        else:
            patch.setattr("peft.PeftModel.save_pretrained", full)
        with pytest.raises(TrainingError, match="the disk is full.*continue with --resume"):
            tune(made, tmp_path / "run")
    tune(made, tmp_path / "run", resume=True)
    tune(made, tmp_path / "whole")
    assert same_weights(tmp_path / "run", tmp_path / "whole")


def test_the_command_itself_ends_with_code_2_and_a_sentence(tmp_path):
    (tmp_path / "train.jsonl").write_text("{\n")
    done = python("-m", "luthier", "tune", "--model", str(model_folder("causal-lm")), "--data", str(tmp_path / "train.jsonl"), "--run", str(tmp_path / "run"), "--quiet")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") <= 2 and "train.jsonl:1: malformed JSON" in done.stderr
    assert torch.__version__ not in done.stderr
