"""The tree of stages: its order, what each switch is worth, and paths that are left."""

from __future__ import annotations

import json

import pytest

from luthier.core.context import Context
from luthier.errors import RecipeError
from luthier.search.stage_tree import StageTree, stage_tree

CPT, SFT, DPO, ORPO = ({"name": n} for n in ("cpt", "sft", "dpo", "orpo"))
SPACE = {"stages": [[CPT], [CPT, SFT], [CPT, SFT, DPO], [CPT, SFT, ORPO]], "model": ["base", "instruct"], "merge": [None, {"method": "slerp"}]}
WORTH = {"cpt": 1.0, "sft": 2.0, "dpo": 0.5, "orpo": -0.25}


def trial(point):
    names = [s["name"] for s in point["stages"]]
    value = sum(WORTH[n] for n in names) + 4.0 * (point["model"] == "instruct") + 0.125 * (point["merge"] is not None) * len(names)
    return {"good": value + 0.01 * point.get("train.seed", 0) * ("dpo" in names), "task/nll": -value}


def effects(found):
    return {(e["switch"], e["choice"]): e for e in found[0]["effects"]}


def test_every_switch_is_worth_what_it_adds(tmp_path):
    asked = []

    def counted(point):
        asked.append(point)
        return trial(point)

    found = StageTree(score={"good": 1.0}, seeds=[0, 1, 2]).search(SPACE, counted, Context(folder=tmp_path))
    assert len(asked) == 48 and len(found) == 16
    told = effects(found)
    assert told["stages", "+ sft"]["effect"] == pytest.approx(2.0 + 0.125 / 2) and told["stages", "+ sft"]["pairs"] == 4
    assert told["stages", "+ dpo"]["effect"] == pytest.approx(0.5 + 0.125 / 2 + 0.01)
    assert told["stages", "+ dpo"]["low"] < told["stages", "+ dpo"]["effect"] < told["stages", "+ dpo"]["high"]
    assert told["model", "instruct"]["effect"] == pytest.approx(4.0) and told["model", "instruct"]["pairs"] == 8
    assert told["merge", "slerp"]["effect"] == pytest.approx(0.125 * (1 + 2 + 3 + 3) / 4)
    assert ("stages", "+ cpt") not in told, "nothing stands before the first stage"
    best = found[0]
    assert (best["stages"], best["model"], best["merge"]) == ([CPT, SFT, DPO], "instruct", {"method": "slerp"})
    assert json.loads((tmp_path / "stage-tree.json").read_text())["nodes"][0]["effects"] == best["effects"]


def test_parents_come_first_and_plain_nodes_before_merged_ones():
    asked = []
    StageTree().search(SPACE, lambda p: asked.append(p) or trial(p))
    for i, node in enumerate(asked):
        parent = {**node, "stages": node["stages"][:-1]}
        assert len(node["stages"]) == 1 or parent in asked[:i]
        assert node["merge"] is None or {**node, "merge": None} in asked[:i]


def test_a_path_that_does_not_gain_is_left():
    space = {"stages": [[CPT], [CPT, ORPO], [CPT, ORPO, SFT], [CPT, ORPO, SFT, DPO], [CPT, SFT]]}
    asked = []

    def counted(point):
        asked.append([s["name"] for s in point["stages"]])
        return trial({**point, "model": "base", "merge": None})

    StageTree(patience=0.0).search(space, counted)
    assert ["cpt", "orpo"] in asked and ["cpt", "sft"] in asked and not any(len(a) > 2 for a in asked)


def test_one_seed_has_no_interval():
    nodes = [{"stages": [CPT]}, {"stages": [CPT, SFT]}]
    assert stage_tree(nodes, [[1.0, 3.0]]) == [{"switch": "stages", "choice": "+ sft", "effect": 2.0, "low": None, "high": None, "pairs": 1}]


def test_bad_input():
    with pytest.raises(RecipeError, match="more than search.limit"):
        StageTree(limit=15).search(SPACE, trial)
    with pytest.raises(RecipeError, match="Did you mean 'good'"):
        StageTree(score={"goood": 1}).search(SPACE, trial)
    for bad in ({"seeds": [1, 1]}, {"score": {}}, {"limit": 0}):
        with pytest.raises(RecipeError, match=next(iter(bad))):
            StageTree(**bad)
