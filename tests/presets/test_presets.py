import pytest
import yaml

from luthier.recipe import PRESETS, Recipe, check
from luthier.run import tune
from luthier.testing.toys import model_folder, rows

ALL = sorted(p.stem.replace("_", "-") for p in PRESETS.glob("*.yaml"))


def recipe_of(name, tmp_path):
    raw = yaml.safe_load((PRESETS / f"{name.replace('-', '_')}.yaml").read_text())
    data = {n: rows(frozenset({"prompt", "completion"}), k, i) for i, (n, k) in enumerate((("train", 8), ("test", 4)))}
    return {**raw, "model": str(model_folder("causal-lm")), "data": data, "measure": [], "run": str(tmp_path / "run")}


@pytest.mark.parametrize("name", ALL)
def test_every_preset_is_a_recipe_that_nothing_speaks_against(name, tmp_path):
    recipe = Recipe.from_dict(recipe_of(name, tmp_path))
    assert isinstance(check(recipe), list) and recipe.stage_list()


def test_spin_plays_against_the_round_before(tmp_path):
    raw = recipe_of("spin", tmp_path)
    loop = raw["stages"][0]["loop"]
    loop["times"] = 2
    stage = loop["stages"][0]
    stage["synthesize"] |= {"max_new_tokens": 4}
    stage["train"] |= {"epochs": 1, "batch": 4, "save_every": 0}
    run = tune(Recipe.from_dict(raw))
    folders = sorted(p.name for p in (run.folder / "stages").iterdir())
    assert len(folders) == 2 and run.model_path.is_dir()
    import json

    metrics = [json.loads(line) for line in next((run.folder / "stages").glob("*-00")).joinpath("metrics.jsonl").read_text().splitlines()]
    # in its first step the policy is the opponent itself, so the loss is log 2
    assert metrics[0]["loss"] == pytest.approx(0.6931, abs=1e-3)


def test_clear_filters_tunes_corrects_and_tunes_again(tmp_path):
    raw = recipe_of("clear", tmp_path)
    raw["train"] = {"epochs": 1, "batch": 4, "save_every": 0}
    options = {"samples": 1, "max_new_tokens": 3, "reflection": "none"}
    raw["stages"][0]["curate"][0] |= {"measure_options": options}
    raw["stages"][1]["curate"][0] |= {"samples": 1, "max_new_tokens": 3}
    run = tune(Recipe.from_dict(raw))
    import json

    facts = json.loads((run.folder / "report.json").read_text())["stages"]
    assert facts[0]["rows"][-1]["step"] == "curate clear" and facts[0]["rows"][-1]["rows"] <= 4
    assert facts[1]["rows"][0]["rows"] == 8 and "replaced" in facts[1]["rows"][-1]["report"]
