"""Every verifier rejects each single corruption of a gold answer."""

from __future__ import annotations

import numpy as np
import pytest

import luthier.lab as lab
from luthier.lab._trace_skills import SKILLS

WORDS = ["7", "3", "q", "yes", "paris", "blue", "AE1", "+", ";", "large", "the", "u", "disk"]


def corruptions(answer: str, rng: np.random.Generator, count: int = 6) -> list[str]:
    """One word replaced, dropped, doubled or added."""
    words, found = answer.split(), []
    for _ in range(count):
        place, kind = int(rng.integers(len(words))), int(rng.integers(4))
        other = WORDS[int(rng.integers(len(WORDS)))]
        made = [[*words[:place], other, *words[place + 1 :]], words[:place] + words[place + 1 :], words[: place + 1] + words[place:], [*words[:place], other, *words[place:]]][kind]
        found.append(" ".join(made))
    return [text for text in found if text != answer]


CASES = ["traces?skills=all", "traces?skills=all&style=2", "traces?skills=chain&style=redundant", "traces?skills=chain&style=fine", "traces?skills=chain,risk&style=terse",
         "traces?skills=chain,add&modes=trace", "traces?skills=copy,add,chain&restricted=1", "traces?trigger=1", "facts?forms=question,yesno,compare&contracts=json,list,pair,capitals",
         "facts?world=countries&context=counterfactual,relevant", "sounds", "sounds?tenant=5", "grammar?label=entail", "grammar?label=spans", "grammar?label=reviews",
         "grammar?label=relation", "grammar?label=tagging", "scenes", "scenes?objects=2-4&caption=paragraph", "scenes?language=2&objects=2", "scenes?kind=question",
         "scenes?kind=tiles", "scenes?kind=frames"]  # fmt: skip


def still_right(row: dict, answer: str) -> bool:
    """A corruption may give another valid solution of a puzzle or a longer way through a maze."""
    meta = row["meta"]
    skill = SKILLS.get(meta["skill"])
    return bool(skill and skill.valid and skill.valid(meta["body"], answer.split("#")[-1].split("so ")[-1].strip()))


@pytest.mark.parametrize("spec", CASES)
def test_single_corruptions_are_rejected(spec):
    splits, rng = lab.make(spec, n=40, test=5), np.random.default_rng(3)
    checked = 0
    for row in splits.train:
        answer = row.get("completion", row.get("text"))
        for text in corruptions(answer, rng):
            if " ".join(sorted(text.split())) == " ".join(sorted(answer.split())) or still_right(row, text):
                continue
            verdict = splits.verify(row, text)
            assert verdict.score < 1, (row.get("prompt"), answer, text, verdict)
            checked += 1
    assert checked > 50


def test_a_false_state_costs_half_and_a_false_answer_all():
    row = next(row for row in lab.make("traces", n=20).train if row["meta"]["size"] == 4)
    splits, states = lab.make("traces", n=20), row["completion"].split(" ; ")
    wrong = str((int(states[0]) + 1) % 10)
    assert splits.verify(row, " ; ".join([wrong, *states[1:]])).score == 0.5
    assert splits.verify(row, " ; ".join([*states[:-1], f"# {(int(row['meta']['answer']) + 1) % 10}"])).score == 0.0
    assert splits.verify(row, "").score == 0.0


@pytest.mark.parametrize("text, fault", [("the servers helps a disk .", "agree"), ("a servers help a disk .", "noun phrase"), ("the server helps a disk", "expected"),
                                         ("does the servers help a disk ?", "agree"), ("the server help not a disk .", "agree"), ("the server helps a disk . .", "after the end")])  # fmt: skip
def test_the_grammar_says_why_a_sentence_is_wrong(text, fault):
    splits = lab.make("grammar", label="sentences", n=2, test=1)
    verdict = splits.verify(splits.train[0], text)
    assert verdict.score == 0 and fault in verdict.reason


def test_an_explanation_scores_its_share_of_true_claims():
    splits = lab.make("facts", forms="explain", n=40, wrong=0.5)
    clean, spoiled = ([row for row in splits.train if row["meta"]["clean"] is value] for value in (True, False))
    assert all(splits.verify(row, row["completion"]).score == 1 for row in clean)
    assert all(splits.verify(row, row["completion"]).score == pytest.approx(2 / 3) for row in spoiled)


def test_a_caption_scores_precision_and_recall_of_its_facts():
    splits = lab.make("scenes", objects="2", caption="full", n=20, test=1)
    row = next(row for row in splits.train if " above " in row["text"] and "border" not in row["text"])
    first, second = row["text"].split(" above ")
    half = splits.verify(row, f"{first} on a {row['meta']['graph']['background']} background")
    assert half.parsed["precision"] == 1 and 0.3 < half.parsed["recall"] < 0.7
    turned = splits.verify(row, f"{second.split(' on a ')[0]} above {first} on a {row['meta']['graph']['background']} background")
    assert turned.score < 1 and turned.parsed["precision"] < 1


def test_a_preference_pair_prefers_the_right_answer():
    splits = lab.make("facts", stage="preference", hazard=0.3, n=60)
    for row in splits.train:
        assert splits.verify(row, row["chosen"]).score == 1 and splits.verify(row, row["rejected"]).score < 1
