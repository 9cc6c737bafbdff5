"""The mergers against mergekit itself: the same checkpoints and settings give the same weights, or where chance decides the same distribution.

mergekit lives in the environment that `make bench` makes (bench/.peers); without it these tests are skipped."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.peers import FOLDER
from luthier.core.models import save_network
from luthier.merging import merge
from luthier.testing import tiny

PYTHON = FOLDER / "bin" / "python"
HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason=f"mergekit's environment is not there ({FOLDER}); `make bench` makes it."),
]

TUNED, WEIGHTS = ("a", "b", "c"), (1.0, 0.5, 2.0)
DEPTH = [{"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]}, {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]}, {"value": 0.4}]

EQUAL = {
    # name: (mergekit's method, its parameters, does it take a base, parameters of each model; our method, our options)
    "linear": ("linear", {}, False, {"weight": WEIGHTS}, "linear", {"weights": WEIGHTS}),
    "linear-sum": ("linear", {"normalize": False}, False, {"weight": WEIGHTS}, "linear", {"weights": WEIGHTS, "normalise": False}),
    "soup": ("linear", {}, False, {"weight": (1.0, 1.0, 1.0)}, "uniform-soup", {}),
    "arithmetic": ("task_arithmetic", {"lambda": 0.8}, True, {"weight": (0.3, 0.7, -0.2)}, "task-arithmetic", {"weights": (0.3, 0.7, -0.2), "scale": 0.8}),
    "ties": ("ties", {"density": 0.3}, True, {"weight": WEIGHTS}, "ties", {"weights": WEIGHTS, "density": 0.3, "scope": "tensor"}),
    "ties-all": ("ties", {"lambda": 1.5}, True, {"weight": WEIGHTS}, "ties", {"weights": WEIGHTS, "density": 1.0, "scale": 1.5, "scope": "tensor"}),
    "ties-few": ("ties", {"density": 0.004}, True, {"weight": WEIGHTS}, "ties", {"weights": WEIGHTS, "density": 0.004, "scope": "tensor"}),  # vectors keep an entry
    "ties-sum": ("ties", {"density": 0.5, "normalize": False}, True, {"weight": WEIGHTS}, "ties", {"weights": WEIGHTS, "density": 0.5, "scope": "tensor", "combine": "sum"}),
    "breadcrumbs": ("breadcrumbs", {"density": 0.3, "gamma": 0.1}, True, {"weight": WEIGHTS}, "breadcrumbs", {"weights": WEIGHTS, "keep": 0.3, "remove": 0.1, "scale": 1.0}),
    "stock": ("model_stock", {}, True, {}, "model-stock", {}),
    "stock-rows": ("model_stock", {"filter_wise": True}, True, {}, "model-stock", {"filter_wise": True}),
    # with density 1 nothing is dropped, so that what is left is how the updates are combined
    "dare-linear": ("dare_linear", {}, True, {"weight": WEIGHTS}, "dare-linear", {"weights": WEIGHTS, "density": 1.0}),
    "dare-ties": ("dare_ties", {"lambda": 0.7}, True, {"weight": WEIGHTS}, "dare-ties", {"weights": WEIGHTS, "density": 1.0, "scale": 0.7}),
    "dare-ties-mean": ("dare_ties", {"normalize": True}, True, {"weight": WEIGHTS}, "dare-ties", {"weights": WEIGHTS, "density": 1.0, "normalise": True}),
    "della": ("della", {}, True, {"weight": WEIGHTS}, "della", {"weights": WEIGHTS, "density": 1.0}),
    "della-linear": ("della_linear", {"normalize": True}, True, {"weight": WEIGHTS}, "della-linear", {"weights": WEIGHTS, "density": 1.0, "normalise": True}),
}
SLERP = {
    "slerp": ("a", 0.3), "slerp-depth": ("a", [0, 0.5, 0.3, 0.7, 1]), "slerp-filters": ("a", DEPTH),
    "slerp-other": ("other", 0.3), "slerp-other-filters": ("other", DEPTH),
}  # fmt: skip
"""The second model: a fine-tune, nearly parallel to the base, or one that has nothing to do with it."""
CHANCE = {
    "drop": ("dare_linear", {"density": 0.4}, "dare-linear", {"density": 0.4}),
    "drop-density": ("dare_linear", {"density": 0.4, "rescale": False}, "dare-linear", {"density": 0.4, "rescale": "none"}),
    "drop-small": ("della_linear", {"density": 0.5, "epsilon": 0.4}, "della-linear", {"density": 0.5, "epsilon": 0.4}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base, three fine-tunes of it and another model, in fp32."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, seed in (("base", 0), ("other", 1)):
        save_network(tiny.tiny_llama(layers=5, seed=seed), root / name)
    for number, name in enumerate(TUNED):
        save_network(tiny.tiny_llama(layers=5), root / name)
        generator = torch.Generator().manual_seed(number)
        tuned = {n: t + 0.02 * torch.randn(t.shape, generator=generator) for n, t in weights(root / name).items()}
        save_file(tuned, root / name / "model.safetensors", {"format": "pt"})
    return root


@pytest.fixture(scope="module")
def theirs(models):
    """What mergekit makes of all of it, by name."""
    jobs = {}
    for name, (method, shared, based, own, *_) in EQUAL.items():
        listed = [{"model": str(models / m), "parameters": {k: v[i] for k, v in own.items()}} for i, m in enumerate(TUNED)]
        jobs[name] = {"merge_method": method, "parameters": shared, "models": listed} | ({"base_model": str(models / "base")} if based else {})
    for name, (second, t) in SLERP.items():
        listed = [{"model": str(models / m)} for m in ("base", second)]
        jobs[name] = {"merge_method": "slerp", "base_model": str(models / "base"), "parameters": {"t": t}, "models": listed}
    for name, (method, shared, *_) in CHANCE.items():
        jobs[name] = {"merge_method": method, "parameters": shared, "base_model": str(models / "base"), "models": [{"model": str(models / "a"), "parameters": {"weight": 1.0}}]}
    told = json.dumps({str(models / "theirs" / name): job for name, job in jobs.items()})
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([str(PYTHON), str(HERE / "mergekit_side.py")], input=told, text=True, capture_output=True, env=env, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: weights(models / "theirs" / name) for name in jobs}


def weights(folder):
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


def ours(models, tmp_path, listed, how, base, options):
    found = merge([models / m for m in listed], how, tmp_path / "ours", models / base if base else None, {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()})
    return weights(found.folder)


@pytest.mark.parametrize("name", EQUAL)
def test_what_is_computed_is_the_same(models, theirs, tmp_path, name):
    _, _, based, _, how, options = EQUAL[name]
    made = ours(models, tmp_path, TUNED, how, "base" if based else None, options)
    _same(made, theirs[name])


@pytest.mark.parametrize("name", SLERP)
def test_slerp_has_the_same_arcs_gradients_and_filters(models, theirs, tmp_path, name):
    second, t = SLERP[name]
    _same(ours(models, tmp_path, ("base", second), "slerp", None, {"t": t}), theirs[name])


def _same(made, other):
    assert made.keys() == other.keys()
    apart = {n: float((made[n] - other[n]).abs().max()) for n in made}
    assert max(apart.values()) <= 1e-6, sorted(apart.items(), key=lambda x: -x[1])[:3]


@pytest.mark.parametrize("name", CHANCE)
def test_what_chance_drops_has_the_same_distribution(models, theirs, tmp_path, name):
    """How many of the small and of the large entries of every row stay, and what they are multiplied by."""
    *_, how, options = CHANCE[name]
    start, tuned = weights(models / "base"), weights(models / "a")
    seen = [_kept(start, tuned, made) for made in (ours(models, tmp_path, ("a",), how, "base", options), theirs[name])]
    for mine, other in zip(*seen):
        assert mine == pytest.approx(other, abs=0.02)


def _kept(start, tuned, made):
    """(share of the smaller half kept, share of the larger half kept, the mean over tensors of sum |kept| / sum |update|)."""
    low, high, ratio = [], [], []
    for name in start:
        update, change = tuned[name] - start[name], made[name] - start[name]
        rows, stays = (x.reshape(1, -1) if x.ndim < 2 else x for x in (update.abs(), change.abs() > 1e-6))
        upper = rows >= rows.median(1, keepdim=True).values
        low.append(stays[~upper])
        high.append(stays[upper])
        if update.ndim == 2:
            ratio.append(float(change.abs().sum() / update.abs().sum()))
    return [*(float(torch.cat(x).float().mean()) for x in (low, high)), sum(ratio) / len(ratio)]
