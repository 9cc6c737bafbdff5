"""`luthier new`: for every axis a file that imports, conforms, and passes ruff; and its test runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from luthier.catalog import AXES, method
from luthier.errors import UserError
from luthier.testing import check_method
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
