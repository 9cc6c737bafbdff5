"""papers.yaml: all 169 papers, each described completely and in the forms that the library relies on."""

import re

import pytest
import yaml

from luthier.catalog import AXES, PACKAGE

PAPERS = yaml.load((PACKAGE / "papers.yaml").read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
KEYS = ["n", "slug", "title", "year", "seeds", "axis", "modality", "methods", "preset", "claim", "idea"]
HYPHENATED = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")

each_paper = pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: f"{paper['n']:03d}-{paper['slug']}")


def test_all_papers_in_order():
    assert [paper["n"] for paper in PAPERS] == list(range(1, 170))


@pytest.mark.parametrize("key", ["slug", "title", "claim", "idea"])
def test_no_two_papers_share(key):
    assert len({paper[key] for paper in PAPERS}) == len(PAPERS)


def test_no_two_papers_share_a_preset():
    presets = [paper["preset"] for paper in PAPERS if paper["preset"]]
    assert len(set(presets)) == len(presets)


@each_paper
def test_fields(paper):
    assert list(paper) == KEYS
    assert HYPHENATED.fullmatch(paper["slug"])
    assert paper["title"].strip()
    assert isinstance(paper["year"], int) and 2010 <= paper["year"] <= 2030
    assert paper["axis"] in AXES
    assert HYPHENATED.fullmatch(paper["modality"])
    assert paper["preset"] is None or HYPHENATED.fullmatch(paper["preset"])
    assert paper["claim"] == f"{paper['n']:03d}_{paper['slug'].replace('-', '_')}"


@each_paper
def test_seeds_stay_strings_with_their_zeros(paper):
    assert paper["seeds"]
    assert all(isinstance(seed, str) and re.fullmatch(r"\d{3}", seed) for seed in paper["seeds"])


@each_paper
def test_methods_are_axis_and_hyphenated_name(paper):
    assert paper["methods"] and len(set(paper["methods"])) == len(paper["methods"])
    for method in paper["methods"]:
        axis, _, name = method.partition("/")
        assert axis in AXES, method
        assert HYPHENATED.fullmatch(name), method


@each_paper
def test_idea_is_one_short_sentence(paper):
    assert 0 < len(paper["idea"].strip()) <= 160
    assert paper["idea"].endswith(".")
