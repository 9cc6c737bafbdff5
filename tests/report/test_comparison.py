"""A comparison's page: whole in one file, escaped, readable without script, and with every number that there is."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from luthier._compare import judge
from luthier._compare.arms import Arm
from luthier.compare import Comparison
from luthier.recipe import Recipe
from luthier.report.comparison import page

NASTY = '<img src=x onerror="alert(1)">'


def run(score, kept=0.9, ece=0.1, seconds=10.0, memory=2.0**30):
    after = {"task/exact_match": score, "forgetting/general_score": kept, "calibration/ece": ece}
    better = {"task/exact_match": "higher", "forgetting/general_score": "higher", "calibration/ece": "lower"}
    cost = {"train_seconds": seconds, "peak_memory": memory, "seconds": 2 * seconds, "steps": 4.0, "rows": 12.0, "tokens": 99.0, "parameters": None}
    return {"error": None, "numbers": {"before": {"forgetting/general_score": 0.9}, "after": after}, "better": better, "cost": cost, "run": "r"}


def comparison(runs, unequal=(), **differs):
    seeds = sorted({s for by_seed in runs.values() for s in by_seed})
    recipe = Recipe.from_dict({"model": "lab:lm-s", "data": "lab:traces"})
    arms = [Arm(recipe, name=name, differs=differs.get(name.replace("-", "_"), {"objective": name})) for name in runs]
    numbers = judge.numbers_of(runs)
    found = judge.differences(numbers, runs, arms[0].name)
    said = judge.verdict(numbers, found, runs, arms[0].name, seeds)
    return Comparison(Path("out"), arms, arms[0].name, seeds, runs, numbers, found, judge.beaten(numbers, runs), list(unequal), said, ["A note."])


@pytest.fixture
def three():
    better = {s: run(0.7 + s / 100, kept=0.7 - s / 50, seconds=20.0 + s) for s in range(3)}
    return comparison({"sft": {s: run(0.5 + s / 90) for s in range(3)}, "asft": better, "odd": {0: run(0.5), 1: {"error": NASTY}, 2: run(None)}}, ["unequal steps: sft 4, asft 8."])


class Outline(HTMLParser):
    """Tags, ids and texts; every tag must be closed in order."""

    EMPTY = {"meta", "link", "line", "rect", "circle", "path", "polyline", "br", "input"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.said = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.said.append(data)

    def of(self, tag, **wanted):
        return [a for t, a in self.tags if t == tag and all(a.get(k.rstrip("_")) == v for k, v in wanted.items())]


def test_the_page_is_one_whole_file_without_strangers(three):
    text = page(three)
    found = Outline(text)
    assert not re.search(r'(?:src|href)="(?!#|data:)', text) and "http" not in re.sub(r"http-equiv", "", text)
    assert found.of("html", lang="en") and found.of("meta", name="viewport") and len(found.of("h1")) == 1
    assert all(a.get("aria-label") for a in found.of("svg", role="img"))


def test_what_comes_from_runs_and_recipes_is_escaped():
    name = NASTY
    runs = {"sft": {0: run(0.5), 1: run(0.6)}, name: {0: run(0.6), 1: {"error": NASTY}}}
    text = page(comparison(runs, [f"unequal steps: {NASTY}"], sft={"objective": NASTY}))
    assert "<img" not in text and text.count("&lt;img src=x onerror=") > 6
    Outline(text)


def test_every_pair_of_numbers_can_be_looked_at(three):
    found = Outline(page(three))
    planes, buttons = found.of("div", class_="plane"), [a["value"] for a in found.of("button") if "value" in a]
    assert [p["data-is"] for p in planes] == buttons and len(buttons) == 10 and buttons[0] == "quality-forgetting"
    assert not any("hidden" in p for p in planes)  # without script all are there
    assert found.of("div", class_="filters")[0]["data-of"] == ".plane"


def test_the_first_plane_has_means_whiskers_and_seeds(three):
    first = re.search(r'data-is="quality-forgetting">(.*?)</figure>', page(three), re.S)[1]
    assert first.count('class="whisker thin') == 3  # sft upwards, as it forgets alike with every seed; asft across and upwards; of odd there is one seed and two alike
    assert len(re.findall(r'r="2.2"|width="4.4"|2.64 ', first)) >= 2 and "sft" in first and "asft" in first


def test_numbers_that_nobody_measured_are_dashes_and_no_axis():
    runs = {name: {s: run(0.5 + s / 10 + d, kept=None, ece=None, memory=None) for s in range(2)} for name, d in (("sft", 0.0), ("asft", 0.1))}
    found = Outline(page(comparison(runs)))
    assert [a["value"] for a in found.of("button") if "value" in a] == ["quality-time"]
    assert found.said.count("-") >= 6


def test_the_page_says_what_the_text_says(three):
    said = " ".join(Outline(page(three)).said)
    assert all(sentence in said for sentence in (*three.verdict, *three.unequal, *three.notes))
    assert f"Failed: odd, seed 1: {NASTY}" in said and three.command in said and "2 of 3" in said
    quality = three.difference("asft", "quality")
    assert quality.outcome == "better" and f"{judge.interval(three.numbers[0], quality)} better" in said
    assert judge.shortest(three.numbers[0], quality.smallest) in said and "unbeaten" in said


def test_nothing_at_all_is_still_a_page():
    failed = {0: {"error": "No rows."}}
    text = page(comparison({"sft": failed, "asft": failed}))
    assert "Nothing was measured" in text and "No rows." in text and "nan" not in text
    Outline(text)
