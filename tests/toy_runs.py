"""Tiny runs for end-to-end tests: rows as files, recipes as dicts, weights to compare."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from luthier.testing.toys import model_folder, rows

ROOT = Path(__file__).parents[1]
PAIRS, TEXTS = frozenset({"prompt", "completion"}), frozenset({"text"})
TRAIN = {"steps": 4, "batch": 4, "seed": 0, "device": "cpu", "warmup": 0, "save_every": 2}


def write_rows(path: Path, made: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in made))
    return path


def recipe(folder: Path, family: str = "causal-lm", columns: frozenset[str] = PAIRS, n: int = 12, **changes: Any) -> dict[str, Any]:
    """A recipe over files in `folder`; `train` is joined with the toy settings, other keys replace."""
    gc.freeze()  # a run ends with a garbage collection, which need not look through all imported libraries a hundred times
    write_rows(folder / "train.jsonl", rows(columns, n))
    write_rows(folder / "test.jsonl", rows(columns, 4, 1))
    made = {
        "model": str(model_folder(family)), "data": {"train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl")},
        "adapt": {"method": "lora", "rank": 2, "targets": ["q_proj", "v_proj"]} if family == "causal-lm" else "full", "optimize": {"method": "adamw", "lr": 1e-2}, "measure": [],
    }  # fmt: skip
    return made | changes | {"train": TRAIN | changes.get("train", {})}


def written(folder: Path, made: dict[str, Any], name: str = "recipe.yaml") -> str:
    (folder / name).write_text(yaml.safe_dump(made, sort_keys=False))
    return str(folder / name)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a run's model."""
    return {k: v for f in sorted((folder / "model").glob("*.safetensors")) for k, v in load_file(f).items()}


def same_weights(a: Path, b: Path) -> bool:
    """Bit for bit."""
    x, y = weights(a), weights(b)
    return bool(x) and x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def python(*arguments: str, cwd: Path | None = None, threads: str = "1") -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd or ROOT, env=env, timeout=300)


def attempts(folder: Path, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What became of each command; see tests/killed.py."""
    (folder / "jobs.json").write_text(json.dumps([{**job, "log": str(folder / f"job{i}")} for i, job in enumerate(jobs)]))
    done = python("-m", "tests.killed", str(folder / "jobs.json"))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
