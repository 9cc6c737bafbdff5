import numpy as np
import pytest
import torch

from luthier.core.context import Context
from luthier.errors import RecipeError
from luthier.measure.layer_spectra import LayerSpectra, hill, layer_spectra
from tests.helpers import tiny_llama


@pytest.mark.parametrize("alpha", [2.0, 3.0, 4.5])
def test_the_exponent_of_a_pareto_sample_is_found(alpha):
    x = np.random.default_rng(0).pareto(alpha - 1, 40_000) + 1
    assert hill(torch.tensor(x)) == pytest.approx(alpha, rel=0.03)


def test_it_is_blind_to_scale_and_has_no_value_without_a_tail():
    x = torch.rand(200) + 0.1
    assert hill(7 * x) == pytest.approx(hill(x), rel=1e-6)
    assert hill(torch.ones(10)) is None and hill(torch.tensor([1.0, 2.0])) is None


def test_eigenvalues_are_those_of_the_gram_matrix():
    torch.manual_seed(0)
    w = torch.randn(20, 30)
    row = layer_spectra({"model.layers.3.mlp.up_proj.weight": w, "lm_head.weight": w, "model.layers.3.norm.weight": w[0]})
    assert [r["block"] for r in row] == [0]
    values = torch.linalg.eigvalsh(w.double() @ w.double().T)
    assert row[0]["alpha"] == pytest.approx(hill(values), rel=1e-3)
    assert row[0]["largest"] == pytest.approx(float(values.max()), rel=1e-4)
    assert row[0]["stable_rank"] == pytest.approx(float(values.sum() / values.max()), rel=1e-4)


def test_a_planted_heavy_layer_stands_out_and_is_set_against_outliers():
    model, base = tiny_llama(), tiny_llama()
    heavy = model.network.model.layers[1].mlp.up_proj.weight
    u, s, v = torch.linalg.svd(heavy.data, full_matrices=False)
    heavy.data = u @ torch.diag(torch.logspace(2, -2, len(s))) @ v
    rows = [{"prompt": "w1 w2", "completion": "w3"}] * 4
    out = LayerSpectra().measure(model, rows, Context(model, models={"base": base}))
    depths = dict(zip(out.plots["by depth"]["block"], out.plots["by depth"]["alpha"]))
    before = LayerSpectra(samples=0).measure(base, rows)
    assert depths[1] < depths[0] and out.numbers["alpha_moved"] < 0
    assert before.numbers["alpha"] == pytest.approx(out.numbers["alpha"] - out.numbers["alpha_moved"])
    assert 0 <= out.numbers["outlier_ratio"] <= 1 and "outliers by depth" in out.plots and "outlier_ratio" not in before.numbers


def test_bad_settings():
    with pytest.raises(RecipeError, match="share"):
        LayerSpectra(share=1.0)
