"""Running claims, keeping their evidence, and what is refused or flagged."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from luthier.claims import Claim, find, names
from luthier.claims.evidence import Store, is_stale
from luthier.claims.work import run
from luthier.cli import main
from luthier.errors import RecipeError
from luthier.papers import papers


@pytest.fixture
def toy(tmp_path):
    return Path(shutil.copy(Path(__file__).with_name("toy_claim.py"), tmp_path / "toy.py"))


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """The toy claim, run whole: most tests look at what comes after that."""
    toy = Path(shutil.copy(Path(__file__).with_name("toy_claim.py"), tmp_path_factory.mktemp("claim") / "toy.py"))
    go(toy)
    return toy


@pytest.fixture
def done(once, toy):
    """A copy of it, with its evidence."""
    shutil.copy(once.with_suffix(".json"), toy.with_suffix(".json"))
    return toy


def evidence(toy):
    return json.loads(toy.with_suffix(".json").read_text())


def go(toy, **options):
    run([str(toy)], tell=lambda line: None, **options)
    return evidence(toy)


def test_a_claim_is_searched_run_and_judged(done):
    found = evidence(done)
    assert found["verdict"] == "reproduced" and found["flags"] == []
    assert found["effect"]["mean"] == pytest.approx(0.2) and found["effect"]["n"] == 3
    assert found["arms"]["two"]["settings"] == {"lr": 0.2} and {g["seed"] for g in found["grids"]} == {100} and len(found["grids"]) == 3
    assert found["arms"]["one"]["spent"] == {"rows": 90.0}  # what arms share is nobody's
    assert found["against"]["third"]["mean"] == pytest.approx(0.11)
    assert {"torch", "transformers", "python"} <= found["versions"].keys()
    assert not is_stale(find(done))


def test_quick_runs_append_and_never_count(toy, once):
    quick = go(toy, quick=True)
    assert quick["verdict"] is None and {r["arm"] for r in quick["records"]} == {"one", "two"} and quick["records"][0]["spent"]["rows"] == 30
    shutil.copy(once.with_suffix(".json"), toy.with_suffix(".json"))
    whole, again = evidence(toy), go(toy, quick=True)
    assert again["records"][: len(whole["records"])] == whole["records"] and again["verdict"] == "reproduced"
    assert sum(r["quick"] for r in again["records"]) == 2 and go(toy, quick=True) == again


def test_other_seeds_are_a_repetition_and_do_not_change_the_verdict(done):
    found = go(done, seeds=[10, 11, 12])
    assert found["effect"]["n"] == 3 and found["repeated"]["seeds"] == [10, 11, 12] and found["repeated"]["verdict"] == "reproduced"


def test_a_changed_claim_makes_evidence_stale_and_a_wrong_sign_turns_it(done, capsys):
    toy = done
    toy.write_text(toy.read_text().replace("0.6 +", "0.2 +"))
    sys.modules.pop("luthier_claim_toy", None)
    assert is_stale(find(toy))
    assert main(["claims", "status", str(toy)]) == 1 and "stale" in capsys.readouterr().err
    assert evidence(toy)["verdict"] == "reproduced"
    found = go(toy)
    assert found["verdict"] == "not reproduced" and len(found["records"]) == 18 and not is_stale(find(toy))


def test_words_written_after_a_run_do_not_make_it_stale(done):
    toy = done
    toy.write_text(toy.read_text().replace("published=", "reason='luck', published=").replace("made-up", "invented"))
    sys.modules.pop("luthier_claim_toy", None)
    assert not is_stale(find(toy)) and go(toy)["reason"] == "luck"


@pytest.mark.parametrize(("variable", "words"), [("TOY_NAN", "not a number"), ("TOY_UNEQUAL", "unequal rows"), ("TOY_FAIL", "on purpose")])
def test_what_is_wrong_is_flagged_and_gives_no_verdict(toy, monkeypatch, variable, words):
    monkeypatch.setenv(variable, "1")
    found = go(toy)
    assert any(words in flag for flag in found["flags"])
    assert found["verdict"] in (None, "unclear")
    if variable == "TOY_NAN":
        assert found["arms"]["two"]["means"]["score"] is None and found["effect"] is None


def test_a_metric_outside_its_span_is_flagged(toy):
    toy.write_text(toy.read_text().replace('{"score": 0.5}', '{"score": 1.5}'))
    assert any("outside" in flag for flag in go(toy)["flags"])


def test_a_kill_costs_no_more_than_the_arm_in_flight(toy):
    environment = {**os.environ, "TOY_SLEEP": "60"}
    process = subprocess.Popen([sys.executable, "-m", "luthier.cli", "claims", "run", str(toy), "--cores", "1"], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    line = next(line for line in process.stdout if "seed 0: two" in line)
    assert line
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = evidence(toy)
    assert [(r["arm"], r["seed"]) for r in kept["records"]] == [("two", 0)] and len(kept["grids"]) == 3
    whole = go(toy)
    assert whole["verdict"] == "reproduced" and len(whole["records"]) == 9 and whole["records"][0] == kept["records"][0]


def test_claims_that_are_not_claims_are_refused(tmp_path, capsys):
    with pytest.raises(RecipeError, match="three or more seeds"):
        Claim(paper=1, says="", published="", metric="m", smallest=0.1, seeds=(0,))
    with pytest.raises(RecipeError, match="grids are searched"):
        Claim(paper=1, says="", published="", metric="m", smallest=0.1, seeds=(0, 1, 100))
    with pytest.raises(RecipeError, match="smallest"):
        Claim(paper=1, says="", published="", metric="m", smallest=0.0)
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(RecipeError, match="defines no"):
        find(tmp_path / "empty.py")
    assert main(["claims", "show", "no-such"]) == 2
    assert main(["claims", "run", "33", "--seeds", "1"]) == 2 and "three or more" in capsys.readouterr().err
    assert main(["claims", "run", "33", "--seeds", "a,b"]) == 2


@pytest.mark.parametrize("name", names())
def test_every_claim_is_well_formed(name):
    claim = find(name)
    paper = next(p for p in papers() if p.n == claim.paper)
    assert paper.claim == name, "the file is named after its paper"
    assert claim.says and claim.published and claim.methods
    baseline = claim.of_role("baseline")
    assert baseline.exempt or len(claim.of_role("method").grid.get("lr", ())) == len(baseline.grid.get("lr", ())), "both are tuned alike, where both are trained"
    Store(claim).summary()


def test_listing_shows_and_table(done, capsys):
    assert main(["claims", "show", str(done)]) == 0
    shown = capsys.readouterr().out
    assert "reproduced" in shown and "third" in shown and "Published: always" in shown
    assert main(["claims", "list", "--json"]) == 0
    assert {c["claim"] for c in json.loads(capsys.readouterr().out)} == set(names())
    assert main(["claims", "table", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 169


def test_only_what_a_method_does_makes_evidence_stale(tmp_path):
    from luthier.claims.evidence import _code

    file = tmp_path / "m.py"

    def code(text: str) -> bytes:
        file.write_text(text)
        return _code(file, claim=False)

    was = code('"""A method."""\nclass A:\n    """Says."""\n    lr: float = 1.0\n    """Rate."""\n    parallel = {"single"}\n    def f(self):\n        return 2  # two\n')
    assert code('class A:\n    lr: float = 1.0\n    """The rate."""\n    def f(self):\n        """Two."""\n        return 2\n') == was
    assert code("class A:\n    lr: float = 1.0\n    def f(self):\n        return -2\n") != was
    assert code("class A:\n    lr: float = 2.0\n    def f(self):\n        return 2\n") != was


def test_searches_are_dealt_to_no_more_processes_than_cores():
    from luthier.claims.work import _shares

    arms = {name: [{"lr": i} for i in range(n)] for name, n in {"a": 8, "b": 4, "c": 3, "d": 3}.items()}
    shares = _shares(arms, 2)
    assert [sum(map(len, share.values())) for share in shares] in ([8, 10], [11, 7])
    assert {name: found for share in shares for name, found in share.items()} == arms
    assert len(_shares(arms, 16)) == 4 and _shares({}, 2) == []


def test_a_failed_search_counts_until_it_succeeds(done):
    store = Store(find(str(done)))
    ran = store.grids[0]
    failure = {"arm": ran["arm"], "seed": ran["seed"], "quick": False, "settings": ran["settings"], "error": "ValueError: no", "hash": store.hash}
    store.failures = [failure]
    assert not any("failed" in flag for flag in store.summary()["flags"])
    store.failures = [{**failure, "settings": {"lr": 77.0}}]
    assert any("ValueError: no" in flag for flag in store.summary()["flags"])
