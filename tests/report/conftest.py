"""One small run that the tests of its report share; they change copies of it."""

import pytest

import luthier

RECIPE = {
    "model": "lab:lm-s", "data": {"train": "lab:traces?skills=sort&n=24&seed=3", "test": "lab:traces?skills=sort&n=1&seed=4&test=8", "general": "lab:traces?skills=copy&n=1&seed=5&test=6"},
    "train": {"steps": 3, "batch": 4}, "select": {"method": "random", "budget": 12},
}  # fmt: skip


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card") / "run"
    luthier.tune(RECIPE, run=folder)
    return folder
