import json
import random

import numpy as np
import pytest
import torch

from luthier.core import checkpoint
from luthier.errors import TrainingError


def test_nested_state_comes_back_equal(tmp_path):
    state = {
        "a": torch.arange(6).reshape(2, 3).to(torch.bfloat16),
        "b": [np.float64(0.1), None, True, "x", (1, 2.5)],
        "c": {3: np.arange(4), (1, "k"): {"d": torch.tensor(7)}},
        "numpy": np.random.default_rng(3).bit_generator.state,
    }
    path = checkpoint.save(tmp_path, 5, state)
    back = checkpoint.load(path)
    assert torch.equal(back["a"], state["a"]) and back["a"].dtype == torch.bfloat16
    assert back["b"] == [0.1, None, True, "x", (1, 2.5)]
    assert np.array_equal(back["c"][3], np.arange(4)) and back["c"][(1, "k")]["d"] == 7
    assert back["numpy"] == state["numpy"]


def test_random_states_continue(tmp_path):
    path = checkpoint.save(tmp_path, 0, checkpoint.rng_state())
    wanted = torch.rand(3), np.random.rand(3), random.random()
    checkpoint.set_rng_state(checkpoint.load(path))
    assert torch.equal(torch.rand(3), wanted[0])
    assert np.array_equal(np.random.rand(3), wanted[1])
    assert random.random() == wanted[2]


def test_keeps_the_newest_and_ignores_half_written_ones(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, {"step": step}, keep=2)
    (tmp_path / ".writing-00000004").mkdir()
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000002", "step-00000003"]
    assert checkpoint.load(checkpoint.latest(tmp_path))["step"] == 3


def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_stays(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, {"x": torch.ones(2)})

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(TrainingError, match="disk is full.*step-00000001, is intact"):
        checkpoint.save(tmp_path, 2, {"x": torch.ones(2)})
    assert json.loads((tmp_path / "step-00000001" / "state.json").read_text())
    assert not list(tmp_path.glob(".writing*"))


def test_foreign_objects_are_refused():
    with pytest.raises(TypeError, match="cannot be checkpointed"):
        checkpoint.pack({"x": object()}, {})
