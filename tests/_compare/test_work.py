"""One run of a comparison, in a process of its own and without."""

import json
import subprocess
import sys
import time

import pytest

from luthier._compare import work
from luthier.compare import compare
from luthier.recipe import Recipe
from luthier.run import tune
from tests.test_compare import fake
from tests.toy_runs import PAIRS, recipe, rows, same_weights


def test_a_run_of_its_own_stops_with_its_starter_and_goes_on_later(tmp_path):
    """The process that starts a run goes away; the run writes a checkpoint, and continues to the very weights."""
    asked = Recipe.from_dict(recipe(tmp_path, train={"steps": 24, "save_every": 3}))
    folder = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-m", "luthier._compare.work"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True)
    process.stdin.write(json.dumps({"recipe": asked.to_dict(), "base": ".", "run": str(folder)}) + "\n")
    process.stdin.flush()
    while not (folder / "checkpoints" / "latest").exists() and process.poll() is None:
        time.sleep(0.002)
    process.stdin.close()
    assert process.wait(300) != 0 and work.record(folder) is None
    asked = asked.with_values({"train.save_every": 0})
    done = work.run(asked, folder, tune)
    assert done["error"] is None and done["cost"]["steps"] == 24 and done["cost"]["peak_memory"] > 2**20
    assert same_weights(folder, tune(asked, tmp_path / "straight").folder)


def test_a_run_of_its_own_tells_why_it_failed(tmp_path, monkeypatch):
    asked = Recipe.from_dict(recipe(tmp_path))
    (tmp_path / "train.jsonl").unlink()
    assert work.run(asked, tmp_path / "run") == {"error": f"data.train: the file {tmp_path / 'train.jsonl'} does not exist. Did you mean 'test.jsonl'?"}
    for script, why in (("import os; os.kill(os.getpid(), 9)", "want of memory"), ("raise SystemExit('out of luck')", "ended early with code 1: out of luck"),
                        (f"import sys; sys.stdin.readline(); print({work.MARK!r} + '\"No rows.\"', flush=True); sys.stdin.read()", "No rows.")):  # fmt: skip
        monkeypatch.setattr(work, "COMMAND", (sys.executable, "-c", script))
        assert why in work.run(asked, tmp_path / "run")["error"]


def test_rows_in_memory_are_compared_in_this_process(tmp_path, monkeypatch):
    monkeypatch.setattr(work, "_apart", lambda request: pytest.fail("a set is nothing that json knows"))
    monkeypatch.setattr("luthier.run.tune", fake(lambda m, s: {}))
    base = recipe(tmp_path, objective="sft")
    base["data"]["train"] = [{**row, "tags": {"a"}} for row in rows(PAIRS, 12)]
    found = compare(base, {"adapt.rank": [2, 3]}, seeds=1, out=tmp_path / "out")
    assert not found.failed and found.runs["rank=2"][0]["cost"]["peak_memory"] is None and any("process of its own" in n for n in found.notes)
