"""`luthier new`: for every axis a file that imports, conforms, and passes ruff. And a user's own file in a recipe."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from luthier.catalog import AXES, method
from luthier.core.models import load
from luthier.errors import UserError
from luthier.recipe import Recipe
from luthier.run import tune
from luthier.testing import check_method, toys
from luthier.testing.skeleton import new

CONFIG = Path(__file__).parent.parent / "pyproject.toml"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("axis", AXES)
def test_a_skeleton_conforms(axis, tmp_path):
    code, test = new(axis, f"my-{axis}", str(tmp_path))
    assert code.name == f"my_{axis}.py" and test.name == f"test_my_{axis}.py"
    cls = method(axis, str(code))
    assert (cls.axis, cls.name) == (axis, f"my-{axis}")
    assert check_method(str(code))


def test_skeletons_are_in_style(tmp_path):
    pytest.importorskip("ruff")
    written = [path for axis in AXES for path in new(axis, f"my-{axis}", str(tmp_path / axis))]
    assert len(written) == 2 * len(AXES)
    for task in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *task, "--config", str(CONFIG), "--no-cache", str(tmp_path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_its_test_passes(tmp_path):
    _, test = new("merge", "my-merge", str(tmp_path))
    space: dict[str, object] = {"__file__": str(test), "__name__": "its_test"}
    exec(compile(test.read_text(), test, "exec"), space)
    space["test_my_merge_conforms"]()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("axis", "name", "words"),
    [
        ("objectiv", "mine", ["no axis 'objectiv'", "objective"]),
        ("objective", "MyLoss", ["lower-case", "MyLoss"]),
        ("objective", "my_loss", ["lower-case"]),
        ("objective", "", ["lower-case"]),
        ("objective", "../mine", ["lower-case"]),
        ("objective", "sft", ["already", "sft"]),
    ],
)
def test_wrong_names_are_refused(axis, name, words, tmp_path):
    with pytest.raises(UserError) as found:
        new(axis, name, str(tmp_path))
    assert all(w in str(found.value) for w in words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("which", [0, 1])
def test_an_existing_file_is_not_overwritten(which, tmp_path):
    paths = new("merge", "my-merge", str(tmp_path))
    paths[which].write_text("mine")
    paths[1 - which].unlink()
    with pytest.raises(UserError, match="exists already"):
        new("merge", "my-merge", str(tmp_path))
    assert paths[which].read_text() == "mine" and not paths[1 - which].exists()


# a user's own file in a recipe ------------------------------------------------------------------------------------------

MINE = '''
from __future__ import annotations

from dataclasses import dataclass

from luthier.catalog import register
from luthier.core.loss import Loss
from luthier.objective import Supervised


@register("focal")
@dataclass
class Focal(Supervised):
    """Weigh a token by how badly it is predicted."""

    gamma: float = 2.0
    """Exponent of 1 - p."""

    default_loss = False

    def loss(self, model, batch, ctx=None) -> Loss:
        logp = model.score(batch).logp
        return Loss().add("focal", -((1 - logp.exp()) ** self.gamma) * logp, per="token")
'''


def written(folder: Path, **objective: object) -> Path:
    (folder / "mine.py").write_text(MINE)
    (folder / "train.jsonl").write_text("\n".join(json.dumps(r) for r in toys.rows(frozenset({"prompt", "completion"}), 8)))
    recipe = {
        "model": str(toys.model_folder("causal-lm")), "data": {"train": "train.jsonl"}, "adapt": {"method": "full"}, "measure": [],
        "objective": {"method": "./mine.py:Focal", **objective}, "optimize": {"method": "sgd", "lr": 0.1}, "train": {"steps": 3, "batch": 4, "device": "cpu"},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def test_an_own_file_runs_in_a_recipe(tmp_path):
    recipe = written(tmp_path, gamma=1.0)
    run = tune(recipe, tmp_path / "run")
    steps = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps] == [1, 2, 3] and all(s["focal"] > 0 for s in steps)
    before, after = (load(folder).network.state_dict() for folder in (toys.model_folder("causal-lm"), run.model_path))
    assert any(not torch.equal(before[n], after[n]) for n in before)
    kept = yaml.safe_load((run.folder / "recipe.yaml").read_text())
    assert kept["objective"]["method"] == f"{tmp_path / 'mine.py'}:Focal" and kept["objective"]["gamma"] == 1.0
    again = tune(run.folder / "recipe.yaml", tmp_path / "again")
    assert all(torch.equal(t, load(again.model_path).network.state_dict()[n]) for n, t in after.items())


def test_an_own_file_passes_the_battery(tmp_path):
    written(tmp_path)
    assert "resumes_exactly" in check_method(f"{tmp_path / 'mine.py'}:Focal", gamma=0.5)


def test_an_own_files_fields_are_checked(tmp_path):
    with pytest.raises(UserError, match="gama.*gamma"):
        tune(written(tmp_path, gama=1.0), tmp_path / "run")
    with pytest.raises(UserError, match=r"no\.py does not exist"):
        Recipe.from_dict({"model": "m", "data": "d.jsonl", "objective": {"method": "./no.py:Focal"}}, base=tmp_path)
