"""RoSTE: rotations change nothing without rounding, are chosen to the least error, and the result runs as it was trained."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch

from luthier.compress.roste import RoSTE, deployed, load_packed, roste
from luthier.core.context import Context
from luthier.core.rows import Rows
from luthier.errors import RecipeError
from luthier.recipe import Recipe
from luthier.run import tune
from luthier.testing import toys
from luthier.testing.tiny import tiny_llama

ROWS = toys.rows(frozenset({"prompt", "completion"}), 6)


def context(model, **more):
    return Context(model, 0, {"train": Rows.of(ROWS)}, **more)


def logp(model):
    with model.evaluating():
        return model.score(model.collate(ROWS)).logp


def with_outliers(model, factor=30.0):
    """The same function with two large channels before the first block's down projection: rows of up times a factor, columns of down over it."""
    mlp = model.network.model.layers[0].mlp
    with torch.no_grad():
        mlp.up_proj.weight[3:5] *= factor
        mlp.down_proj.weight[:, 3:5] /= factor
    return model


# the choice -----------------------------------------------------------------------------------------------------------------
def test_the_choice_has_the_least_error_of_all():
    rng = np.random.default_rng(0)
    for _ in range(20):
        sites = {f"s{i}": tuple(tuple(rng.uniform(0, 1, 2)) for _ in range(2)) for i in range(4)}
        shared = tuple(rng.uniform(0, 2, 2))
        every = {(r, *own): shared[r] + sum(s[r][h] for s, h in zip(sites.values(), own)) for r in (0, 1) for own in itertools.product((0, 1), repeat=4)}
        chosen, error = roste(shared, sites)
        assert error == pytest.approx(min(every.values())) and every[tuple(int(v) for v in chosen.values())] == pytest.approx(error)
        assert error <= min(roste(shared, sites, "none")[1], roste(shared, sites, "all")[1]) + 1e-12
        assert set(roste(shared, sites, "all")[0].values()) == {True} and set(roste(shared, sites, "none")[0].values()) == {False}


# the network ----------------------------------------------------------------------------------------------------------------
def test_without_rounding_no_choice_of_rotations_changes_the_model():
    model = tiny_llama(num_key_value_heads=2, tie_word_embeddings=True)
    before, method = logp(model), RoSTE(rotate="none", calibration=4)
    method.attach(model, context(model))
    net = method._net
    net.rounding(False)
    rng = np.random.default_rng(0)
    for _ in range(4):
        net.turn({name: bool(rng.integers(2)) for name in net.chosen})
        torch.testing.assert_close(logp(model), before, atol=1e-4, rtol=1e-4)
    net.rounding(True)
    assert not torch.allclose(logp(model), before, atol=1e-2)


def test_the_error_is_that_of_the_turned_weights():
    """What is predicted for a choice of rotations is what rounding the folded weights gives."""
    from luthier.core.quant import rounding_error

    model = tiny_llama()
    method = RoSTE(rotate="none", activations=0, cache=0, calibration=4)
    method.attach(model, context(model))
    shared, sites = method._net.errors(model, method._rows)
    rng = np.random.default_rng(1)
    for _ in range(3):
        chosen = {name: bool(rng.integers(2)) for name in method._net.chosen}
        method._net.turn(chosen)
        r = chosen["residual"]
        predicted = shared[r] + sum(s[r][chosen[name]] for name, s in sites.items())
        assert sum(rounding_error(m.weight, 4) for m in method._net.layers.values()) == pytest.approx(predicted, rel=1e-3)


def test_the_error_of_activations_is_that_of_the_turned_network():
    """What is predicted from one pass without rotations is what layers and cache then see, row by row without padding."""
    from luthier.core.quant import rounding_error

    model = tiny_llama(num_key_value_heads=2)
    method = RoSTE(rotate="none", weights=0, calibration=6)
    method.attach(model, context(model))
    net = method._net
    shared, sites = net.errors(model, method._rows)
    net.rounding(False)
    chosen = {name: i % 3 > 0 for i, name in enumerate(net.chosen)}
    net.turn(chosen)
    predicted = shared[chosen["residual"]] + sum(s[chosen["residual"]][chosen[name]] for name, s in sites.items())
    found = [0.0]

    def turned(site, x, clip):
        found[0] += rounding_error(site.rotation(x) if site.rotation is not None else x, 4, clip)

    for layer in net.layers.values():
        layer.register_forward_pre_hook(lambda m, a: turned(m.site, a[0], method.activation_clip))
    for site in net.caches:
        site.watch = lambda key, value, site=site: (turned(site, key, method.cache_clip), found.append(rounding_error(value, 4, method.cache_clip)))
    with torch.no_grad():
        for sequence in model.collate(ROWS).sequences:
            model.network(input_ids=torch.from_numpy(sequence.ids)[None])
    assert sum(found) / len(ROWS) == pytest.approx(predicted, rel=1e-3)


def test_what_has_outliers_is_rotated():
    found = {}
    for name, model in (("plain", tiny_llama()), ("outliers", with_outliers(tiny_llama()))):
        method = RoSTE(calibration=4, rotate="none")
        method.attach(model, context(model))
        shared, sites = method._net.errors(model, method._rows)
        chosen, error = roste(shared, sites)
        found[name] = sites["down.0"][0][1] / sites["down.0"][0][0]
        assert error <= min(method.report["error_none"], method.report["error_all"]) * (1 + 1e-9)
        assert name == "plain" or chosen["down.0"]
    assert found["outliers"] < 0.7 * found["plain"]


def test_gradients_pass_straight_through_to_all_trained_weights():
    model = tiny_llama(tie_word_embeddings=True)
    method = RoSTE(calibration=4)
    parts = method.attach(model, context(model))
    assert [(g.role, g.active) for g in parts.groups] == [("norm", False), ("head", True)]
    model.network.requires_grad_(True)
    (-model.score(model.collate(ROWS)).logp.mean()).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for n, p in model.network.named_parameters() if "norm" not in n)


# the result -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rotate", ["all", "adaptive", "none"])
def test_what_is_written_runs_as_it_was_trained(tmp_path, rotate):
    from luthier.core.models import load, save_network

    model, method = tiny_llama(tie_word_embeddings=True), RoSTE(rotate=rotate, calibration=4)
    ctx = context(model, folder=tmp_path)
    method.attach(model, ctx)
    trained, net = logp(model), method._net
    weights = {n: m.weight.detach().clone() for n, m in net.layers.items()}
    method.compress(model, ctx)
    assert type(model.network.model.layers[0].mlp.down_proj) is torch.nn.Linear
    save_network(model, tmp_path / "model")
    torch.testing.assert_close(logp(deployed(load(str(tmp_path / "model")))), trained, atol=2e-3, rtol=2e-3)

    packed = load_packed(tmp_path / "roste.safetensors")
    from luthier.core.quant import fake_quant

    for name, weight in weights.items():
        torch.testing.assert_close(packed[f"{name}.weight"], fake_quant(weight, 4), atol=1e-6, rtol=1e-5)
        assert all(len(row.unique()) <= 16 for row in packed[f"{name}.weight"])
    assert method.report["file_bytes"] == (tmp_path / "roste.safetensors").stat().st_size
    assert method.report["bytes_after"] <= method.report["file_bytes"] < method.report["bytes_before"]
    with pytest.raises(RecipeError, match="not made by"):
        deployed(tiny_llama())


def test_a_model_is_rounded_without_training_and_stays_untouched():
    model = tiny_llama()
    before = logp(model)
    lighter = RoSTE(calibration=4, rotate="none", activations=0, cache=0).compress(model, context(model))
    assert torch.equal(logp(model), before) and not torch.allclose(logp(lighter), before, atol=1e-3)
    for name, module in lighter.network.named_modules():
        if name.endswith("proj"):
            assert all(len(row.unique()) <= 16 for row in module.weight)


def recipe(folder, **roste_fields):
    plan = toys.recipe({"adapt": "full"}, "causal-lm", folder)
    plan["compress"] = [{"method": "roste", "calibration": 4, **roste_fields}]
    plan["train"] |= {"steps": 4, "save_every": 2}
    return plan


def test_a_run_chooses_again_and_resumes_exactly(tmp_path):
    import shutil

    from safetensors.torch import load_file

    from luthier.core.checkpoint import replace_text

    done = tune(Recipe.from_dict(recipe(tmp_path / "a", times=3)))
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["stages"][0]["compress"][0]["ratio"] > 1
    shutil.copytree(done.folder, tmp_path / "b")
    for left in ("done", "report.json", "report.txt"):
        (tmp_path / "b" / left).unlink(missing_ok=True)
    shutil.rmtree(tmp_path / "b" / "model")
    replace_text(tmp_path / "b" / "checkpoints" / "latest", "step-00000002")
    again = tune(Recipe.from_dict(recipe(tmp_path / "b", times=3)), resume=True)
    first, second = (load_file(next(run.model_path.glob("*.safetensors"))) for run in (done, again))
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_bad_values_and_partners_are_refused(tmp_path):
    for bad in ({"weights": 1}, {"activations": 9}, {"cache": 2.5}, {"weight_clip": 0.0}, {"rotate": "some"}, {"times": 0}):
        with pytest.raises(RecipeError, match=next(iter(bad))):
            RoSTE(**bad)
    from luthier.recipe import check

    with pytest.raises(RecipeError, match="adapt: full"):
        check(Recipe.from_dict(recipe(tmp_path) | {"adapt": {"method": "lora"}}))
    with pytest.raises(RecipeError, match="merge in a stage before"):
        check(Recipe.from_dict(recipe(tmp_path) | {"merge": {"method": "lines"}}))
    with pytest.raises(RecipeError, match="freeze"):
        check(Recipe.from_dict(recipe(tmp_path, times=2) | {"adapt": {"method": "full", "freeze": ["embed"]}}))
