"""Recipes end to end on tiny models: stages, loops, merges, decoders, searches, and what a run folder holds."""

import json
import random

import numpy as np
import pytest
import torch

import luthier
from luthier import cli
from luthier.core.models import load
from luthier.core.source import TensorSource, applied, delta
from luthier.errors import ModelError, RecipeError, UserError
from luthier.merge.lines import lines
from luthier.recipe import Recipe
from luthier.run import ask, open_run, tune
from luthier.testing import tiny
from luthier.testing.toys import model_folder, rows
from tests.toy_runs import PAIRS, TEXTS, recipe, same_weights, weights, write_rows, written

FULL = {"adapt": "full", "optimize": {"method": "adamw", "lr": 1e-3}}


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def tensors(path):
    """A model's tensors under the plain network's names."""
    family = load(path, device="cpu")
    network = family.network.merge_and_unload() if hasattr(family.network, "merge_and_unload") else family.network
    return {k: v.clone() for k, v in network.state_dict().items()}


# -- the folder ------------------------------------------------------------------------------------------------------------------


def test_a_run_from_the_command_line_tells_what_it_did_and_leaves_everything(tmp_path, capsys):
    name = written(tmp_path, recipe(tmp_path, measure=["task", "weights"]))
    assert cli.main(["tune", name, "--run", str(tmp_path / "run"), "adapt.rank=3"]) == 0
    said = capsys.readouterr().out
    assert "the model reads" in said and "Measuring the model before" in said and "step 4 of 4" in said and "Model:" in said
    run = tmp_path / "run"
    assert {p.name for p in run.iterdir()} >= {"recipe.yaml", "about.json", "metrics.jsonl", "measures.json", "report.txt", "report.json", "model", "checkpoints"}
    about = json.loads((run / "about.json").read_text())
    assert about["torch"] == torch.__version__ and about["seed"] == 0 and about["threads"] == torch.get_num_threads()
    assert about["data"]["train"]["rows"] == 12 and len(about["data"]["test"]["fingerprint"]) == 64
    steps = lines_of(run / "metrics.jsonl")
    assert [s["step"] for s in steps] == [1, 2, 3, 4] and all(np.isfinite(s["loss"]) and s["lr"] > 0 and s["rows"] == 4 for s in steps)
    measures = json.loads((run / "measures.json").read_text())
    assert "nll" in measures["before"]["task"]["numbers"] and "weights" not in measures["before"] and "relative_move" in measures["after"]["weights"]["numbers"]
    assert json.loads((run / "report.json").read_text())["cost"]["steps"] == 4
    assert json.loads((run / "model" / "adapter_config.json").read_text())["r"] == 3


def test_the_kept_recipe_gives_the_same_weights_again_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    made = recipe(tmp_path / "here", adapt={"method": "lora", "rank": 2, "dropout": 0.1})
    made["data"] = {"train": "train.jsonl", "holdout": 0.25}
    monkeypatch.chdir(tmp_path / "here")
    tune(written(tmp_path / "here", made), tmp_path / "one")
    monkeypatch.chdir(tmp_path)
    kept = Recipe.load(tmp_path / "one" / "recipe.yaml")
    tune(kept, tmp_path / "two")
    assert same_weights(tmp_path / "one", tmp_path / "two")
    assert kept.to_yaml() == (tmp_path / "two" / "recipe.yaml").read_text() == (tmp_path / "one" / "recipe.yaml").read_text()


def test_quiet_prints_the_folder_alone(tmp_path, capsys):
    name = written(tmp_path, recipe(tmp_path, measure=["task", "forgetting", "calibration", "weights"]))
    assert cli.main(["tune", name, "--run", str(tmp_path / "run"), "--quiet"]) == 0
    assert capsys.readouterr() == (f"{tmp_path / 'run'}\n", "")


def test_model_and_data_alone_are_a_command(tmp_path, capsys):
    write_rows(tmp_path / "train.jsonl", rows(PAIRS, 20))
    command = ["tune", "--model", str(model_folder("causal-lm")), "--data", str(tmp_path / "train.jsonl"), "--run", str(tmp_path / "run"), "train.steps=2", "train.device=cpu"]
    assert cli.main(command) == 0
    assert "were held out for testing" in capsys.readouterr().out
    assert open_run(tmp_path / "run").numbers()["task/rows"] == 2


def test_rows_and_a_model_in_memory(tmp_path):
    family = tiny.tiny_llama()
    before = {k: v.clone() for k, v in family.network.state_dict().items()}
    run = luthier.tune({"model": family, "data": {"train": rows(PAIRS, 8), "test": rows(PAIRS, 4, 1)}, "measure": ["weights"], "train": {"steps": 2, "batch": 4}, **FULL}, run=tmp_path / "run")
    assert run.numbers()["weights/relative_move"] > 0
    changed = tensors(run.model_path)
    assert any(not torch.equal(before[k], changed[k]) for k in before)


def test_what_is_no_finished_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        ask(tmp_path, ["w1"])
    (tmp_path / "recipe.yaml").write_text(Recipe.from_dict(recipe(tmp_path)).to_yaml())
    with pytest.raises(UserError, match="has no model yet.*--resume"):
        open_run(tmp_path)


def test_bad_rows_set_aside_are_counted(tmp_path):
    made = recipe(tmp_path)
    write_rows(tmp_path / "train.jsonl", [*rows(PAIRS, 6), {"prompt": "w1"}, {"completion": "w2"}])
    made["data"]["on_error"] = "skip"
    tune(made, tmp_path / "run")
    assert "8 given, then 6 after 2 bad ones were set aside" in (tmp_path / "run" / "report.txt").read_text()
    assert json.loads((tmp_path / "run" / "about.json").read_text())["data"]["train"]["aside"] == 2


def test_a_tracker_writes_its_file(tmp_path):
    pytest.importorskip("tensorboard")
    tune(recipe(tmp_path, train={"tracker": ["tensorboard"]}), tmp_path / "run")
    found = [p for p in (tmp_path / "run").rglob("events.out.tfevents.*") if p.stat().st_size > 100]
    assert found


def test_validation_loss_and_timed_measures_go_to_the_metrics(tmp_path):
    made = recipe(tmp_path, measure=[{"method": "task", "every": 2, "limit": 2}], train={"eval_every": 2})
    made["data"]["val"] = str(write_rows(tmp_path / "val.jsonl", rows(PAIRS, 4, 3)))
    tune(made, tmp_path / "run")
    steps = lines_of(tmp_path / "run" / "metrics.jsonl")
    assert ["val_loss" in s for s in steps] == [False, True, False, True] == ["task/nll" in s for s in steps]


# -- what is learned ---------------------------------------------------------------------------------------------------------------


def test_a_weight_column_weighs_rows(tmp_path):
    """Rows of weight 0 teach nothing: the run is that of the others alone, batch for batch."""
    some = rows(PAIRS, 4)
    train = {"steps": 3, "batch": 8}
    # plain gradients: Adam would make rounding of tiny ones as large as a step
    made = recipe(tmp_path, train=train, **{**FULL, "optimize": {"method": "sgd", "lr": 0.5}})
    write_rows(tmp_path / "train.jsonl", [{**r, "weight": 1.0} for r in some] + [{**r, "weight": 0.0} for r in rows(PAIRS, 4, 9)])
    tune(made, tmp_path / "weighted")
    write_rows(tmp_path / "train.jsonl", some)
    tune(made, tmp_path / "alone")
    a, b = weights(tmp_path / "weighted"), weights(tmp_path / "alone")
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)
    write_rows(tmp_path / "train.jsonl", some + rows(PAIRS, 4, 9))
    tune(made, tmp_path / "all")
    assert any(not torch.allclose(a[k], v, atol=1e-4) for k, v in weights(tmp_path / "all").items())


def test_a_model_with_options(tmp_path):
    """Another type of numbers and another template than the model's own; the tuned model keeps both."""
    template = "{% for m in messages %}{{ m['content'] }} {% if m['role'] == 'assistant' %}<eos> {% endif %}{% endfor %}"
    made = recipe(tmp_path, model={"id": str(model_folder("causal-lm")), "dtype": "bf16", "template": template}, measure=["task"])
    run = tune(made, tmp_path / "run")
    family = run.model()
    assert family.dtype == torch.bfloat16 and family.tokenizer.chat_template == template
    (tmp_path / "chat.jinja").write_text(template)
    assert load({"id": str(model_folder("causal-lm")), "template": str(tmp_path / "chat.jinja")}).tokenizer.chat_template == template
    with pytest.raises(ModelError, match=r"gone\.jinja does not exist"):
        load({"id": str(model_folder("causal-lm")), "template": "gone.jinja"})


@pytest.mark.parametrize("family, columns", [("text-encoder", frozenset({"text", "label"})), ("image-classifier", frozenset({"image", "label"})), ("dual-encoder", frozenset({"image", "text"}))])
def test_every_family_runs_from_rows_in_memory(tmp_path, family, columns):
    data = {"train": rows(columns, 9), "test": rows(columns, 6, 1)}
    run = tune({"model": str(model_folder(family)), "data": data, "measure": ["task"], "train": {"steps": 2, "batch": 4, "device": "cpu"}, **FULL}, tmp_path / "run")
    assert any(v is not None for v in run.numbers().values())


# -- stages and loops --------------------------------------------------------------------------------------------------------------


def test_stages_follow_each_other_and_may_have_their_own_rows(tmp_path):
    made = recipe(tmp_path, **FULL)
    second = str(write_rows(tmp_path / "second.jsonl", rows(PAIRS, 8, 7)))
    made["stages"] = [{"name": "one", "train": {"steps": 2}}, {"name": "two", "data": {"train": second}, "train": {"steps": 3}}]
    run = tune(made, tmp_path / "run")
    stages = run.folder / "stages"
    assert sorted(p.name for p in stages.iterdir()) == ["00-one", "01-two"] and len(lines_of(stages / "01-two" / "metrics.jsonl")) == 3
    # one after the other by hand
    one = tune(recipe(tmp_path, **FULL, train={"steps": 2}), tmp_path / "one")
    assert all(torch.equal(v, weights(one.folder)[k]) for k, v in weights(stages / "00-one").items())
    two = recipe(tmp_path, **FULL, model=str(one.model_path), train={"steps": 3})
    two["data"]["train"] = second
    assert same_weights(tune(two, tmp_path / "two").folder, run.folder)


def test_a_stage_may_start_from_the_base(tmp_path):
    made = recipe(tmp_path, **FULL)
    run = tune(made | {"stages": [{"name": "one", "train": {"steps": 1}}, {"name": "two", "start": "base", "train": {"steps": 2}}]}, tmp_path / "run")
    assert same_weights(tune(recipe(tmp_path, **FULL, train={"steps": 2}), tmp_path / "alone").folder, run.folder)


@pytest.mark.parametrize("until, rounds", [("task/nll < 1000", 1), ("task/nll < 0", 3)])
def test_a_loop_ends_when_its_condition_holds_on_the_validation_rows(tmp_path, until, rounds):
    made = recipe(tmp_path, measure=[{"method": "task", "limit": 2, "max_new_tokens": 2}], stages=[{"loop": {"times": 3, "until": until, "stages": [{"name": "round", "train": {"steps": 1}}]}}])
    run = tune(made, tmp_path / "run")
    assert len(list((run.folder / "stages").iterdir())) == rounds
    assert run.model_path.is_dir()


REFUSING = """
from dataclasses import dataclass
from luthier.catalog import register
from luthier.errors import ModelError
from luthier.measure import Measure

@register("refusing")
@dataclass
class Refusing(Measure):
    '''Look at nothing.'''
    compares = {compares}

    def measure(self, model, rows, ctx=None):
        raise ModelError("It has no such weights.")
"""


def test_a_measure_that_cannot_be_taken_of_the_tuned_model_leaves_the_others(tmp_path):
    (tmp_path / "m.py").write_text(REFUSING.format(compares=True))
    run = tune(recipe(tmp_path, measure=[f"{tmp_path}/m.py:Refusing", "task"]), tmp_path / "run")
    after, name = run.measures["after"], f"{tmp_path}/m.py:Refusing"
    assert after[name]["notes"] == [f"{name} was not measured: It has no such weights."] and "nll" in after["task"]["numbers"]
    assert (run.folder / "report.html").exists()


def test_a_measure_that_cannot_be_taken_is_refused_before_anything_trains(tmp_path):
    (tmp_path / "m.py").write_text(REFUSING.format(compares=False))
    with pytest.raises(ModelError, match="It has no such weights"):
        tune(recipe(tmp_path, measure=[f"{tmp_path}/m.py:Refusing"]), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_condition_that_nothing_measures_is_refused(tmp_path):
    made = recipe(tmp_path, measure=["task"], stages=[{"loop": {"times": 2, "until": "task/nil < 1", "stages": [{"train": {"steps": 1}}]}}])
    with pytest.raises(RecipeError, match="task/nll"):
        tune(made, tmp_path / "run")


def test_a_second_lora_continues_from_the_first(tmp_path):
    """The first adapter becomes part of the network that the second starts from."""
    made = recipe(tmp_path, stages=[{"name": "one", "train": {"steps": 2}}, {"name": "two", "train": {"steps": 1}, "optimize": {"lr": 1e-12}}])
    run = tune(made, tmp_path / "run")
    one, both = tensors(run.folder / "stages" / "00-one" / "model"), tensors(run.model_path)
    assert all(torch.allclose(one[k], both[k], atol=1e-6) for k in both)
    base = tensors(model_folder("causal-lm"))
    assert any(not torch.allclose(base[k], both[k], atol=1e-4) for k in both)


# -- merge, compress, decode -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapt", ["full", {"method": "lora", "rank": 2}, {"method": "dora", "rank": 2}])
def test_merging_the_base_with_this_run(tmp_path, adapt):
    plain = tune(recipe(tmp_path, adapt=adapt), tmp_path / "plain")
    run = tune(recipe(tmp_path, adapt=adapt, merge={"method": "lines", "alpha": 0.3, "of": ["base", "this"]}), tmp_path / "run")
    base, tuned = tensors(model_folder("causal-lm")), tensors(plain.model_path)
    wanted = applied(base, lines(delta(base, tuned), 0.3, 0.7))
    found = tensors(run.model_path)
    assert all(torch.allclose(found[k], wanted[k], atol=1e-6) for k in found)
    assert any(not torch.allclose(found[k], tuned[k], atol=1e-6) for k in found)


def test_merging_two_runs_reads_them_from_their_folders(tmp_path, monkeypatch):
    other = tune(recipe(tmp_path, train={"seed": 1}), tmp_path / "other")
    plain = tune(recipe(tmp_path, **FULL), tmp_path / "plain")
    read = []
    original = TensorSource.of.__func__
    monkeypatch.setattr(TensorSource, "of", classmethod(lambda cls, x, base=None: (read.append(x), original(cls, x, base))[1]))
    run = tune(recipe(tmp_path, **FULL, merge={"method": "task-arithmetic", "scale": 0.5, "of": [str(other.folder), "this"]}), tmp_path / "run")
    monkeypatch.undo()
    assert not any(hasattr(x, "network") for x in read), "no model was loaded whole"
    base = tensors(model_folder("causal-lm"))
    a, b = tensors(other.model_path), tensors(plain.model_path)
    found = tensors(run.model_path)
    assert all(torch.allclose(found[k], base[k] + 0.5 * (a[k] - base[k] + b[k] - base[k]), atol=1e-6) for k in found)


def test_a_merge_that_chooses_on_validation_rows(tmp_path):
    made = recipe(tmp_path, merge={"method": "lines", "grid": [1.0, 0.0]})
    made["data"]["val"] = str(write_rows(tmp_path / "val.jsonl", rows(PAIRS, 4, 3)))
    run = tune(made, tmp_path / "run")
    tried = json.loads((run.folder / "report.json").read_text())["stages"][0]["merge"]["tried"]
    assert len(tried) == 2


def test_a_compressed_run(tmp_path):
    run = tune(recipe(tmp_path, compress=[{"method": "compeft", "density": 0.2, "alpha": 1.0}]), tmp_path / "run")
    found = [v for k, v in weights(run.folder).items() if "lora" in k]
    assert len({float(x) for t in found for x in t.abs().unique()}) == 2, "zero, and one magnitude for all"
    assert json.loads((run.folder / "report.json").read_text())["stages"][0]["compress"][0]["ratio"] > 1


DECODER = '''
from dataclasses import dataclass
from luthier.catalog import register
from luthier.core.families import Answer
from luthier.decode import Decoder

@register("parrot")
@dataclass
class Parrot(Decoder):
    """Always says the same."""
    word: str = "w1"
    def wrap(self, models, ctx=None):
        family = models["model"]
        whole = family.generate
        def generate(prompts, decode=None, n=1, **more):
            found = whole(prompts, decode, n, **more)
            for answers in found:
                for answer in answers:
                    answer.text = self.word
            return found
        family.generate = generate
        return family
'''


def test_the_decoder_is_at_work_in_measures_and_in_answers(tmp_path, capsys):
    (tmp_path / "parrot.py").write_text(DECODER)
    made = recipe(tmp_path, decode={"method": f"{tmp_path}/parrot.py:Parrot", "word": "w7"}, measure=["task"])
    write_rows(tmp_path / "test.jsonl", [{"prompt": "w1", "completion": "w7"}, {"prompt": "w2", "completion": "w7"}])
    run = tune(made, tmp_path / "run")
    assert run.numbers("before")["task/exact_match"] == 0 and run.numbers("after")["task/exact_match"] == 1
    assert cli.main(["ask", str(run.folder), "w1 w2", "w3", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.split() == ["w7", "w7"]
    assert run.model(decoded=False).generate([np.array([1, 2])])[0][0].text != "w7"


# -- search ------------------------------------------------------------------------------------------------------------------------


def test_a_grid_keeps_its_trials_and_tunes_the_best_point(tmp_path):
    made = recipe(tmp_path, measure=[{"method": "task", "limit": 4, "max_new_tokens": 2}], search={"method": "grid", "metric": "task/nll"}, space={"optimize.lr": [1e-6, 1e-2], "adapt.rank": [1, 2]}, train={"steps": 3})
    made["data"]["val"] = str(write_rows(tmp_path / "val.jsonl", rows(PAIRS, 4, 3)))
    run = tune(made, tmp_path / "run")
    trials = [open_run(p) for p in (run.folder / "trials").iterdir()]
    found = json.loads((run.folder / "search.json").read_text())
    assert len(trials) == len(found) == 4
    best = min(trials, key=lambda t: t.numbers()["task/nll"])
    assert found[0]["metrics"]["task/nll"] == pytest.approx(best.numbers()["task/nll"])
    assert same_weights(best.folder, run.folder)
    # the trials were compared on the validation rows, the result is measured on the test rows
    assert best.recipe.data.streams["test"].endswith("val.jsonl") and run.recipe.data.streams["test"].endswith("test.jsonl")
    stamps = {p: p.stat().st_mtime_ns for p in (run.folder / "trials").rglob("model/*.safetensors")}
    tune(made, tmp_path / "run", resume=True)
    assert {p: p.stat().st_mtime_ns for p in (run.folder / "trials").rglob("model/*.safetensors")} == stamps, "no trial is done twice"
    assert "search" not in (run.folder / "recipe.yaml").read_text() and "method: grid" in (run.folder / "search.yaml").read_text()
    assert not list(run.folder.glob("recipe.*.yaml"))


# -- many recipes ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1])
def test_any_recipe_is_a_function_of_its_values(tmp_path, seed):
    """The same recipe gives the same weights, another seed others."""
    rng = random.Random(seed)
    made = recipe(tmp_path, adapt={"method": rng.choice(["lora", "dora", "hft"])}, objective=rng.choice(["sft", "masked-thought"]), train={"seed": seed, "steps": 2, "schedule": rng.choice(["linear", "cosine"])})
    a, b = (tune(made, tmp_path / d) for d in "ab")
    assert same_weights(a.folder, b.folder)
    assert not same_weights(tune(made | {"train": made["train"] | {"seed": 99}}, tmp_path / "c").folder, a.folder)


def test_texts_train_a_language_model_too(tmp_path):
    run = tune(recipe(tmp_path, columns=TEXTS, measure=["task"]), tmp_path / "run")
    assert lines_of(run.folder / "metrics.jsonl")[-1]["loss"] > 0
