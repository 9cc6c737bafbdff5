"""Advice: what is measured is right on rows made to order, recipes run, and nothing is praised without evidence."""

import json
from pathlib import Path

import numpy as np
import pytest

import luthier
from luthier import cli
from luthier.advise import data, propose, reading
from luthier.advise import evidence as known
from luthier.advise import model as models
from luthier.advise.evidence import Evidence
from luthier.advise.probe import Bench, Probe, Short, chosen, compare_rates, compare_sizes, early_dynamics, probe, slope
from luthier.core.context import Context
from luthier.core.models import fingerprint, load
from luthier.core.rows import Rows, load_streams
from luthier.errors import UserError
from luthier.recipe import Recipe, check
from luthier.testing.toys import model_folder

NOISY = "lab:traces?n=150&wrong=0.3"
MESSAGES = [{"messages": [{"role": "user", "content": f"q {i % 3}"}, {"role": "assistant", "content": f"a {i}"}]} for i in range(4)]


def rows(made, **more):
    return Rows(made, source="x.jsonl", kind=Rows.of(made).kind, **more)


def by_name(signals):
    return {s.name: s for s in signals}


@pytest.fixture(scope="module")
def family():
    return load("lab:lm-s")


@pytest.fixture(scope="module")
def look(family):
    """What is seen of noisy rows with general rows beside them."""
    streams = load_streams({"train": NOISY})
    signals = [*data.look(streams["train"]), *reading.read(streams["train"], streams["train"], streams.get("general"), family, Context(family))]
    loaded = {"model": family, "data": {"train": [streams["train"][0]]}}
    return propose.Look({"model": "lab:lm-s", "data": {"train": NOISY}}, loaded, "prompt-completion", models.look(family, streams["train"]), by_name(signals), True)


# -- the rows alone ---------------------------------------------------------------------------------------------------------


def test_repeats_and_conflicts_are_counted():
    made = [{"prompt": "a", "completion": "1"}, {"prompt": "a", "completion": "1", "weight": 2.0}, {"prompt": "a", "completion": "2"}, {"prompt": "b", "completion": "1"}]
    found = by_name(data.look(rows(made)))
    assert found["repeats"].value == 0.25 and "row 2)" in found["repeats"].said
    assert found["conflicting answers"].value == 0.75 and "rows 1, 2, 3" in found["conflicting answers"].said
    assert by_name(data.look(rows(MESSAGES)))["conflicting answers"].value == 0.5


def test_a_conflict_of_preferences_is_a_turned_pair():
    a, b = {"prompt": "p", "chosen": "x", "rejected": "y"}, {"prompt": "p", "chosen": "y", "rejected": "x"}
    assert data.conflicts(rows([a, b, {**a, "rejected": "z"}])).value == pytest.approx(2 / 3)


def test_labels_conflict_and_classes_are_counted_and_cannot_command_the_terminal():
    made = [{"text": t, "label": x} for t, x in (("a", "\x1b[31m"), ("a", "n"), ("b", "n"), ("c", "n"))]
    found = by_name(data.look(rows(made)))
    assert found["conflicting answers"].value == 0.5
    assert (found["classes"].value, found["classes"].facts) == (2, {"largest": 0.75, "rarest": 1})
    assert "\x1b" not in found["classes"].said


def test_what_does_not_apply_is_not_measured():
    found = by_name(data.look(rows([{"anchor": "a", "positive": "b"}])))
    assert all(found[n].value is None and found[n].said.startswith("not measured: ") for n in ("conflicting answers", "classes"))
    images = data.near_repeats(rows([{"image": np.zeros((2, 2), np.uint8), "label": 0}]))
    assert images.value is None


def test_near_texts_are_those_of_a_comparison_of_all_pairs():
    rng = np.random.default_rng(1)
    words = [[f"w{i}" for i in rng.integers(0, 300, 40)] for _ in range(60)]
    for i in range(0, 30, 3):  # near twins: one word of forty is another; and cousins, of which a third is
        words.append([*words[i][:20], "other", *words[i][21:]])
        words.append([w if j % 3 else "cousin" for j, w in enumerate(words[i])])
    sets = [data.pieces(" ".join(w)) for w in words]
    brute = {i for i, a in enumerate(sets) for j, b in enumerate(sets) if i != j and len(a & b) >= data.ALIKE * len(a | b)}
    assert len(brute) == 20 and set(data.near(sets)) == brute


def test_short_texts_are_near_only_if_they_are_equal():
    texts = ["3 + 4 =", "3 - 4 =", "3 + 5 =", "Say  hello", "say hello"]
    assert set(data.near([data.pieces(t) for t in texts])) == {3, 4}


def test_exact_repeats_are_not_near_ones():
    assert data.near_repeats(rows([{"text": "one two three four"}] * 3)).value == 0


# -- what the model makes of them ----------------------------------------------------------------------------------------------


def test_the_vendi_score_of_equal_clusters_is_their_number():
    corners = np.eye(6)  # about their mean six orthogonal directions span five
    assert reading.vendi(np.repeat(corners, 20, 0)) == pytest.approx(5)
    assert reading.vendi(np.outer([1.0, -1.0] * 8, [1.0, 2.0])) == pytest.approx(1)
    assert reading.vendi(np.repeat(corners, 20, 0) + 100) == pytest.approx(5), "a common offset is no likeness"
    few = reading.diversity(np.ones((10, 4)))
    assert few.value is None


def test_turned_labels_are_found_where_neighbours_know_better():
    rng = np.random.default_rng(0)
    true = np.arange(120) % 3
    vectors = 5 * np.eye(3)[true] + rng.normal(0, 0.3, (120, 3))
    wrong = {4, 50, 77}
    made = rows([{"text": str(i), "label": int((t + (i in wrong)) % 3)} for i, t in enumerate(true)])
    found = reading.doubted_labels(made, vectors)
    assert found.value == pytest.approx(3 / 120) and "rows 5, 51, 78)" in found.said
    blind = reading.doubted_labels(made, rng.normal(size=(120, 3)))
    assert blind.value is None and "agree with only" in blind.said


def test_doubts_of_a_model_that_cannot_tell_do_not_count():
    part = rows([{"text": str(i)} for i in range(100)])
    gain = np.ones(100)
    gain[[7, 3]] = -0.5, -2.0
    told = reading._swapped(part, gain)
    assert told.value == 0.02 and "rows 4, 8)" in told.said
    assert reading._swapped(part, np.where(np.arange(100) < 30, -1.0, 1.0)).value is None
    loss = np.full(100, 0.5)
    loss[9] = 4.0
    assert reading._standing_out(part, loss).value == 0.01 and reading._standing_out(part, loss / 5).value == 0, "less than a nat a token is nothing"


def test_wrong_answers_are_doubted_by_a_model_that_knows_the_task(look):
    assert 0.2 < look.value("surprising answers") < 0.4 and look.signals["shift"].facts["given"] > look.signals["shift"].facts["own"]
    assert look.signals["known already"].value == pytest.approx(0.7, abs=0.25)


def test_large_data_is_seen_in_the_same_sample(family):
    made = rows([{"text": str(i)} for i in range(500)])
    part = data.drawn(made, 50)
    assert part.ids.tolist() == data.drawn(made, 50).ids.tolist() and len(part) == 50 and "50 of 500" in data.of_all(part, made)
    assert reading.readable(made, family) == reading.MOST


def test_rows_of_classes_that_the_model_does_not_know_are_read():
    encoder = load(str(model_folder("text-encoder")))
    made = rows([{"text": f"red blue {i}", "label": "yes" if i % 2 else "no"} for i in range(70)])
    found = by_name(reading.read(made, made, None, encoder, Context(encoder)))
    assert found["diversity"].value is not None and found["shift"].value is None and found["tokens"].value > 0


# -- proposing ------------------------------------------------------------------------------------------------------------------


def outcome(**verdicts):
    """Evidence as it might be: a verdict for some papers, none for the others."""
    return lambda slug: Evidence(slug, f"000_{slug}", v := verdicts.get(slug.replace("-", "_")), f"{v or 'no evidence'}: of {slug}")


def test_the_plain_recipe_comes_first_and_all_can_run(look):
    found, _ = propose.propose(look)
    assert found[0].title == "plain LoRA SFT" and 2 <= len(found) <= 3
    for one in found:
        check(Recipe.from_dict(one.recipe.to_dict()))
        assert one.reasons and all(r.source in ("measured", "evidence", "default") for r in one.reasons)
    assert all(any(r.source == "evidence" for r in p.reasons) for p in found[1:])


def test_without_evidence_nothing_is_called_better(look, monkeypatch):
    monkeypatch.setattr(propose, "evidence", outcome())
    found, _ = propose.propose(look)
    assert all("worth a try" in p.title and not p.reproduced for p in found[1:])
    assert all(any("nothing says that it beats" in r.said for r in p.reasons) for p in found[1:])
    made = luthier.advise.Advice([], look.model, Probe(), found, [], [])
    assert made.verdict.endswith("evidence of beating it: plain LoRA SFT.")


def test_what_reproduced_goes_before_what_was_never_tried(look, monkeypatch):
    monkeypatch.setattr(propose, "evidence", outcome(asft="reproduced", clear="unclear"))
    found, _ = propose.propose(look)
    assert found[1].name == "asft" and found[1].reproduced and "worth a try" not in found[1].title
    assert luthier.advise.Advice([], look.model, Probe(), found, [], []).verdict.startswith("asft reproduced here")


def test_what_did_not_reproduce_is_left_out_and_named(look, monkeypatch):
    monkeypatch.setattr(propose, "evidence", outcome(clear="not reproduced", asft="not reproduced"))
    found, left_out = propose.propose(look)
    assert not {"clear", "asft"} & {p.name for p in found}
    assert [line.partition(":")[0] for line in left_out][:2] == ["curate/clear", "objective/asft"]


def test_a_method_that_would_be_the_plain_one_is_not_proposed(look, family, monkeypatch):
    monkeypatch.setattr(propose, "evidence", outcome(adpo="reproduced"))
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}

    def names(**more):
        signals = {**look.signals, "conflicting answers": data.Signal("c", "c", 0.5)}
        seen = propose.Look(look.start, {"model": family, "data": {"train": [{**row, **more}]}}, "preference", look.model, signals)
        return [p.name for p in propose.propose(seen)[0]]

    assert "adpo" not in names() and "adpo" in names(scores=[1.0, 0.0])


def test_rows_without_a_fault_ask_for_no_method(look):
    quiet = {name: data.Signal(name, "-", 300.0 if name == "rows" else 0.0) for name in look.signals}
    found, _ = propose.propose(propose.Look(look.start, look.loaded, look.kind, look.model, quiet))
    assert [p.name for p in found] == ["plain", "another-rate"] and found[1].recipe.optimize[0].build().lr == pytest.approx(8e-4)


def test_long_rows_are_set_aside_and_said(look):
    signals = {**look.signals, "tokens": data.Signal("tokens", "-", 9.0, {"longer": 0.1, "reads": 512})}
    first = propose.plain(propose.Look(look.start, look.loaded, look.kind, look.model, signals))
    assert first.recipe.data.too_long == "skip" and any("10 % of the rows are longer" in r.said for r in first.reasons)


def test_memory_decides_how_weights_are_tuned(look):
    from dataclasses import replace

    tight = replace(look.model, free=int(look.model.lora.memory_bytes * 1.1))
    assert not tight.fits(tight.lora) and not tight.has_room_for_a_copy
    seen = propose.Look(look.start, look.loaded, look.kind, tight, look.signals)
    assert propose.plain(seen).recipe.train.gradient_checkpointing
    small = replace(look.model, adapter=look.model.parameters // 2)
    assert propose.plain(propose.Look(look.start, look.loaded, look.kind, small, look.signals)).recipe.adapt[0].method == "full"


def test_evidence_is_cited_as_it_is_stored(monkeypatch):
    found = {"verdict": "reproduced", "effect": {"mean": 0.1, "low": 0.05, "high": 0.15, "n": 5, "baseline": "sft"}, "metric": "answers", "cost": {"time": 1.5}, "records": [1]}
    monkeypatch.setattr(known, "_stale", lambda claim: False)
    monkeypatch.setattr(known, "evidence_of", lambda paper: found)
    assert known.evidence("asft").said == "reproduced: +0.1 (+0.05 to +0.15, 5 seeds) answers against sft, at 1.5 times its cost (117_asft)"
    monkeypatch.setattr(known, "_stale", lambda claim: True)
    assert "the code has changed since" in known.evidence("asft").said
    monkeypatch.setattr(known, "evidence_of", lambda paper: {"verdict": None, "records": [1]})
    assert known.evidence("asft") == Evidence("asft", "117_asft", None, "no evidence: its claim (117_asft) is not yet run to its end")


# -- short runs -----------------------------------------------------------------------------------------------------------------


def short(lr, *losses, rows=8, gradient=1.0, training=1.0):
    return Short(lr, rows, 4, list(losses), gradient, training)


def test_the_least_rate_within_the_noise_of_the_best_is_taken():
    a, b, c = short(1e-4, 2.0, 2.2, 2.1), short(1e-3, 1.0, 1.6, 1.0), short(1e-2, 1.2, 1.1, 1.1)
    assert chosen([a, b, c]) == (b, c), "0.07 apart, standard error 0.18"
    assert chosen([a, short(1e-3, 1.5, 1.6, 1.5), c])[0] is c
    assert chosen([a, short(1.0)]) == (a, None) and chosen([short(1.0)]) == (None, None)


def test_early_dynamics_prefer_a_low_norm_and_a_high_loss():
    runs = [short(1.0, 1.0, gradient=3.0, training=1.0), short(2.0, 1.0, gradient=1.0, training=2.0), short(3.0, 1.0, gradient=2.0, training=1.5), short(4.0)]
    assert early_dynamics(runs) is runs[1] and early_dynamics(runs[3:]) is None


def test_the_slope_of_a_line_against_log_rows_is_found():
    curve = [short(1.0, *(a - b * np.log2(n) for a, b in ((3.0, 0.2), (2.0, 0.3), (4.0, 0.25))), rows=n) for n in (32, 64, 128)]
    found = slope(curve)
    assert found.mean == pytest.approx(0.25) and 0 < found.low < 0.25 < found.high
    flat = Probe(curve=curve, doubling=slope([short(1.0, 3.0, 2.0, 1.0, rows=n) for n in (32, 64, 128)]))
    assert flat.flat and not Probe(curve=curve, doubling=found).flat


@pytest.fixture(scope="module")
def bench(family):
    streams = load_streams({"train": "lab:traces?n=140&skills=sort"})
    return Bench(family, streams["train"], Recipe.from_dict({"model": "lab:lm-s", "data": "x", "objective": "sft", "train": {"batch": 8}}))


def test_short_runs_leave_the_model_as_it_was_and_choose_a_rate_and_a_slope(bench):
    before = fingerprint(bench.family)
    found, start = Probe(), bench.run(1e-3, 16, 0)
    compare_rates(bench, found, (1e-6, 4e-3), 4, start, lambda: False)
    assert found.lr == 4e-3 and found.runner_up == 1e-6 and [r.steps for r in found.runs] == [4, 4]
    assert found.runs[1].loss < start.loss and 0 < found.runs[1].gradient < 1e3
    compare_sizes(bench, found, 4, start)
    assert [c.rows for c in found.curve] == [8, 16, 32] and found.doubling is not None
    assert fingerprint(bench.family) == before
    json.dumps(found.to_dict(), allow_nan=False)


def test_short_runs_are_judged_by_rows_they_do_not_learn(bench):
    learnt, held = set(bench.rows.contents()), [c for part in bench.parts for c in part.contents()]
    assert held and not learnt & set(held) and len(bench.parts) == 8


def test_a_rate_that_only_harms_is_not_taken(bench):
    found, start = Probe(), bench.run(1e-3, 16, 0)
    compare_rates(bench, found, (50.0,), 2, start, lambda: False)
    assert found.lr is None and found.lines[0][1].startswith("not measured")


def test_too_little_time_or_too_few_rows_is_said(bench, family):
    assert "minutes are too few" in probe(family, bench.rows, bench.recipe, 1e-9).lines[0][1]
    assert "rows are too few" in probe(family, bench.rows.take(range(20)), bench.recipe, 1.0).lines[0][1]


# -- all of it ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Advice on a file, written to a folder."""
    folder = tmp_path_factory.mktemp("advice")
    made = load_streams({"train": NOISY})["train"]
    (folder / "train.jsonl").write_text("".join(json.dumps({"prompt": r["prompt"], "completion": r["completion"]}) + "\n" for r in made))
    return luthier.advise("lab:lm-s", folder / "train.jsonl", folder=folder / "out"), folder


def test_files_are_recipes_that_check_accepts_anywhere(written, monkeypatch, tmp_path, capsys):
    advice, _ = written
    monkeypatch.chdir(tmp_path)
    for one in advice.proposals:
        assert cli.main(["check", one.file]) == 0
        text = Path(one.file).read_text()
        assert text.startswith(f"# {one.title}\n") and f"# - {one.reasons[0].said[:20]}" in text
    assert advice.command == "luthier compare " + " ".join(p.file for p in advice.proposals)
    kept = json.loads((Path(advice.proposals[0].file).parent / "advice.json").read_text())
    assert kept == advice.to_dict() and kept["compare"] == advice.command


def test_written_advice_is_not_overwritten(written):
    _, folder = written
    with pytest.raises(UserError, match="already holds recipes"):
        luthier.advise("lab:lm-s", folder / "train.jsonl", folder=folder / "out")
    with pytest.raises(UserError, match="can only name"):
        luthier.advise("lab:lm-s", MESSAGES, folder=folder / "other")


def test_the_text_says_what_was_measured_and_what_was_not(written):
    from luthier._cli.advise import text

    said = text(written[0])
    assert "1. plain LoRA SFT" in said and "not measured" in said and "[measured]" in said and said.endswith(written[0].command)
    assert written[0].verdict in " ".join(said.split())


@pytest.mark.parametrize(
    ("text", "model", "more", "sentence"),
    [
        ("", "lab:lm-s", [], "holds no rows"),
        ('{"prompt": "a"\n', "lab:lm-s", [], "malformed JSON"),
        ('{"text": "a", "label": "b"}\n', "lab:lm-s", [], "serves"),
        ('{"prompt": "a", "completion": "b"}\n', "./nothing", [], "does not exist"),
        ('{"prompt": "a", "completion": "b"}\n', "lab:lm-s", ["--probe", "0"], "above 0"),
    ],
)
def test_bad_input_is_answered_with_a_sentence(text, model, more, sentence, tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text(text)
    assert cli.main(["advise", "--model", model, "--data", str(tmp_path / "x.jsonl"), *more]) == 2
    assert sentence in capsys.readouterr().err


def test_the_command_prints_json(tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(m) + "\n" for m in MESSAGES))
    assert cli.main(["advise", "--model", "lab:chat", "--data", str(tmp_path / "x.jsonl"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["proposals"][0]["name"] == "plain" and found["signals"]["doubtful answers"]["value"] is None
