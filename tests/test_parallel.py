"""Runs of several processes: the same curve as one process, sharded checkpoints that any number of processes read, and what a dead worker costs."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.toy_runs import attempts, recipe, same_weights, weights, written

MODES = ("ddp", "fsdp")
WORK = {
    "full": {"adapt": "full", "optimize": {"method": "adamw", "lr": 1e-3, "weight_decay": 0.1}},
    "lora": {"adapt": {"method": "lora", "rank": 2}, "optimize": {"method": "adamw", "lr": 1e-3}},
    "sam": {"adapt": "full", "optimize": {"method": "sam", "lr": 1e-3}},
    "few": {"adapt": "full", "train": {"batch": 1}},
}


def job(folder: Path, name: str, processes: int = 2, mode: str = "auto", kill: dict | None = None, resume: bool = False, **changes) -> dict:
    """A `luthier tune` of a toy recipe, each in a folder of its own below `folder`."""
    home = folder / name
    if resume:
        return {"argv": ["tune", str(home / "run"), "--resume", "--quiet"], "processes": processes, "kill": kill}
    home.mkdir()
    changes["train"] = {"steps": 6, "batch": 5, "parallel": mode, "tokens_per_micro_batch": 30, **changes.get("train", {})}
    return {"argv": ["tune", written(home, recipe(home, **changes)), "--run", str(home / "run"), "--quiet"], "processes": processes, "kill": kill}


def curve(run: Path) -> torch.Tensor:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([[line["loss"], line["grad_norm"], line["rows"]] for line in lines])


def far(a: Path, b: Path) -> float:
    x, y = weights(a), weights(b)
    assert x.keys() == y.keys()
    return max(float((x[k] - y[k]).abs().max()) for k in x)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every kind of work in one process and in two, in both modes."""
    folder = tmp_path_factory.mktemp("parallel")
    jobs = [job(folder, f"{name}-{mode}", 1 if mode == "auto" else 2, mode, **work) for name, work in WORK.items() for mode in ("auto", *MODES)]
    for one, found in zip(jobs, attempts(folder, jobs)):
        assert found["code"] == 0, (one["argv"], found)
    return folder


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", WORK)
def test_two_processes_learn_what_one_does(runs, name, mode):
    one, two = runs / f"{name}-auto" / "run", runs / f"{name}-{mode}" / "run"
    assert curve(one).shape == (6, 3)
    torch.testing.assert_close(curve(two), curve(one), atol=1e-4, rtol=1e-4)
    assert far(two, one) < 1e-4


def test_sharded_checkpoints_hold_every_row_once(runs):
    newest = max((runs / "full-fsdp" / "run" / "checkpoints").glob("step-*"))
    files = sorted(newest.glob("rows-*.safetensors"))
    assert len(files) == 2
    parts = []
    for file in files:
        with safe_open(file, framework="pt") as held:
            parts.append({k: held.get_slice(k).get_shape() for k in held.keys()})  # noqa: SIM118
    assert parts[0].keys() == parts[1].keys()
    with safe_open(newest / "state.safetensors", framework="pt") as held:
        assert not any("weights" in k and "buffer" not in k for k in held.keys())  # noqa: SIM118
    whole = weights(runs / "full-fsdp" / "run")
    rows = {k.split("/")[-1]: parts[0][k][0] + parts[1][k][0] for k in parts[0] if k.startswith("s.weights")}
    assert rows and all(n == len(whole[k]) for k, n in rows.items() if k in whole)
    moments = [k for k in parts[0] if "exp_avg" in k]
    assert len(moments) == 2 * len(rows)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """Runs whose workers die or are asked to stop, and what became of them when they went on."""
    folder = tmp_path_factory.mktemp("interrupted")
    work = {"adapt": "full", "train": {"save_every": 2, "steps": 8}}

    def death(name: str, **kill) -> dict:
        return {"lines": 5, "file": str(folder / name / "run" / "metrics.jsonl"), **kill}

    first = [
        job(folder, "whole", 2, "fsdp", **work),
        job(folder, "killed", 2, "fsdp", death("killed", rank=1), **work),
        job(folder, "asked", 2, "ddp", death("asked", rank="all", signal="SIGTERM"), **work),
        job(folder, "shrunk", 2, "fsdp", death("shrunk", rank=0), **work),
        job(folder, "grown", 1, "fsdp", death("grown"), **work),
    ]
    then = [job(folder, "killed", 2, resume=True), job(folder, "asked", 2, resume=True), job(folder, "shrunk", 1, resume=True), job(folder, "grown", 2, resume=True)]
    found = attempts(folder, first + then)
    return folder, dict(zip(("whole", "killed", "asked", "shrunk", "grown", "killed+", "asked+", "shrunk+", "grown+"), found))


def test_a_killed_worker_ends_the_run_and_nothing_is_lost(interrupted):
    folder, found = interrupted
    codes = [p["code"] for p in found["killed"]["processes"]]
    assert codes[1] == -9 and codes[0] == 2
    assert "Another process of this run ended" in found["killed"]["err"] and "--resume" in found["killed"]["err"]
    assert found["killed+"]["code"] == 0, found["killed+"]
    assert same_weights(folder / "killed" / "run", folder / "whole" / "run")


def test_processes_stop_together_when_asked(interrupted):
    folder, found = interrupted
    assert [p["code"] for p in found["asked"]["processes"]] == [143, 143]
    assert "Stopped by SIGTERM" in found["asked"]["err"] and not found["asked"]["processes"][1]["err"]
    assert found["asked+"]["code"] == 0
    assert far(folder / "asked" / "run", folder / "whole" / "run") < 1e-4


@pytest.mark.parametrize("name", ["shrunk", "grown"])
def test_another_number_of_processes_goes_on(interrupted, name):
    folder, found = interrupted
    assert found[name]["code"] < 0 or found[name]["code"] == 2
    assert found[f"{name}+"]["code"] == 0, found[f"{name}+"]
    assert far(folder / name / "run", folder / "whole" / "run") < 1e-4


def test_what_several_processes_cannot_share_is_refused_once(tmp_path):
    found = attempts(tmp_path, [
        job(tmp_path, "spiel", adapt={"method": "spiel", "density": 0.1}),
        job(tmp_path, "sm3", mode="fsdp", adapt="full", optimize="sm3"),
    ])  # fmt: skip
    for one, word in zip(found, ("spiel", "sm3")):
        assert [p["code"] for p in one["processes"]] == [2, 2]
        assert word in one["err"] and one["err"].count("\n") == 1 and not one["processes"][1]["err"]


def test_a_loss_of_the_whole_batch_sees_all_rows_in_any_number_of_processes(tmp_path):
    work = {"family": "text-encoder", "columns": frozenset({"anchor", "positive"}), "objective": {"method": "info-nce", "chunk": 2}, "optimize": {"method": "adamw", "lr": 1e-3}}
    jobs = [job(tmp_path, "alone", 1, **work), job(tmp_path, "two", 2, "ddp", **work), job(tmp_path, "three", 3, "fsdp", **work)]
    assert [one["code"] for one in attempts(tmp_path, jobs)] == [0, 0, 0]
    for name in ("two", "three"):
        torch.testing.assert_close(curve(tmp_path / name / "run"), curve(tmp_path / "alone" / "run"), atol=1e-4, rtol=1e-4)
