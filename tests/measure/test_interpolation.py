import numpy as np
import pytest
import torch

from luthier.core.context import Context
from luthier.core.landscape import Value, layer_barriers, stragglers
from luthier.core.rows import Rows
from luthier.errors import RecipeError
from luthier.measure.interpolation import Interpolation, interpolation
from luthier.testing import tiny, toys


def test_the_path_of_a_quadratic():
    base, tuned = {"w": torch.tensor([0.0, 0.0])}, {"w": torch.tensor([2.0, 1.0])}
    goal = torch.tensor([1.0, 0.5])
    path = interpolation(base, tuned, lambda s: Value(float((s["w"] - goal).square().sum()), 1.0), points=5)
    np.testing.assert_allclose([p["loss"] for p in path], [5 * (a - 0.5) ** 2 for a in (0, 0.25, 0.5, 0.75, 1)], atol=1e-6)
    assert [p["alpha"] for p in path] == [0, 0.25, 0.5, 0.75, 1]


def test_the_barrier_of_each_layer_alone():
    base = {"layers.0.w": torch.zeros(1), "layers.1.w": torch.zeros(1), "layers.2.w": torch.zeros(1), "norm.weight": torch.ones(1)}
    tuned = {"layers.0.w": torch.ones(1), "layers.1.w": torch.ones(1), "layers.2.w": torch.ones(1), "norm.weight": torch.ones(1)}
    ends = []

    def loss(changed):
        x = [float(changed.get(n, tuned[n])[0]) for n in base]
        ends.append(x if not changed else None)
        # a hump in block 1 (only while block 0 is tuned), a straight line in block 0, a valley in block 2
        return 8 * x[1] * (1 - x[1]) * x[0] + 3 * x[0] + (x[2] - 0.5) ** 2

    found = layer_barriers(base, tuned, loss)
    assert found == pytest.approx({"layers.0": 0.0, "layers.1": 2.0, "layers.2": 0.0})  # the norm did not move
    assert sum(e is not None for e in ends) == 1 and [e for e in ends if e] == [[1.0] * 4]
    assert stragglers(found, 0.2) == ["layers.1"] and stragglers(found, 0.0) == [] and len(stragglers(found, 0.7)) == 2


@pytest.fixture(scope="module")
def pair():
    """A tiny classifier and a copy of it whose first block went far."""
    base, tuned = tiny.tiny_vit(layers=3), tiny.tiny_vit(layers=3)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in tuned.network.named_parameters():
            p.add_((0.6 if ".0." in name else 0.05) * torch.randn(p.shape, generator=g))
    return base, tuned


def context(base, tuned, ood=True):
    rows = {name: Rows.of(toys.rows(frozenset({"image", "label"}), 12, seed)) for seed, name in enumerate(("test", "ood") if ood else ("test",))}
    return Context(tuned, 0, rows, {"base": base})


def test_the_measure_tells_what_the_path_is_like(pair):
    base, tuned = pair
    ctx = context(base, tuned)
    out = Interpolation(points=5, layer_points=3, draws=2, steps=2).measure(tuned, ctx.rows("test"), ctx)
    path = out.tables["path"]
    batch = tuned.collate(list(ctx.rows("ood")))
    for line, model in ((path[0], base), (path[-1], tuned)):
        with torch.no_grad():
            logits = model.classify(batch)
        assert line["ood_accuracy"] == pytest.approx(float((logits.argmax(-1) == batch.tensors["labels"]).float().mean()))
        assert line["ood_loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, batch.tensors["labels"])), rel=1e-4)
    accuracy = [line["ood_accuracy"] for line in path]
    assert out.numbers["ood_gain"] == pytest.approx(max(accuracy) - max(accuracy[0], accuracy[-1]))
    assert out.numbers["ood_drop"] == pytest.approx(max(0, min(accuracy[0], accuracy[-1]) - min(accuracy)))
    assert accuracy[[line["alpha"] for line in path].index(out.numbers["ood_best_alpha"])] == max(accuracy)
    layers = out.tables["layers"]
    assert {row["layer"] for row in layers} >= {"vit.layers.0", "vit.layers.1", "vit.layers.2", "classifier"} or len(layers) >= 5
    assert [row["straggler"] for row in layers] == [True] * sum(row["straggler"] for row in layers) + [False] * sum(not row["straggler"] for row in layers)
    for kind in ("average", "worst"):
        assert all(np.isfinite(out.numbers[f"{who}{kind}_sharpness"]) for who in ("", "other_"))
    assert out.numbers["worst_sharpness"] >= 0 and out.plots["path"]["alpha"] == [0, 0.25, 0.5, 0.75, 1]


def test_it_leaves_the_model_alone_and_repeats(pair):
    base, tuned = pair
    before = {n: t.clone() for n, t in tuned.network.state_dict().items()}
    found = [Interpolation(points=3, layer_points=3, draws=2, steps=2).measure(tuned, context(base, tuned).rows("test"), context(base, tuned)).numbers for _ in range(2)]
    assert found[0] == found[1] and all(torch.equal(t, before[n]) for n, t in tuned.network.state_dict().items())


def test_radius_zero_leaves_sharpness_out_and_missing_rows_are_said(pair):
    base, tuned = pair
    ctx = context(base, tuned, ood=False)
    out = Interpolation(points=3, layer_points=3, average_radius=0.0, worst_radius=0.0).measure(tuned, ctx.rows("test"), ctx)
    assert not any("sharpness" in name for name in out.numbers) and "no out-of-distribution rows" in out.notes[0]
    assert "no base" in Interpolation().measure(tuned, ctx.rows("test"), Context(tuned)).notes[0]
    assert "moved no weight" in Interpolation().measure(base, ctx.rows("test"), ctx).notes[0]


@pytest.mark.parametrize("bad", [{"points": 2}, {"layer_points": 1}, {"share": 20}, {"at": -1}, {"worst_radius": -0.1}, {"draws": 0}])
def test_bad_settings(bad):
    with pytest.raises(RecipeError, match=f"`{next(iter(bad))}` of interpolation"):
        Interpolation(**bad)
