"""A run that is killed at any moment continues to the same weights, bit for bit; one that could not is refused."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import luthier
from luthier.catalog import entries, method
from luthier.core.engine import Engine
from luthier.errors import TrainingError
from luthier.run import tune
from luthier.testing import toys
from luthier.testing.toys import rows
from tests.toy_runs import PAIRS, ROOT, TEXTS, attempts, recipe, same_weights, write_rows, written

SAMPLER = '''
from dataclasses import dataclass, field

import numpy as np

from luthier.catalog import register
from luthier.select import Selector


@register("wandering")
@dataclass
class Wandering(Selector):
    """A sampler whose order depends on what it did before and on the run's own generator."""

    start: int = field(default=0, init=False)

    def batches(self, rows, size, epoch, ctx):
        order = np.roll(ctx.numpy("wandering").permutation(len(rows)), self.start)
        self.start += 1
        return [order[i : i + size].tolist() for i in range(0, len(order), size)]

    def state_dict(self):
        return {"start": self.start}

    def load_state_dict(self, state):
        self.start = state["start"]
'''
LORA = {"method": "lora", "rank": 2, "dropout": 0.2, "targets": ["q_proj", "v_proj"]}


def lines(run: Path, *numbers: int) -> list[dict]:
    return [{"lines": n, "file": str(run / "metrics.jsonl")} for n in numbers]


def moments(run: Path, seed: int, steps: int) -> list[dict]:
    """Random steps at which to kill, the second later, and a random time between."""
    rng = random.Random(seed)
    first, second = lines(run, *sorted(rng.sample(range(1, steps - 1), 2)))
    return [first, {"after": rng.uniform(0.1, 0.5)}, second]


def online_selector(here: Path, run: Path) -> tuple[dict, list[dict]]:
    select = {"method": "uds", "candidates": 2.0, "positions": 16, "sketch_columns": 8, "sketch_rows": 2}
    return recipe(here, n=24, adapt=LORA, select=select, train={"steps": 14, "save_every": 3}), moments(run, 0, 14)


def redrawn_halves(here: Path, run: Path) -> tuple[dict, list[dict]]:
    (here / "wandering.py").write_text(SAMPLER)
    adapt, select = {"method": "hft", "redraw": "epoch"}, f"{here}/wandering.py:Wandering"
    return recipe(here, adapt=adapt, objective="masked-thought", select=select, train={"steps": 12, "save_every": 2}), moments(run, 1, 12)


def momentum_encoder(here: Path, run: Path) -> tuple[dict, list[dict]]:
    return recipe(here, "text-encoder", TEXTS, objective={"method": "contriever", "queue": 16}, train={"steps": 10, "save_every": 3}), moments(run, 2, 10)


def merged(here: Path, run: Path) -> tuple[dict, list[dict]]:
    """Killed before training, in the merge, after it, and while measuring."""
    names = ("about.json", "rows/latest", ".this-model", "model", "done")
    return recipe(here, merge={"method": "lines", "alpha": 0.5}, measure=["task"], train={"steps": 3}), [{"exists": str(run / n)} for n in names]


def rounds(here: Path, run: Path) -> tuple[dict, list[dict]]:
    """Self-play as the preset `spin` has it: each round samples from the last one's model and trains against it."""
    play = {"synthesize": {"method": "self-play", "max_new_tokens": 4}, "adapt": LORA, "objective": {"method": "dpo", "beta": 0.1}, "train": {"steps": 4, "batch": 2, "save_every": 1}}
    stages = [{"name": "first", "train": {"steps": 2}}, {"name": "spin", "loop": {"times": 2, "start": "previous", "stages": [play]}}]
    first, one, two = (run / "stages" / n for n in ("00-first", "01-spin-00", "01-spin-01"))
    return recipe(here, n=6, stages=stages), [
        *lines(first, 1), {"exists": str(first / "done")}, {"exists": str(one / "rows" / "latest")}, *lines(one, 2), {"exists": str(one / "end" / "latest")}, *lines(two, 3),
    ]  # fmt: skip


def polite(here: Path, run: Path) -> tuple[dict, list[dict]]:
    """Asked to stop instead of killed."""
    stops = lines(run, 3, 6)
    return recipe(here, adapt=LORA, train={"steps": 40, "save_every": 50}), [stops[0] | {"signal": "SIGINT"}, stops[1] | {"signal": "SIGTERM"}]


SCENARIOS = {f.__name__: f for f in (online_selector, redrawn_halves, momentum_encoder, merged, rounds, polite)}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """For every scenario its folder and what became of: a whole run, one that is killed again and again, and its last continuation."""
    root = tmp_path_factory.mktemp("killed")
    jobs, counts = [], {}
    for name, scenario in SCENARIOS.items():
        here = root / name
        here.mkdir()
        made, kills = scenario(here, here / "run")
        argv = ["tune", written(here, made), "--quiet", "--run"]
        jobs += [{"argv": [*argv, str(here / "whole")]}, *({"argv": [*argv, str(here / "run"), "--resume"], "kill": kill} for kill in kills)]
        jobs += [{"argv": ["tune", str(here / "run"), "--resume", "--quiet"]}]
        counts[name] = len(kills) + 2
    done = iter(attempts(root, jobs))
    return {name: (root / name, [next(done) for _ in range(n)]) for name, n in counts.items()}


@pytest.mark.parametrize("name", [n for n in SCENARIOS if n != "polite"])
def test_killed_again_and_again_it_reaches_the_same_weights(outcomes, name):
    here, done = outcomes[name]
    whole, *killed, last = done
    assert whole["code"] == last["code"] == 0, (whole["err"], last["err"])
    assert last["out"].strip() == str(here / "run")
    assert sum(d["code"] == -signal.SIGKILL for d in killed) >= len(killed) - 1, [(d["code"], d["err"]) for d in killed]
    assert same_weights(here / "whole", here / "run")


def test_what_was_written_is_that_of_the_whole_run(outcomes):
    here = outcomes["online_selector"][0]
    steps = [[json.loads(line) for line in (here / d / "metrics.jsonl").read_text().splitlines()] for d in ("whole", "run")]
    assert [(s["step"], s["loss"], s["uds_utility"]) for s in steps[0]] == [(s["step"], s["loss"], s["uds_utility"]) for s in steps[1]]
    here = outcomes["merged"][0]
    measures = [json.loads((here / d / "measures.json").read_text()) for d in ("whole", "run")]
    assert measures[0] == measures[1] and set(measures[1]) == {"before", "after"}
    assert not list((here / "run").glob(".*")), "nothing half-written stays"


def test_a_polite_stop_keeps_the_step_and_says_how_to_go_on(outcomes):
    here, (_, by_key, by_signal, again) = outcomes["polite"]
    assert (by_key["code"], by_signal["code"], again["code"]) == (2, 143, 0)
    for stopped, word in ((by_key, "Ctrl-C"), (by_signal, "SIGTERM")):
        assert f"Stopped by {word} after step" in stopped["err"] and "checkpoint is written" in stopped["err"]
        assert f"resume with: luthier tune {here / 'run'} --resume" in stopped["err"]
    assert same_weights(here / "whole", here / "run")


def test_the_real_command_is_killed_and_continued_in_another_process(tmp_path):
    name, run = written(tmp_path, recipe(tmp_path, adapt=LORA, train={"steps": 40, "save_every": 5, "threads": torch.get_num_threads()})), tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-m", "luthier", "tune", name, "--run", str(run), "--quiet"], cwd=ROOT)
    while process.poll() is None and not (run / "checkpoints" / "latest").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (run / "model").exists()
    tune(run / "recipe.yaml", run, resume=True)
    tune(name, tmp_path / "whole")
    assert same_weights(tmp_path / "whole", run)


# -- what may not change -------------------------------------------------------------------------------------------------------


@pytest.fixture
def half(tmp_path):
    """A recipe, and the folder of a run of it that stopped by a fault of its objective at step 3."""
    (tmp_path / "fault.py").write_text(FAULT)
    made = recipe(tmp_path, objective=f"{tmp_path}/fault.py:Fault", train={"save_every": 1})
    (tmp_path / "fault").write_text("")
    with pytest.raises(TrainingError, match="not a number"):
        tune(made, tmp_path / "run")
    (tmp_path / "fault").unlink()
    return made, tmp_path / "run"


FAULT = '''
from dataclasses import dataclass
from pathlib import Path
from luthier.objective.sft import SFT

@dataclass
class Fault(SFT):
    """Supervised, with a fault at step 3 as long as the file `fault` is there."""
    def loss(self, model, batch, ctx=None):
        made = super().loss(model, batch, ctx)
        if ctx.clock.step == 3 and Path(__file__).with_name("fault").exists():
            return made.add("fault", next(iter(made.terms.values())).total.reshape(1) * float("nan"), per="batch")
        return made
'''


def test_after_the_fault_is_mended_the_run_goes_on_as_if_nothing_had_been(half, tmp_path):
    made, run = half
    tune(made, run, resume=True)
    tune(made, tmp_path / "whole")
    assert same_weights(run, tmp_path / "whole")


def test_changed_training_rows_are_refused(half, tmp_path):
    made, run = half
    write_rows(tmp_path / "train.jsonl", rows(PAIRS, 12, seed=5))
    with pytest.raises(TrainingError, match="its 'train' rows are not those it began with"):
        tune(made, run, resume=True)


def test_another_number_of_threads_is_refused(half, monkeypatch):
    made, run = half
    now = torch.get_num_threads()
    try:
        torch.set_num_threads(now + 1)
        with pytest.raises(TrainingError, match=f"threads was {now} and is {now + 1}"):
            tune(made, run, resume=True)
    finally:
        torch.set_num_threads(now)


@pytest.mark.parametrize("change, words", [({"adapt": {"method": "lora", "rank": 4}}, "other weights are trained"), ({"adapt": "full"}, "the list of methods"), ({"train": {"steps": 9, "save_every": 1}}, "number of steps")])
def test_another_recipe_that_cannot_continue_is_refused_and_the_first_one_kept(half, change, words):
    made, run = half
    before = (run / "recipe.yaml").read_text()
    with pytest.raises(TrainingError, match=words):
        tune(made | change, run, resume=True)
    assert (run / "recipe.1.yaml").read_text() == before


def test_a_lower_rate_may_continue_after_a_fault(half):
    made, run = half
    assert tune(made | {"optimize": {"method": "adamw", "lr": 1e-4}}, run, resume=True).model_path.is_dir()


def test_a_finished_run_continues_by_doing_nothing(tmp_path):
    made = recipe(tmp_path, measure=["task"])
    first = luthier.tune(made, run=tmp_path / "run")
    stamp = (tmp_path / "run" / "model" / "adapter_model.safetensors").stat().st_mtime_ns
    again = luthier.tune(made, run=tmp_path / "run", resume=True)
    assert again.measures == first.measures
    assert (tmp_path / "run" / "model" / "adapter_model.safetensors").stat().st_mtime_ns == stamp


def test_a_broken_checkpoint_is_told_in_a_sentence(half):
    made, run = half
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    (newest / "state.safetensors").write_bytes(b"nothing")
    with pytest.raises(TrainingError, match=r"step-\d+ cannot be read"):
        tune(made, run, resume=True)


# -- every method ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("axis, name", [(e.axis, e.name) for axis in ("select", "adapt", "objective", "optimize") for e in entries(axis)])
def test_every_method_continues_bit_for_bit(tmp_path, monkeypatch, axis, name):
    """A run is broken off in its fourth step, after a checkpoint at the second."""
    cls = method(axis, name)
    family = toys.shared_family([cls])
    made = {k: v for k, v in toys.recipe({axis: cls}, family, tmp_path).items() if k != "run"}
    made["train"] |= {"steps": 5, "save_every": 2}
    if axis in ("select", "optimize") and family == "causal-lm":
        made["adapt"] = LORA
    tune(made, tmp_path / "whole")
    step = Engine._step

    def cut(engine, *arguments):
        if engine.ctx.clock.step == 3:
            raise InterruptedError
        return step(engine, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_step", cut)
        with pytest.raises(InterruptedError):
            tune(made, tmp_path / "run")
    tune(made, tmp_path / "run", resume=True)
    assert same_weights(tmp_path / "whole", tmp_path / "run")
