"""What is written, and what is refused."""

import json
import sys
import xml.etree.ElementTree as ET
from dataclasses import asdict, replace

import pytest

from bench import __main__ as main
from bench import peers, plots, run, table
from bench.case import Bench, Case, Goal, Row
from bench.cases import CASES

CASE = Case("toy", "a toy", "ours_toy", lambda bench: {"rows": [3.0, 2.0, 1.0], "batch": 2}, Goal(speed=1.5, memory=0.5), "nothing", "a peer", "peer_toy", "its best", lambda bench, job: 1e9 * sum(job["rows"]))
OURS = {"seconds": [1.0, 3.0, 2.0], "cpu_seconds": [2.0], "check": [1.0, 2.0], "extra_bytes": 100, "flops_per_second": [6e9],
        "parts": {"products": 0.5, "attention": 0.25, "others": 0.125, "flops": 7e9, "flops_per_second": 5e9}}  # fmt: skip
THEIRS = {"seconds": [4.0], "cpu_seconds": [5.0], "check": [1.0, 2.0001], "extra_bytes": 400}


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path, tmp_path)


def workers(monkeypatch, ours=OURS, theirs=THEIRS):
    """Replaces processes by their results; returns the order in which they ran."""
    order = []
    monkeypatch.setattr(run.peers, "python", lambda: "python-of-peers")
    monkeypatch.setattr(run, "work", lambda python, module, job: order.append(module) or (ours if module == "ours_toy" else theirs))
    return order


def test_sides_take_turns_and_medians_make_the_ratio(monkeypatch, bench):
    order = workers(monkeypatch)
    row = run.measure(CASE, bench, 2)
    assert order == ["ours_toy", "peer_toy"] * 2
    assert row.ratio == 2.0 and row.cpu_ratio == 2.5 and row.memory_ratio == 0.25 and row.missed() == []
    assert row.bound_seconds == 1.0 and row.share == 0.5
    assert "67 % of the bound would be reached" in table.markdown([row], {})  # 50 % over 75 %
    assert row.parts["must"] == 5e9  # of the first batch, which was looked at closely
    assert row.difference == pytest.approx(5e-5, rel=1e-2) and row.values == 2


@pytest.mark.parametrize("check", [[1.0, 2.1], [1.0], [], [1.0, float("nan")]])
def test_nothing_is_reported_when_the_sides_differ(monkeypatch, bench, check):
    order = workers(monkeypatch, theirs={**THEIRS, "check": check})
    with pytest.raises(run.Different, match="toy"):
        run.measure(CASE, bench, 3)
    assert order == ["ours_toy", "peer_toy"]


def test_picks_must_be_the_very_same():
    exact = replace(CASE, tolerance=0.0)
    assert run.same(exact, [5.0, 7.0], [5.0, 7.0]) == 0.0
    with pytest.raises(run.Different):
        run.same(exact, [5.0, 7.0], [7.0, 5.0])


def test_a_worker_that_fails_says_why(monkeypatch, bench, tmp_path):
    monkeypatch.setattr(run, "WORK", tmp_path)
    with pytest.raises(run.Failed, match="no_such_module"):
        run.work(run.sys.executable, "no_such_module", {"threads": 1})


def test_missed_goals_are_named():
    row = Row("x", "w", "p", 2.0, "step", "c", 100, 3.0, 100, goal=asdict(Goal(speed=2.0, memory=0.5, seconds=1.0, bytes=50)))
    assert row.missed() == ["speed", "memory", "seconds", "bytes"]


def test_the_table_keeps_rows_that_were_not_run(monkeypatch, bench, tmp_path):
    workers(monkeypatch)
    first = run.measure(CASE, bench, 1)
    table.write([replace(first, name="a"), replace(first, name="b", work="older")], {}, tmp_path)
    rows = table.merged([replace(first, name="b", work="newer")], tmp_path / "results.json", ["b", "a", "c"])
    assert [(r.name, r.work) for r in rows] == [("b", "newer"), ("a", "a toy")]
    curve = {"length": {"title": "t", "x": "x", "y": "y", "points": [[1, 2], [2, 4]]}}
    table.write(rows, curve, tmp_path)
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| newer | a peer | **2.00** | at least 1.5 times, at most 0.5 of the memory | 0 MB / 0 MB = 0.25 | 50 % | reached |" in text
    assert "`python -m bench toy` repeats it" in text and "![t](plots/length.svg)" in text
    assert json.loads((tmp_path / "results.json").read_text())["rows"][0]["ratio"] == 2.0


def test_curves_are_svg_files_that_stand_alone(tmp_path):
    (made,) = plots.write({"length": {"title": "seconds & more", "x": "tokens", "y": "seconds", "points": [(64, 1.0), (128, 2.0)]}}, tmp_path)
    assert ET.fromstring(made.read_text()).tag.endswith("svg")


def test_a_curve_over_seconds_has_one_of_what_is_done_a_second_beside_it(tmp_path):
    found = {"title": "a step", "x": "rows a step", "y": "seconds", "points": [(2, 1.0), (8, 2.0)], "unit": "rows", "rate": [(2, 2.0), (8, 4.0)]}
    made = plots.write({"batch": found}, tmp_path)
    assert [file.name for file in made] == ["batch.svg", "batch-rate.svg"]
    assert "rows a second" in made[1].read_text()
    text = table.markdown([], {"batch": found})
    assert "takes 2.00 times as much; rows a second: 2, 4\n" in text and "(plots/batch.svg)" in text and "(plots/batch-rate.svg)" in text


def test_every_row_names_modules_that_exist():
    for case in CASES.values():
        for module in filter(None, (case.ours, case.theirs)):
            assert (table.HERE / f"{module}.py").exists()
        assert bool(case.peer) == bool(case.theirs)


def test_a_row_that_fails_is_written_with_its_sentence_and_stops_no_other(monkeypatch, bench, tmp_path):
    def measured(case, *_):
        if case.name == "sft":
            raise run.Failed("bench.peer_trl ended with 1: ImportError: no trl")
        return replace(run.failed(case, ""), seconds=1.0, goal={"seconds": 2.0})

    monkeypatch.setattr(main, "measure", measured)
    assert [main.one(name, bench, 1, tmp_path) for name in ("sft", "help")] == [False, True]
    found = {r["name"]: r for r in json.loads((tmp_path / "results.json").read_text())["rows"]}
    assert found["sft"]["failed"].endswith("no trl") and found["sft"]["ratio"] is None and not found["help"]["failed"]
    text = (tmp_path / "RESULTS.md").read_text()
    assert "failed, see below" in text and "- failed: bench.peer_trl ended with 1: ImportError: no trl" in text and "| reached |" in text
    monkeypatch.setattr(main, "measure", lambda case, *_: replace(run.failed(case, ""), seconds=1.0))
    assert main.one("sft", bench, 1, tmp_path) and "failed" not in (tmp_path / "RESULTS.md").read_text()


def test_a_curve_that_fails_leaves_the_others(monkeypatch, bench, tmp_path):
    def work(python, module, job):
        if module == "ours_scaling":
            raise run.Failed("no memory")
        return {"extra_bytes": 1e6 * job["batch"]}

    monkeypatch.setattr(main, "work", work)
    monkeypatch.setattr(main, "contrastive", lambda bench, size: {"batch": size})
    assert not main.one("scaling", bench, 1, tmp_path)
    text = (tmp_path / "RESULTS.md").read_text()
    assert "failed: no memory" in text and "16 times the size (64 to 1024) takes 16.00 times as much" in text and "plots/contrastive-memory.svg" in text
    assert (tmp_path / "plots" / "contrastive-memory.svg").exists()


def test_why_the_peers_cannot_be_installed_is_one_sentence(monkeypatch, tmp_path):
    assert peers.reason("Looking\nERROR: No matching distribution found for trl==9\n") == "No matching distribution found for trl==9."
    assert peers.reason("WARNING: Location '/a' is ignored.\n") == "pip was stopped."
    monkeypatch.setattr(peers, "FOLDER", tmp_path / "env")
    assert not peers.runs(peers.interpreter())
    with pytest.raises(peers.NotInstalled, match=r"cannot be installed.*no_such_module_of_pip.*python -m bench.peers"):
        peers.install(sys.executable, "--find-links", "no_such_module_of_pip", "--no-index", "no_such_module_of_pip")


def test_every_peer_and_all_it_needs_has_one_version():
    lines = [line for line in peers.WANTED.read_text().splitlines() if line and not line.startswith("#")]
    names = [line.split("==")[0] for line in lines]
    assert all(line.count("==") == 1 for line in lines) and len(set(names)) == len(names) and {"torch", "trl", "lm-eval", "mergekit", "sentence-transformers"} <= set(names)
