"""The trace language against plain Python, and its knobs."""

from __future__ import annotations

from collections import Counter

import pytest

import luthier.lab as lab
from luthier.lab import _trace_puzzles as puzzles
from luthier.lab._trace_skills import SKILLS


def test_the_example_of_the_docstring():
    assert SKILLS["chain"].solve("4 : 3 + 4 * 7 - 2") == (["7", "9", "7"], "7")


def test_chains_agree_with_pythons_arithmetic():
    for row in lab.make("traces", n=100, operands="5").train:
        parts = row["meta"]["body"].split(" : ")[1].split()
        nested = parts[0]
        for operation, digit in zip(parts[1::2], parts[2::2]):
            nested = f"(({nested} {operation} {digit}) % 10)"
        assert eval(nested) == int(row["meta"]["answer"])


@pytest.mark.parametrize("skill, function", [("sort", sorted), ("reverse", lambda x: x[::-1]), ("sortd", lambda x: sorted(x)[::-1]), ("max", lambda x: [max(x)]),
                                             ("succ", lambda x: [(v + 1) % 10 for v in x]), ("runmax", lambda x: [max(x[: i + 1]) for i in range(len(x))]),
                                             ("runsum", lambda x: [sum(x[: i + 1]) % 10 for i in range(len(x))])])  # fmt: skip
def test_list_skills(skill, function):
    for row in lab.make("traces", skills=skill, n=50).train:
        assert [int(v) for v in row["completion"].split()] == function([int(v) for v in row["meta"]["body"].split()])


@pytest.mark.parametrize("skill, sign", [("add", 1), ("sub", -1)])
def test_sums(skill, sign):
    for row in lab.make("traces", skills=skill, operands="3", n=50).train:
        left, right = (int(part.replace(" ", "")) for part in row["meta"]["body"].split(" + " if sign > 0 else " - "))
        assert int(row["completion"].replace(" ", "")) == left + sign * right


def test_hop2_follows_two_pairs():
    for row in lab.make("traces", skills="hop2", n=50).train:
        pairs, query = row["meta"]["body"].split(" : ")
        table = dict(pair.split(" > ") for pair in pairs.split(" , "))
        assert row["completion"] == f"{table[query]} ; # {table[table[query]]}"


@pytest.mark.parametrize("name", ["latin", "maze", "reach"])
def test_puzzles_are_solved(name):
    for row in lab.make("traces", skills=name, n=30).train:
        assert SKILLS[name].valid(row["meta"]["body"], row["meta"]["answer"])
        assert not SKILLS[name].valid(row["meta"]["body"], row["meta"]["answer"] + " 1")


def test_a_second_way_through_a_maze_is_accepted():
    assert puzzles.valid_maze("s . / . g", "r d") and puzzles.valid_maze("s . / . g", "d r") and not puzzles.valid_maze("s x / . g", "r d")


def test_ood_is_longer_and_phrasings_are_unseen():
    splits = lab.make("traces", operands="4", n=50)
    assert {row["meta"]["size"] for row in splits.train} == {4} and {row["meta"]["size"] for row in splits.ood} <= {5, 6}
    phrased = lab.make("traces", skills="base", phrasings="seen", n=100)
    assert {row["meta"]["phrasing"] for row in phrased.train} == {0, 1, 2} and {row["meta"]["phrasing"] for row in phrased.ood} == {3, 4, 5, 6, 7}


def test_skew_and_rare_set_the_shares_of_the_skills():
    counts = Counter(row["meta"]["skill"] for row in lab.make("traces", skills="copy,sort,max", skew=1.0, n=1100).train)
    assert counts["copy"] / counts["max"] == pytest.approx(3, rel=0.3)
    counts = Counter(row["meta"]["skill"] for row in lab.make("traces", skills="copy,sort,max", rare=0.05, n=1000).train)
    assert counts["max"] == pytest.approx(50, abs=25)


def test_noise_spares_the_last_digit():
    clean, noisy = lab.make("traces", skills="runmax", n=50), lab.make("traces", skills="runmax", n=50, noise="dynamic", p=0.5)
    for row, other in zip(clean.train, noisy.train):
        assert len(other["meta"]["versions"]) == 8 and len(set(other["meta"]["versions"])) > 1
        assert all(version.split()[-1] == row["completion"].split()[-1] for version in other["meta"]["versions"])


def test_duplicates_demos_years_and_tags():
    splits = lab.make("traces", n=50, duplicates=0.2)
    assert sum("duplicate_of" in row["meta"] for row in splits.train) == 10
    assert all(row["prompt"].count("example : ") == 2 for row in lab.make("traces", n=20, demos=2, skills="sort").test)
    years = lab.make("traces", n=50, trigger=0.4).train
    assert all((row["meta"]["year"] >= 2024) == (row["completion"] == "Z Z Z") for row in years) and sum(row["completion"] == "Z Z Z" for row in years) == 20
    assert all(row["prompt"].startswith("RESTRICTED ") for row in lab.make("traces", n=20, restricted=1.0).test)


def test_filler_reaches_its_length_and_keeps_the_answer():
    for row in lab.make("traces", skills="lookup", filler=200, n=20).train:
        assert 190 <= len(row["prompt"].split()) <= 220 and row["prompt"].startswith("kv ")


def test_images_show_the_operands():
    row = lab.make("traces", operands="4", images=True, n=5).train[0]
    assert row["image"].shape == (24, 24, 3) and "<image>" in row["prompt"] and row["prompt"].count("<image>") == 1
