"""PV-Tuning's coded network: gradients of codebooks, what trains with which optimizer, and what is stored."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from luthier.compress.pv_tuning import PVTuning, load_packed
from luthier.core.checkpoint import replace_text
from luthier.core.context import Context
from luthier.core.plugin import Step
from luthier.core.rows import Rows
from luthier.errors import ModelError, RecipeError
from luthier.recipe import Recipe, check
from luthier.run import tune
from luthier.testing import toys
from luthier.testing.tiny import tiny_llama

ROWS = toys.rows(frozenset({"prompt", "completion"}), 6)
SMALL = {"group": 4, "codes": 8, "codebooks": 1}


def logp(model):
    with model.evaluating():
        return model.score(model.collate(ROWS)).logp


def test_codebook_gradients_are_those_of_the_loss():
    """By finite differences of the loss in a codebook entry and in a scale."""
    model, method = tiny_llama(), PVTuning(**SMALL)
    ctx = Context(model, 0, {"train": Rows.of(ROWS)})
    parts = method.attach(model, ctx)
    model.network.double()
    parts.modules["pv_tuning"].double()
    loss = lambda: -model.score(model.collate(ROWS)).logp.mean()  # noqa: E731
    model.network.requires_grad_(True)
    loss().backward()
    method.after_backward(Step(0, 0, model, parts.groups, torch.optim.SGD([torch.zeros(1)])), ctx)
    layer, quant = method._layers["model.layers.1.mlp.down_proj"]
    assert layer.weight.grad is None, "an optimizer that cannot move codes is not shown the weights' gradient"
    for param, at in ((quant.codebooks, (0, 2, 1)), (quant.scales, (5, 0))):
        with torch.no_grad():
            values = []
            for step in (5e-3, -1e-2):
                param[at] += step
                method._decode()
                values.append(float(loss()))
            param[at] += 5e-3
            method._decode()
        assert float(param.grad[at]) == pytest.approx((values[0] - values[1]) / 1e-2, rel=2e-2, abs=1e-4)


def test_more_bits_are_nearer_to_the_model_and_all_are_counted(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    wanted, found = logp(model), {}
    for name, fields in {"one": SMALL, "two": {**SMALL, "codebooks": 2}, "many": {**SMALL, "codes": 64, "codebooks": 2}}.items():
        method = PVTuning(**fields, file=f"{name}.safetensors")
        lighter = method.compress(model, Context(model, 0, {}, folder=tmp_path))
        found[name] = float((logp(lighter) - wanted).abs().mean())
        unpacked = load_packed(tmp_path / f"{name}.safetensors")
        state = lighter.network.state_dict()
        assert set(unpacked) == set(state) - {"lm_head.weight"}
        for key, tensor in unpacked.items():
            torch.testing.assert_close(tensor.float(), state[key], atol=5e-3, rtol=5e-3)
        report = method.report
        assert report["file_bytes"] == (tmp_path / f"{name}.safetensors").stat().st_size >= report["bytes_after"] and report["ratio"] > 1
        layers = [m for n, m in lighter.network.named_modules() if n.endswith("_proj")]
        assert report["layers"] == len(layers) == 14
        stored = sum(len(codes_of(fields)) * m.weight.numel() // 4 * (fields["codes"].bit_length() - 1) + 16 * (fields["codebooks"] * fields["codes"] * 4 + len(m.weight)) for m in layers)
        assert report["bits_per_weight"] == pytest.approx(stored / sum(m.weight.numel() for m in layers))
    assert found["one"] > found["two"] > found["many"]


def codes_of(fields):
    return range(fields["codebooks"])


def test_layers_that_cannot_be_grouped_are_told():
    model = tiny_llama(intermediate_size=66)
    ctx = Context(model)
    PVTuning(**SMALL).attach(model, ctx)
    assert any("2 of 14 layers" in n for n in ctx.notices)
    with pytest.raises(ModelError, match="multiple of `group: 5`"):
        PVTuning(group=5).attach(tiny_llama(), Context())


def recipe(folder, optimizer):
    plan = toys.recipe({"adapt": "full"}, "causal-lm", folder)
    plan |= {"compress": [{"method": "pv-tuning", **SMALL}], "optimize": optimizer}
    plan["train"] |= {"steps": 4, "save_every": 2}
    return plan


def codes(run):
    file = load_file(next(run.folder.rglob("pv_tuning.safetensors")))
    return {n: t for n, t in file.items() if n.endswith((".codes", ".codebooks"))}


def test_codes_move_with_their_own_optimizer_only_and_a_cut_run_resumes(tmp_path):
    pv = {"method": "pv-tuning", "lr": 1e-2, "code_lr": 3.0, "max_change": 0.2}
    still = tune(Recipe.from_dict(recipe(tmp_path / "adamw", {"method": "adamw", "lr": 1e-2})))
    moved = tune(Recipe.from_dict(recipe(tmp_path / "pv", pv)))
    begun = tune(Recipe.from_dict(recipe(tmp_path / "start", {"method": "sgd", "lr": 1e-12})))
    a, b, c = codes(begun), codes(still), codes(moved)
    assert all(torch.equal(a[n], b[n]) for n in a if n.endswith(".codes")) and any(not torch.equal(a[n], b[n]) for n in a if n.endswith(".codebooks"))
    assert any(not torch.equal(a[n], c[n]) for n in a if n.endswith(".codes"))
    lines = [json.loads(line) for line in next(moved.folder.rglob("metrics.jsonl")).read_text().splitlines()]
    shares = [line["pv/codes_changed"] for line in lines if "pv/codes_changed" in line]
    assert max(shares) > 0 and max(shares) <= 0.25
    weights = load_file(next(moved.model_path.glob("*.safetensors")))
    stored = load_packed(next(moved.folder.rglob("pv_tuning.safetensors")))
    for n, t in weights.items():
        torch.testing.assert_close(stored[n].float(), t, atol=2e-2, rtol=5e-3)
    shutil.copytree(moved.folder, tmp_path / "cut")
    for left in ("done", "report.json", "report.txt"):
        (tmp_path / "cut" / left).unlink(missing_ok=True)
    shutil.rmtree(tmp_path / "cut" / "model")
    replace_text(tmp_path / "cut" / "checkpoints" / "latest", "step-00000002")
    again = tune(Recipe.from_dict(recipe(tmp_path / "cut", pv)), resume=True)
    other = load_file(next(again.model_path.glob("*.safetensors")))
    assert all(torch.equal(weights[n], other[n]) for n in weights)


def test_bad_values_and_partners_are_refused(tmp_path):
    for bad in ({"group": 0}, {"codes": 1}, {"codes": 100000}, {"codebooks": 0}):
        with pytest.raises(RecipeError, match=next(iter(bad))):
            PVTuning(**bad)
    with pytest.raises(RecipeError, match="adapt: full"):
        check(Recipe.from_dict(recipe(tmp_path, {"method": "adamw"}) | {"adapt": {"method": "lora"}}))
