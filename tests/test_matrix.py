"""Pairs of methods at toy size: what runs, what is refused and why; nothing crashes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from luthier.catalog import entries, method, register
from luthier.select import Selector
from luthier.testing.matrix import matrix, pair


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "choices",
    [
        {"adapt": "lora", "objective": "dpo"},
        {"adapt": "full", "objective": "classify"},
        {"objective": "info-nce", "optimize": "sam"},
        {"select": "random", "objective": "grpo"},
        {"adapt": "spiel", "merge": "ties"},
        {"optimize": "galore", "measure": "calibration"},
        {"synthesize": "self-play", "objective": "dpo"},
        {"adapt": "vera", "search": "grid"},
    ],
    ids=lambda c: "+".join(c.values()),
)
def test_runs(choices):
    found = pair({axis: method(axis, name) for axis, name in choices.items()})
    assert found["outcome"] == "runs", found["why"]


def test_two_families_are_refused():
    found = pair({"synthesize": method("synthesize", "self-play"), "objective": method("objective", "classify")})
    assert found["outcome"] == "refused"
    assert "causal-lm" in found["why"] and "text-encoder" in found["why"]


def test_two_that_decide_the_same_are_refused():
    @register("picks-all")
    @dataclass
    class PicksAll(Selector):
        """Gives every row of the batch the same weight."""

        def pick(self, batch, row_scores, ctx=None):
            return torch.ones(len(batch))

    from luthier.objective import Supervised

    @register("also-picks")
    @dataclass
    class AlsoPicks(Supervised):
        """Plain training that chooses its rows itself."""

        def pick(self, batch, row_scores, ctx=None):
            return torch.ones(len(batch))

    assert pair({"select": PicksAll})["outcome"] == "runs"
    found = pair({"select": PicksAll, "objective": AlsoPicks})
    assert found["outcome"] == "refused"
    assert "picks-all" in found["why"] and "also-picks" in found["why"] and "keep one of them" in found["why"]


def test_what_cannot_be_merged_is_refused():
    found = pair({"adapt": method("adapt", "prompt-tuning"), "merge": method("merge", "uniform-soup")})
    assert found["outcome"] == "refused"
    assert "prompt-tuning" in found["why"] and "merge" in found["why"]


def test_a_crash_is_told_apart_from_a_refusal():
    @register("breaks")
    @dataclass
    class Breaks(Selector):
        """Fails as a method with a fault would."""

        def select(self, rows, budget, ctx=None):
            return rows[len(rows) + 1]

    found = pair({"select": Breaks})
    assert found["outcome"] == "crashed" and "IndexError" in found["why"]


def test_the_table_is_limited_to_axes():
    told = []
    found = matrix(("compress", "search"), told.append)
    assert told == found
    assert {(e["a"], e["b"]) for e in found} == {(f"compress/{a.name}", f"search/{b.name}") for a in entries("compress") for b in entries("search")}
    assert all(e["outcome"] in ("runs", "refused") for e in found), found


@pytest.mark.slow
def test_nothing_crashes():
    found = matrix()
    crashed = [f"{e['a']} x {e['b']}: {e['why']}" for e in found if e["outcome"] == "crashed"]
    assert not crashed, "\n".join(crashed)
    assert all(e["why"].rstrip().endswith((".", "!", "?", "`", ")")) for e in found if e["outcome"] == "refused")
    assert sum(e["outcome"] == "runs" for e in found) > len(found) / 2
