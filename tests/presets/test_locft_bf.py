"""The preset searches for the place of the edits, then edits there."""

from __future__ import annotations

import json

import torch
import yaml

from luthier.core.source import TensorSource
from luthier.recipe import PRESETS, Recipe
from luthier.run import tune
from luthier.testing.toys import model_folder, rows


def test_it_searches_a_place_and_edits_one_matrix(tmp_path):
    raw = yaml.safe_load((PRESETS / "locft_bf.yaml").read_text())
    raw["train"] |= {"epochs": 1, "batch": 4, "save_every": 0}
    raw["measure"] = [{"method": "task", "max_new_tokens": 3}, {"method": "forgetting", "max_new_tokens": 3}]
    raw["space"] = {"adapt.block": [0.1, 0.9]}
    columns = frozenset({"prompt", "completion"})
    data = {name: rows(columns, 4, i) for i, name in enumerate(("train", "val", "test", "general"))}
    run = tune(Recipe.from_dict({**raw, "model": str(model_folder("causal-lm")), "data": data, "run": str(tmp_path / "run")}))
    assert json.loads((run.folder / "factorial.json").read_text())["effects"]
    base, tuned = TensorSource.of(model_folder("causal-lm")), TensorSource.of(run.model_path)
    moved = [n for n in base if not torch.equal(base[n], tuned[n])]
    assert len(moved) == 1 and moved[0].endswith("mlp.down_proj.weight")
