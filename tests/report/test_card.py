"""The report card: what a run left behind, finished or not, is told as it is; text from data stays text."""

import json
import re
import shutil
import signal
from html import unescape

import pytest

import luthier
from luthier.cli import main
from luthier.errors import UserError
from luthier.report.card import as_values, card, write
from luthier.report.reading import read
from tests.report.conftest import RECIPE

EVIL = "<img src=x onerror=alert(1)>"


def headings(html):
    return re.findall(r"<h2>(.*?)</h2>", html)


def words(html):
    """What a reader sees."""
    return unescape(re.sub(r"<[^>]+>", " ", re.sub(r"<(style|script)>.*?</\1>", "", html, flags=re.S)))


def test_every_run_gets_a_card_with_all_its_parts(run):
    html = (run / "report.html").read_text()
    assert headings(html) == ["Gained", "Forgotten", "Trust", "Where the weights moved", "The data", "The training", "Examples", "How to repeat it"]
    assert len(html) < 2_000_000 and "http://" not in html and "https://" not in html
    for chart in ("Right before and after", "General questions before and after", "How sure it is", "Relative change of every tensor", "The pool", "Loss", "Gradient norm", "Throughput"):
        assert chart in html, chart
    assert "random" in html and "lab:lm-s" in html, "the recipe is there to be repeated"


def test_the_card_agrees_with_the_measures(run):
    facts, measures = json.loads((run / "report.json").read_text()), json.loads((run / "measures.json").read_text())
    assert facts["status"] == "finished" and facts["cost"]["steps"] == 3 and facts["data"][""]["learned"] == 12
    mine = next(c for c in facts["changes"] if c["name"] == "task/exact_match")
    assert mine["after"] == measures["after"]["task"]["numbers"]["exact_match"]
    assert len(facts["examples"]["test"]) == 8 and len(facts["examples"]["general"]) == 100
    differences = [r["score"] - r["score_before"] for r in facts["examples"]["test"]]
    assert differences == sorted(differences), "the worst regressions come first"


def copied(run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    return tmp_path / "copy"


def changed(path, change):
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def test_text_from_data_stays_text(run, tmp_path):
    folder = copied(run, tmp_path)

    def poison(measures):
        for when in ("before", "after"):
            for row in measures[when]["task"]["tables"]["test answers"]:
                row |= {"prompt": EVIL, "answer": EVIL + "\x1b[31m\u202e", "gold": EVIL}
            measures[when]["task"]["notes"] = [EVIL]

    changed(folder / "measures.json", poison)
    changed(folder / "pool.json", lambda p: [q.update(text=EVIL) for q in p["points"]] and p.update(suspects=[{"where": EVIL, "reason": EVIL, "text": EVIL}]))
    changed(folder / "about.json", lambda a: a["data"].update({EVIL: {"rows": 1, "source": EVIL, "fingerprint": EVIL}}))
    (folder / "recipe.yaml").write_text((folder / "recipe.yaml").read_text() + f'name: "{EVIL}"\n')
    html = card(folder)
    assert "<img" not in html and html.count("&lt;img") > 10 and "\x1b" not in html and "\u202e" not in html


def test_what_is_missing_is_told_as_missing(run, tmp_path):
    folder = copied(run, tmp_path)
    for name in ("measures.json", "pool.json", "metrics.jsonl"):
        (folder / name).unlink()
    html = card(folder)
    assert "The task was not measured: the measure gave no result." in words(html) and "There was no step" not in html
    assert "0.0 %" not in words(html) and "Nothing was measured" in html
    (folder / "recipe.yaml").write_text((folder / "recipe.yaml").read_text().replace("- method: task", "- method: bs-detector"))
    assert "`task` is not among the recipe's measures" in words(card(folder))
    changed(copied(run, tmp_path / "b") / "measures.json", lambda m: m["after"]["calibration"]["numbers"].update(ece=None))
    assert "calibration" not in [c["name"] for c in as_values(tmp_path / "b" / "copy")["changes"]]
    with pytest.raises(UserError, match="no run folder"):
        card(tmp_path / "nowhere")


@pytest.mark.parametrize("junk", [b"", b"{", b"[1, 2]", b"\xff\xfe", b'"text"'])
def test_broken_files_do_not_break_the_card(run, tmp_path, junk):
    folder = copied(run, tmp_path)
    for name in ("measures.json", "pool.json", "report.json", "about.json"):
        (folder / name).write_bytes(junk)
    (folder / "metrics.jsonl").write_bytes((folder / "metrics.jsonl").read_bytes()[:-20] + junk)
    assert "Gained" in headings(card(folder))
    assert len(read(folder).curves[""]) == 2, "the line that was cut off is left out"


def test_a_run_that_fails_gets_a_card_that_says_so(tmp_path):
    recipe = {**RECIPE, "optimize": {"method": "adamw", "lr": 1e30}, "train": {"steps": 6, "batch": 4}}
    with pytest.raises(UserError):
        luthier.tune(recipe, run=tmp_path / "run")
    facts, html = as_values(tmp_path / "run"), (tmp_path / "run" / "report.html").read_text()
    assert facts["status"] == "failed" and facts["why"] and facts["verdict"][0].startswith("This run failed")
    assert "How to go on" in headings(html) and "--resume" in html and "was not measured: the run did not finish" in words(html)


def test_a_run_that_is_stopped_says_so_and_its_card_is_renewed_when_it_goes_on(tmp_path, monkeypatch):
    from luthier.core.engine import Engine

    step, folder = Engine._record, tmp_path / "run"

    def interrupt(self, *args):
        step(self, *args)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Engine, "_record", interrupt)
    with pytest.raises(UserError, match="Stopped"):
        luthier.tune(RECIPE, run=folder)
    assert as_values(folder)["status"] == "stopped" and "was stopped after 1 steps" in (folder / "report.html").read_text()
    monkeypatch.setattr(Engine, "_record", step)
    luthier.tune(RECIPE, run=folder, resume=True)
    assert as_values(folder)["status"] == "finished" and "was stopped" not in (folder / "report.html").read_text()


def test_a_killed_run_has_a_card_on_request(run, tmp_path, capsys):
    folder = copied(run, tmp_path)
    for name in ("report.json", "report.html", "done"):
        (folder / name).unlink()
    assert main(["report", str(folder)]) == 0
    assert "This run has not finished after 3 steps" in capsys.readouterr().out and (folder / "report.html").is_file()
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert main(["report", str(run), "--json"]) == 0 and json.loads(capsys.readouterr().out)["status"] == "finished"


def test_inner_runs_can_do_without(tmp_path):
    luthier.tune({**RECIPE, "measure": []}, run=tmp_path / "run", report=False)
    assert not (tmp_path / "run" / "report.html").exists() and not (tmp_path / "run" / "pool.json").exists() and (tmp_path / "run" / "report.json").exists()


def test_a_classifiers_card(tmp_path):
    recipe = {"model": "lab:vit", "data": {"train": "lab:digits?shots=2", "test": "lab:digits?shots=2"}, "train": {"steps": 2, "batch": 8}}
    folder = luthier.tune(recipe, run=tmp_path / "run").folder
    html = (folder / "report.html").read_text()
    assert "classified rightly" in html and "The pool" in html and "Relative change of every tensor" in html
    assert write(folder).read_text() == html, "the same files, the same card"
