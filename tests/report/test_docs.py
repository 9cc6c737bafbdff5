"""What the hand-written pages show: every recipe is valid and runs, every command is understood, every script does what it says."""

import argparse
import json
import re
import shlex
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import yaml

from luthier.catalog import AXES, PACKAGE
from luthier.cli import _parsed
from luthier.recipe import KEYS, LISTS, Recipe, check
from luthier.report import atlas_scale

ROOT = PACKAGE.parent
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language):
    """(name, text) of every block of a language."""
    found = []
    for file in FILES:
        parts = re.split(r"^```(\w*)\n", file.read_text(encoding="utf-8") + "\n", flags=re.MULTILINE)
        # outside, opening word, inside, closing fence, outside ...
        found += [(f"{file.name}:{i // 4}", parts[i + 1].rstrip("\n")) for i in range(1, len(parts) - 1, 4) if parts[i] == language]
    return found


def shown_recipes(complete):
    """Recipes with a model, or parts of one."""
    found = [(name, yaml.load(text.replace("...", "x"), _Numbers)) for name, text in blocks("yaml")]
    return [pytest.param(r, id=name) for name, r in found if isinstance(r, dict) and set(r) & set(KEYS) and ("model" in r) == complete]


class _Numbers(yaml.SafeLoader):
    """2e-4 is a number, as in recipes."""


_Numbers.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Numbers.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def tiny(recipe, folder):
    """The recipe on a tiny model and a few rows, with one measure where it names none; all that it decides stays."""
    data = recipe.get("data", {})
    data = data if isinstance(data, dict) else {"train": data}
    columns = data.get("columns", {})
    rows = [{columns.get(k, k): v for k, v in (("prompt", f"sort {9 - i} {i}"), ("completion", str(i)))} for i in range(8)]
    made = dict(data)
    for stream in [s for s in data if isinstance(data[s], str) and data[s].endswith(".jsonl")] or ["train"]:
        file = folder / f"{stream}.jsonl"
        file.write_text("".join(json.dumps(r) + "\n" for r in rows[: 8 if stream == "train" else 2]))
        made[stream] = str(file)
    model = recipe.get("model", "")
    model = {**model, "id": "lab:lm-s"} if isinstance(model, dict) else "lab:lm-s"
    smaller = {"train": {**recipe.get("train", {}), "steps": 1, "batch": 2, "device": "cpu", "save_every": 0}, "measure": recipe.get("measure", ["task"]), "run": str(folder / "run")}
    return {**recipe, "model": model, "data": made, **smaller, **({"space": {k: v[:1] for k, v in recipe["space"].items()}} if "space" in recipe else {})}


@pytest.mark.parametrize("recipe", shown_recipes(complete=True))
def test_a_recipe_that_is_shown_is_valid_and_runs(recipe, tmp_path):
    from luthier.run import tune

    made = Recipe.from_dict(tiny(recipe, tmp_path))
    check(made)
    done = tune(made)
    assert (done.model_path / "config.json").is_file() or (done.model_path / "adapter_config.json").is_file()


@pytest.mark.parametrize("recipe", shown_recipes(complete=False))
def test_a_part_of_a_recipe_that_is_shown_is_valid(recipe, tmp_path):
    check(Recipe.from_dict(tiny(recipe, tmp_path)))


def test_there_are_recipes_in_the_readme_and_the_pages():
    names = [p.id for p in shown_recipes(complete=True)]
    assert {n.split(":")[0] for n in names} >= {"README.md", "index.md", "recipes.md", "scale.md"}


# -- commands and scripts ------------------------------------------------------------------------------------------------


def commands():
    for language in ("console", "bash", ""):
        for name, text in blocks(language):
            for line in text.replace("\\\n", " ").splitlines():
                words = shlex.split(line.split(" &")[0], comments=True)
                at = next((i for i, w in enumerate(words) if w.rpartition("/")[2] == "luthier"), None)
                if at is not None and all("=" in w for w in words[:at]):
                    yield pytest.param(words[at + 1 :], id=f"{name} {' '.join(words[at + 1 :])[:40]}")


@pytest.mark.parametrize("words", list(commands()))
def test_a_command_that_is_shown_is_understood(words):
    assert isinstance(_parsed(words), argparse.Namespace)


@pytest.mark.parametrize("text", [pytest.param(t, id=n) for n, t in blocks("python")])
def test_python_that_is_shown_is_python(text):
    compile(text, "shown", "exec")


def test_targets_of_make_that_are_named_are_there():
    targets = re.findall(r"^([\w.]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = {word for f in FILES for word in re.findall(r"(?:^|`)make (\w+)", f.read_text(encoding="utf-8"), re.MULTILINE)}
    assert named and named <= set(targets)


def test_every_page_is_in_the_navigation():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(v for entry in nav for v in entry.values()) == sorted(f.name for f in (ROOT / "docs").glob("*.md"))


def test_the_script_that_chooses_from_files_chooses_as_the_method_does(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from luthier import method

    rng = np.random.default_rng(0)
    rows = [{"prompt": f"p{i}", "completion": f"c{i}", "tags": sorted(set(map(int, rng.integers(0, 9, 3)))), "quality": float(rng.random())} for i in range(60)]
    for i in (0, 1):
        pq.write_table(pa.Table.from_pylist(rows[30 * i : 30 * i + 30]), tmp_path / f"{i}.parquet", row_group_size=7)
    script = next(text for name, text in blocks("python") if name.startswith("scale.md"))
    (tmp_path / "choose.py").write_text(script)
    subprocess.run([sys.executable, "choose.py", "10", "out.jsonl", "0.parquet", "1.parquet"], cwd=tmp_path, check=True, env={"PYTHONPATH": str(ROOT)})
    chosen = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    expected = sorted(method("select", "mig")(tags="tags", quality="quality").select(rows, 10).indices)
    assert chosen == [{c: rows[i][c] for c in ("prompt", "completion")} for i in expected]


# -- the arithmetic of large runs ----------------------------------------------------------------------------------------


def test_a_model_that_is_not_loaded_is_counted_as_one_that_is():
    from luthier.core.estimate import estimate
    from luthier.testing.tiny import tiny_llama

    loaded = tiny_llama(vocab=48, hidden=32, layers=3)
    config = loaded.network.config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    counted = atlas_scale.shapeless("fp32", **{n: getattr(config, n) for n in names})
    parts = [estimate(f, [], 4, 1, tokens_per_row=16, measure=False).parts for f in (loaded, counted)]
    assert parts[0] == parts[1]


def test_seven_billion_parameters_weigh_what_is_known_of_them():
    (_, full), (_, half), (_, lora) = atlas_scale._plans()
    assert full.parts["gradients"] == 4 * 6_738_415_616 and half.parts["gradients"] == 2 * 6_738_415_616
    assert full.parts["optimizer"] == 2 * full.parts["gradients"]
    # rank 16 beside q, k, v, o (4096 x 4096) and gate, up, down (4096 x 11008) of 32 layers
    assert lora.parts["gradients"] == 2 * 32 * 16 * (4 * 2 * 4096 + 3 * (4096 + 11008))


def test_processes_that_share_hold_an_even_part_of_what_can_be_shared():
    (_, full), *_ = atlas_scale._plans()
    own = full.parts["activations"] + full.parts["logits"]
    assert full.over(1, sharded=True).memory_bytes == full.memory_bytes
    assert full.over(8, sharded=True).memory_bytes == pytest.approx((full.memory_bytes - own) / 8 + own)
    assert full.over(8, sharded=False).memory_bytes == full.memory_bytes


def test_optimizer_states_are_of_the_weights_type():
    """The table counts two numbers of the weight's own type for AdamW."""
    import torch

    from luthier import method
    from luthier.core.plugin import Group

    weight = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = method("optimize", "adamw")().build([Group("body", {"w": weight})])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    states = [v for v in optimizer.state[weight].values() if torch.is_tensor(v) and v.ndim]
    assert len(states) == 2 and all(s.dtype == torch.bfloat16 for s in states)


def test_time_falls_with_processes_and_rises_with_tokens():
    one = atlas_scale.training_seconds(1e9, 1e6, rate=1e12, recomputed=False)
    assert one == pytest.approx(6e3)
    assert atlas_scale.training_seconds(1e9, 2e6, 4, 1e12, False) == pytest.approx(one / 2)


def test_migs_memory_is_what_the_arithmetic_says():
    from scipy import sparse

    from luthier.select.mig import mig

    rows, each = 200_000, 5
    rng = np.random.default_rng(0)
    tags = np.minimum(rng.zipf(1.3, rows * each), 5000).astype(np.int32) - 1
    incidence = sparse.csr_matrix((np.ones(rows * each, np.int8), tags, np.arange(0, rows * each + 1, each)), shape=(rows, 5000))
    tracemalloc.start()
    mig(incidence, rng.random(rows), 200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.4 < peak / atlas_scale.selection(rows, tags=each).pool < 1.2


def test_axes_that_take_lists_say_so():
    from luthier.report.atlas_methods import axes

    parts = dict(zip(AXES, re.split(r"^## ", axes(), flags=re.MULTILINE)[1:]))
    assert all(("A list may name several" in parts[a]) == (a in LISTS) for a in AXES)
