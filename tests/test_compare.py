"""Comparing recipes: arms and names, equal budgets, paired statistics, continuing, failing, and what is said of it."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import luthier
from luthier import cli
from luthier._compare import judge, work
from luthier._compare.arms import arms_of, varied
from luthier.compare import compare
from luthier.errors import RecipeError, UserError
from luthier.recipe import Recipe
from tests.toy_runs import PAIRS, recipe, rows, write_rows, written

GIB = 2.0**30


def fake(answers, calls=None):
    """A tune that writes what a run leaves. `answers`: (method, seed) -> numbers, or what to raise."""

    def run(made, run, resume, quiet):
        method, seed = made.objective[0].method, made.train.seed
        answer = answers(method, seed)
        if calls is not None:
            calls.append((method, seed, resume))
        if isinstance(answer, BaseException):
            raise answer
        give = {"score": 0.5, "kept": 0.9, "ece": 0.1, "seconds": 10.0, "memory": GIB, "steps": 4, "rows": 12} | answer
        folder = Path(run)
        folder.mkdir(parents=True, exist_ok=True)
        found = {"task": {"numbers": {"exact_match": give["score"]}, "better": {"exact_match": "higher"}},
                 "forgetting": {"numbers": {"general_score": give["kept"]}, "better": {"general_score": "higher"}},
                 "calibration": {"numbers": {"ece": give["ece"]}, "better": {"ece": "lower"}}}  # fmt: skip
        before = {"forgetting": {"numbers": {"general_score": 0.9}}}
        stage = {"rows": [{"step": "given", "rows": give["rows"]}],
                 "outcome": {"seconds": give["seconds"], "tokens": 99, "steps": give["steps"], "peak_memory": give["memory"], "trained": 7}}  # fmt: skip
        (folder / "measures.json").write_text(json.dumps({"before": before, "after": found}))
        (folder / "report.json").write_text(json.dumps({"status": "finished", "stages": [stage], "seconds": 20.0}))

    return run


def scores(**by_method):
    """Main numbers by method, seed by seed."""
    return lambda method, seed: {"score": by_method[method.replace("-", "_")][seed]}


@pytest.fixture
def base(tmp_path):
    return recipe(tmp_path, measure=["task"], objective="sft")


def go(base, tmp_path, answers, methods=("sft", "asft"), **options):
    return compare(base, options.pop("vary", {"objective": list(methods)}), out=tmp_path / "out", tune=fake(answers), **options)


# -- arms --------------------------------------------------------------------------------------------------------------------


def made(base, **changes):
    return Recipe.from_dict(base | changes)


def names(*recipes, **vary):
    found = arms_of({f"x/{chr(97 + i)}.yaml": r for i, r in enumerate(recipes)}, {k.replace("__", "."): v for k, v in vary.items()})
    return [a.name for a in found], found[0].differs


def test_names_tell_what_differs(base):
    assert names(made(base), objective=["sft", "asft", "one-token-rollout"])[0] == ["sft", "asft", "one-token-rollout"]
    assert names(made(base), adapt__rank=[8, 16])[0] == ["rank=8", "rank=16"]
    assert names(made(base), objective__method=["sft", "asft"], adapt__rank=[8, 16])[0] == ["sft+rank=8", "sft+rank=16", "asft+rank=8", "asft+rank=16"]
    assert names(made(base), made(base, select={"method": "random", "budget": 4}))[0] == ["no-select", "random"]
    # two arms with one method are told apart by what is given
    found, differs = names(made(base), made(base, objective={"method": "asft", "kl": 0.05}), made(base, objective={"method": "asft", "kl": 0.2}))
    assert found == ["sft", "asft-kl=0.05", "asft-kl=0.2"] and list(differs) == ["objective"]
    # arms that differ in too much are called after their files
    other = made(base, objective="asft", optimize={"method": "adamw", "lr": 0.1}, train=base["train"] | {"steps": 9, "batch": 2})
    assert names(made(base), other)[0] == ["a", "b"]


def test_defaults_count_as_given(base):
    """A default that is spelled out is no difference; another value is, beside the default."""
    with pytest.raises(RecipeError, match=r"Arm 1 and arm 2 \(x/a.yaml and x/b.yaml\) are the same recipe"):
        names(made(base, objective="asft"), made(base, objective={"method": "asft", "kl": 0.1}))
    with pytest.raises(RecipeError, match="same recipe"):
        names(made(base), made(base, name="other", run="elsewhere", train=base["train"] | {"seed": 5}))
    found, differs = names(made(base, objective="asft"), made(base, objective={"method": "asft", "kl": 0.3}))
    assert found == ["kl=0.1", "kl=0.3"] and differs == {"objective.kl": "0.1"}


def test_stages_differ_where_they_say_so(base):
    def staged(rank, second):
        return made(base, adapt={"method": "lora", "rank": rank}, stages=[{"name": "one"}, {"name": "two", "objective": second}])

    found, differs = names(staged(2, "sft"), staged(4, "sft"))
    assert found == ["rank=2", "rank=4"] and list(differs) == ["adapt.rank"]
    assert names(staged(2, "sft"), staged(2, "asft"))[1] == {"stages.1.objective": '["sft"]'}


def test_varied_values_are_typed():
    assert varied(["adapt.rank=8,16", "optimize.lr=1e-3, 2e-4"]) == {"adapt.rank": [8, 16], "optimize.lr": [0.001, 0.0002]}
    assert varied("objective={method: asft, kl: 0.2},sft") == {"objective": [{"method": "asft", "kl": 0.2}, "sft"]}
    assert varied({"objective": ("sft", "asft")}) == {"objective": ["sft", "asft"]} and varied("adapt.rank=[8,16]") == {"adapt.rank": [8, 16]}
    for wrong, why in ((["rank"], "KEY=VALUE"), (["a.b=1", "a.b=2"], "varied twice"), (["train.seed=1,2"], "--seeds"), ({"a": []}, "no values")):
        with pytest.raises(RecipeError, match=why):
            varied(wrong)


@pytest.mark.parametrize(("vary", "options", "why"), [
    ({}, {}, "nothing to compare"),
    ({"objective": ["sft", "sftt"]}, {}, "Did you mean 'sft'"),
    ({"adapt.rank": [2, 0]}, {}, "rank"),
    ({"objective": ["sft", "asft"]}, {"against": "asfd"}, "There is no arm 'asfd' to compare with. Did you mean 'asft'"),
    ({"objective": ["sft", "asft"]}, {"seeds": 0}, "1 or more"),
    ({"objective": ["sft", "asft"]}, {"seeds": [1, 1]}, "different whole numbers"),
    ({"objective": ["sft", "dpo"]}, {}, "dpo: .*needs the columns"),
    ({"data.test": ["TEST", "TRAIN"]}, {}, "is tested on 4 rows of .*cannot be compared"),
])  # fmt: skip
def test_what_cannot_be_compared_is_refused_before_anything_runs(base, tmp_path, vary, options, why):
    files = {"TEST": base["data"]["test"], "TRAIN": base["data"]["train"]}
    vary = {k: [files.get(v, v) for v in values] for k, values in vary.items()}
    with pytest.raises(UserError, match=why):
        compare(base, vary, out=tmp_path / "out", tune=fake(lambda *a: pytest.fail("it ran")), **options)
    assert not (tmp_path / "out").exists()


def test_seeds_that_a_stage_would_ignore_are_refused(base, tmp_path):
    base["stages"] = [{"name": "one"}, {"name": "two", "train": {"seed": 3}}]
    with pytest.raises(RecipeError, match=r"a stage sets train\.seed itself"):
        go(base, tmp_path, scores(sft=[0.5] * 3, asft=[0.6] * 3))


def test_a_folder_with_other_things_is_left_alone(base, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        go(base, tmp_path, scores(sft=[0.5] * 3, asft=[0.6] * 3))


# -- budgets -----------------------------------------------------------------------------------------------------------------


def test_unequal_budgets_are_said_in_words(base, tmp_path):
    found = go(base, tmp_path, lambda m, s: {}, vary={"objective": ["sft", "asft"], "train.batch": [4]})
    assert found.unequal == []
    long = base | {"objective": "asft", "train": base["train"] | {"steps": None, "epochs": 3, "batch": 2}}
    short = base | {"select": {"method": "random", "budget": "50%"}}
    told = []
    took = fake(lambda m, s: {"steps": 4, "rows": 6} if m == "sft" else {"steps": 18, "rows": 12})
    found = compare([short, long], seeds=1, out=tmp_path / "two", tune=took, quiet=False, tell=told.append)
    assert found.unequal[0] == "unequal steps: recipe-1 4, recipe-2 18."
    assert "unequal rows learned from: recipe-1 6, recipe-2 12." in found.unequal
    assert "unequal rows a step: recipe-1 4, recipe-2 2." in found.unequal and "unequal epochs: recipe-1 as the steps say, recipe-2 3." in found.unequal
    assert all(line in told for line in found.unequal) and all(line in found.text for line in found.unequal)


def test_what_runs_really_took_outweighs_the_plan(base, tmp_path):
    found = go(base, tmp_path, lambda m, s: {"steps": 4 if m == "sft" else 3})
    assert found.unequal == ["unequal steps: sft 4, asft 3."]


def test_other_training_rows_of_equal_number_are_told(base, tmp_path):
    other = str(write_rows(tmp_path / "other.jsonl", rows(PAIRS, 12, 9)))
    found = go(base, tmp_path, lambda m, s: {}, vary={"data.train": [base["data"]["train"], other]})
    assert [a.name for a in found.arms] == ["train", "other"] and len(found.unequal) == 1 and found.unequal[0].startswith("unequal train rows: train 12 (")


# -- numbers -----------------------------------------------------------------------------------------------------------------


def test_intervals_are_paired_and_hold_together(base, tmp_path):
    """Against scipy: with two arms beside the reference each interval is drawn at 97.5 %."""
    rng = np.random.default_rng(3)
    easy = rng.uniform(0.3, 0.7, 5)  # what a seed is like, for all arms
    values = {"sft": easy, "asft": easy + 0.1 + rng.normal(0, 0.01, 5), "one_token_rollout": easy + rng.normal(0, 0.05, 5)}
    found = go(base, tmp_path, scores(**values), ("sft", "asft", "one-token-rollout"), seeds=5)
    for arm in ("asft", "one-token-rollout"):
        d = found.difference(arm, "quality")
        wanted = stats.ttest_rel(values[arm.replace("-", "_")], values["sft"]).confidence_interval(1 - 0.05 / 2)
        assert (d.low, d.high) == pytest.approx((wanted.low, wanted.high)) and d.smallest == pytest.approx((wanted.high - wanted.low) / 2)
    assert found.difference("asft", "quality").outcome == "better" and found.difference("one-token-rollout", "quality").outcome == "unclear"
    said = " ".join(found.verdict)
    assert "asft is better than sft: answered rightly (test rows) +" in said and "2 arms are compared with sft, so each interval is drawn at 97.5 %" in said
    assert "For the others no difference can be told apart from chance with 5 seeds" in said
    # the reference may be another arm
    turned = go(base, tmp_path, scores(**values), ("sft", "asft", "one-token-rollout"), seeds=5, against="asft")
    assert turned.reference == "asft" and turned.difference("sft", "quality").mean == pytest.approx(-found.difference("asft", "quality").mean)
    assert turned.difference("sft", "quality").outcome == "worse"


def test_lower_is_better_for_forgetting_calibration_time_and_memory(base, tmp_path):
    noise = [0.0, 0.001, -0.001]
    costly = {"score": 0.5, "kept": 0.6, "ece": 0.3, "seconds": 30.0, "memory": 2 * GIB}
    found = go(base, tmp_path, lambda m, s: {k: v * (1 + noise[s]) for k, v in costly.items()} if m == "asft" else {})
    outcomes = {n.key: found.difference("asft", n.key).outcome for n in found.numbers}
    assert outcomes == {"quality": "unclear", "forgetting": "worse", "calibration": "worse", "time": "worse", "memory": "worse"}
    assert found.difference("asft", "forgetting").mean == pytest.approx(0.3, abs=0.01)  # lost 0.3 of the general questions, the reference none
    assert "Besides, asft is worse in general questions lost (+30.0 points), worse in calibration error (+20.0 points)" in " ".join(found.verdict)
    assert found.front == ["sft"] and found.beaten["asft"] == ["sft"]


def test_no_difference_says_what_could_have_shown(base, tmp_path):
    values = {"sft": [0.5, 0.6, 0.4], "asft": [0.52, 0.58, 0.41]}
    found = go(base, tmp_path, scores(**values))
    wanted = stats.ttest_rel(values["asft"], values["sft"]).confidence_interval()
    half = f"{100 * (wanted.high - wanted.low) / 2:.1f} points"
    least = f"the smallest that could have shown is {half} in answered rightly (test rows). A smaller one may still be there."
    assert found.verdict[0] == f"No difference can be told apart from chance with 3 seeds; {least}"
    assert "not told apart" in found.text


def test_one_seed_shows_nothing(base, tmp_path):
    found = go(base, tmp_path, scores(sft=[0.1], asft=[0.9]), seeds=1)
    d = found.difference("asft", "quality")
    assert (d.mean, d.low, d.outcome) == (pytest.approx(0.8), None, "too few seeds") and found.verdict[0].startswith("One seed shows nothing")
    assert "+80.0 points" in found.text and "too few seeds" in found.text and not any(d.outcome in ("better", "worse") for d in found.differences)


def test_two_seeds_have_an_interval_and_no_verdict(base, tmp_path):
    found = go(base, tmp_path, scores(sft=[0.1, 0.2], asft=[0.5, 0.6001]), seeds=2)
    d = found.difference("asft", "quality")
    assert d.low > 0 and d.outcome == "too few seeds" and found.verdict[0].startswith("Two seeds show next to nothing")


def test_values_without_spread_have_no_interval(base, tmp_path):
    found = go(base, tmp_path, scores(sft=[0.5, 0.6, 0.7], asft=[0.5, 0.6, 0.7], one_token_rollout=[0.6, 0.7, 0.8]), ("sft", "asft", "one-token-rollout"))
    same, constant = (found.difference(arm, "quality") for arm in ("asft", "one-token-rollout"))
    assert (same.outcome, same.low) == ("same", None) and (constant.outcome, constant.low, constant.mean) == ("constant", None, pytest.approx(0.1))
    assert "chance cannot be judged" in found.verdict[0]
    only = compare(base, {"objective": ["sft", "asft"]}, out=tmp_path / "only", tune=fake(lambda m, s: {}))
    assert only.verdict[0] == "No difference: answered rightly (test rows) is the same in every one of 3 seeds."


def test_missing_numbers_are_missing(base, tmp_path):
    """NaN, null and absent alike: such a seed pairs with nothing and is no zero."""
    broken = {"asft": [float("nan"), 0.7, 0.8], "sft": [0.5, 0.6, 0.65]}
    found = go(base, tmp_path, scores(**broken))
    d = found.difference("asft", "quality")
    assert d.seeds == (1, 2) and d.mean == pytest.approx(0.125) and d.outcome == "too few seeds"
    assert "is known of both for 2 of 3 seeds only" in " ".join(found.verdict)
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["arms"][1]["values"]["quality"] == {"0": None, "1": 0.7, "2": 0.8}
    none = compare(base, {"objective": ["sft", "asft"]}, out=tmp_path / "none", tune=fake(lambda m, s: {"score": None, "kept": None, "ece": None}))
    assert none.verdict == ["Nothing was measured: no run ended, or the recipes have no measures, or there are no test rows."]
    line = next(line for line in none.text.splitlines() if line.startswith("sft "))
    assert line.split()[1:4] == ["-", "-", "-"]


def test_a_number_that_nobody_has_gives_way_to_one_that_is_there():
    def run(**numbers):
        after = {k.replace("__", "/"): v for k, v in numbers.items()}
        return {"error": None, "numbers": {"before": {"forgetting/general_nll": 1.0}, "after": after}, "better": {"mine/depth": "lower"}, "cost": {}}

    found = judge.numbers_of({"a": {0: run(mine__depth=3.0, forgetting__general_nll=1.5)}, "b": {0: run(mine__depth=2.0)}})
    assert (found[0].name, found[0].better) == ("mine/depth", "lower") and found[1].name == "forgetting/general_nll"
    assert found[1].of(run(forgetting__general_nll=1.5)) == 0.5 and found[1].of(run()) is None
    assert judge.difference(found[0], "b", {0: run(mine__depth=2.0), 1: run(mine__depth=2.1)}, {0: run(mine__depth=3.0), 1: run(mine__depth=3.2)}, 1).mean == pytest.approx(-1.05)


def test_no_arm_that_another_beats_in_everything_is_on_the_front(base, tmp_path):
    give = {"sft": {"score": 0.5, "seconds": 10.0}, "asft": {"score": 0.7, "seconds": 20.0}, "one-token-rollout": {"score": 0.6, "seconds": 25.0}}
    found = go(base, tmp_path, lambda m, s: give[m], tuple(give), seeds=2)
    assert found.front == ["sft", "asft"] and found.beaten["one-token-rollout"] == ["asft"]
    starred = {line.split()[0] for line in found.text.splitlines() if line.rstrip().endswith("*")}
    assert starred == {"sft", "asft"}


# -- running, failing, continuing --------------------------------------------------------------------------------------------------


def test_a_failed_arm_is_told_and_the_others_go_on(base, tmp_path):
    def answers(method, seed):
        if method == "asft":
            return ValueError("no such thing")
        return luthier.errors.TrainingError("The loss is <b>not</b> a number.") if method == "sft" and seed == 1 else {"score": 0.5 + seed / 100}

    found = go(base, tmp_path, answers, ("sft", "asft", "one-token-rollout"))
    assert found.failed == {"sft": {1: "The loss is <b>not</b> a number."}, "asft": dict.fromkeys(range(3), "ValueError: no such thing")}
    assert found.difference("one-token-rollout", "quality").seeds == (0, 2) and found.difference("asft", "quality").outcome == "not measured"
    assert "FAILED: asft, seed 2: ValueError: no such thing" in found.text and "2 of 3" in found.text and "asft" not in found.beaten
    assert "asft cannot be compared with sft" in " ".join(found.verdict)
    assert "97.5 %" in " ".join(found.verdict)  # the arm that failed was one of the comparisons


def test_a_finished_run_is_never_done_again_and_a_failed_one_is(base, tmp_path):
    calls, broken = [], True

    def answers(method, seed):
        return KeyboardInterrupt() if broken and (method, seed) == ("sft", 1) else ValueError("broken") if broken and method == "asft" else {}

    options = {"vary": {"objective": ["sft", "asft"]}, "out": tmp_path / "out", "tune": fake(answers, calls)}
    with pytest.raises(KeyboardInterrupt):
        compare(base, **options)
    assert [c[:2] for c in calls] == [("sft", 0), ("asft", 0), ("sft", 1)]
    broken = False
    compare(base, **options)
    assert [c[:2] for c in calls[3:]] == [("asft", 0), ("sft", 1), ("asft", 1), ("sft", 2), ("asft", 2)] and all(c[2] for c in calls)
    compare(base, **options)
    assert len(calls) == 8
    # more arms, and so other names: what is there stays
    found = compare(base, **options | {"vary": {"objective": ["sft", "asft"], "adapt.rank": [2, 4]}})
    assert len(calls) == 14 and [a.name for a in found.arms] == ["sft+rank=2", "sft+rank=4", "asft+rank=2", "asft+rank=4"]
    # other rows: nothing is taken for what it is not
    write_rows(tmp_path / "train.jsonl", rows(PAIRS, 12, 5))
    compare(base, **options)
    assert len(calls) == 20


def test_seeds_added_after_a_look_are_told(base, tmp_path):
    found = go(base, tmp_path, lambda m, s: {}, seeds=2)
    assert not any("Judged before" in n for n in found.notes)
    assert not any("Judged before" in n for n in go(base, tmp_path, lambda m, s: {}, seeds=2).notes)
    assert any(n.startswith("Judged before with seeds 0, 1.") for n in go(base, tmp_path, lambda m, s: {}, seeds=4).notes)
    assert any(n.startswith("Judged before with seeds 0, 1.") for n in go(base, tmp_path, lambda m, s: {}, seeds=4).notes)


# -- what is left, and the command line ----------------------------------------------------------------------------------------------


def test_the_folder_repeats_the_comparison(base, tmp_path, capsys, monkeypatch):
    found = go(base, tmp_path, scores(sft=[0.5, 0.6], asft=[0.6, 0.8]), seeds=2, against="asft")
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {"arms", "runs", "comparison.json", "comparison.txt", "comparison.html"}
    kept = json.loads((out / "comparison.json").read_text())
    assert kept["reference"] == "asft" and kept["front"] == found.front and kept["arms"][0]["runs"]["1"]["numbers"]["after"]["task/exact_match"] == 0.6
    assert (out / "comparison.txt").read_text() == found.text and f"Again: {found.command}" in found.text
    calls = []
    monkeypatch.setattr("luthier._compare.work._apart", lambda request: calls.append(request))
    assert cli.main([*found.command.split()[1:], "--out", str(out), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert calls == [] and again["arms"][0]["name"] == "sft" and again["differences"] == kept["differences"]


def test_the_command_line(base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = fake(lambda m, s: ValueError("broken") if (m, s) == ("asft", 1) else {})
    monkeypatch.setattr("luthier._compare.work._apart", lambda request: work._here(Recipe.from_dict(json.loads(request)["recipe"]), Path(json.loads(request)["run"]), runs))
    name = written(tmp_path, base)
    assert cli.main(["compare", name, "--vary", "objective=sft,asft", "--seeds", "2", "train.batch=2", "--out", "here"]) == 1
    said = capsys.readouterr()
    assert "4 of 4: asft, seed 1: failed: ValueError: broken" in said.out and "FAILED: asft, seed 1" in said.out
    assert said.err == f"1 of 4 runs failed; try these again with: luthier compare {name} train.batch=2 --vary objective=sft,asft --seeds 2 --out here\n"
    assert Recipe.load(tmp_path / "here" / "arms" / "asft.yaml").train.batch == 2
    # files, seeds by name, a reference
    other = written(tmp_path, base | {"objective": "one-token-rollout"}, "b.yaml")
    assert cli.main(["compare", name, other, "--seeds", "4,7", "--against", "b", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["seeds"] == [4, 7] and found["reference"] == "one-token-rollout" and found["folder"].startswith("comparisons/recipe-")
    # a model and data without a recipe
    arguments = ["compare", "--model", base["model"], "--data", "train.jsonl", "--test", "test.jsonl", "--vary", "objective.method=sft,asft", "--seeds", "1", "--out", "plain"]
    assert cli.main(arguments) == 0 and "One seed shows nothing" in capsys.readouterr().out
    assert cli.main(["compare", "--vary", "a=b"]) == 2 and "Name recipes" in capsys.readouterr().err
    assert cli.main(["compare", name, "--seeds", "many"]) == 2 and "--seeds takes" in capsys.readouterr().err


def test_stopping_says_how_to_go_on(base, tmp_path, capsys, monkeypatch):
    def stop(request):
        raise KeyboardInterrupt

    monkeypatch.setattr("luthier._compare.work._apart", stop)
    assert cli.main(["compare", written(tmp_path, base), "--vary", "objective=sft,asft", "--out", str(tmp_path / "o")]) == 130
    assert f"--vary objective=sft,asft --seeds 3 --out {tmp_path / 'o'}" in capsys.readouterr().err


def test_the_module_is_called(base, tmp_path):
    found = luthier.compare(base, vary="objective=sft,asft", seeds=1, out=tmp_path / "out", tune=fake(lambda m, s: {}))
    assert found.folder == tmp_path / "out" and luthier.compare.Comparison is type(found)
