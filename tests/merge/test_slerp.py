import numpy as np
import pytest
import torch
from scipy.spatial import geometric_slerp

from luthier.errors import RecipeError
from luthier.merge.slerp import Slerp, factors, slerp


def by_hand(a, b, t):
    """The two coefficients from the angle, in float64."""
    x, y = a.double().numpy().ravel(), b.double().numpy().ravel()
    cosine = x @ y / (np.linalg.norm(x) * np.linalg.norm(y))
    if abs(cosine) > 0.9995:
        return ((1 - t) * x + t * y).reshape(a.shape)
    angle = np.arccos(cosine)
    return ((np.sin((1 - t) * angle) * x + np.sin(t * angle) * y) / np.sin(angle)).reshape(a.shape)


@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 0.83, 1.0])
def test_unit_vectors_go_along_scipys_great_circle(t):
    rng = np.random.default_rng(0)
    a, b = (v / np.linalg.norm(v) for v in rng.normal(size=(2, 9)))
    found = slerp(torch.from_numpy(a), torch.from_numpy(b), t)
    np.testing.assert_allclose(found.numpy(), geometric_slerp(a, b, t), atol=1e-12)
    assert float(found.norm()) == pytest.approx(1.0)


def test_norms_are_not_evened_out_and_ends_are_exact():
    a, b = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), 7 * torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(slerp(a, b, 0.0), a) and torch.equal(slerp(a, b, 1.0), b)
    np.testing.assert_allclose(slerp(a, b, 0.3).numpy(), by_hand(a, b, 0.3), rtol=1e-5)


def test_nearly_parallel_and_opposite_tensors_are_mixed_straight():
    a = torch.randn(40, generator=torch.Generator().manual_seed(0))
    side = torch.randn(40, generator=torch.Generator().manual_seed(1))
    side = (side - (side @ a) / (a @ a) * a) / side.norm() * a.norm()
    for cosine, straight in ((0.9996, True), (0.9990, False), (-0.9996, True), (-0.9990, False), (1.0, True)):
        b = cosine * a + (1 - cosine**2) ** 0.5 * (side / side.norm() * a.norm())
        found = slerp(a, b, 0.25)
        assert torch.allclose(found, 0.75 * a + 0.25 * b, atol=1e-6) == straight
        np.testing.assert_allclose(found.numpy(), by_hand(a, b, 0.25), rtol=2e-3, atol=1e-5)


def test_a_tensor_of_zeros_is_orthogonal_to_anything():
    b = torch.randn(5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(slerp(torch.zeros(5), b, 0.5), b * 0.5**0.5)
    assert not slerp(torch.zeros(5), torch.zeros(5), 0.5).any() and slerp(torch.zeros(0), torch.zeros(0), 0.5).shape == (0,)


def test_one_model_is_mixed_with_the_base_and_two_with_each_other(state):
    base, tuned = state(0), [state(1), state(2)]
    with_base, together = Slerp(t=0.3).merge(base, tuned[:1]), Slerp(t=0.3).merge(base, tuned)
    for n in base:
        if n == "steps":
            assert with_base[n] == together[n] == 0
            continue
        np.testing.assert_allclose(with_base[n].numpy(), by_hand(base[n], tuned[0][n], 0.3), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(together[n].numpy(), by_hand(tuned[0][n], tuned[1][n], 0.3), rtol=1e-4, atol=1e-6)
    kept = Slerp(skip=["layers.1", "norm"]).merge(base, tuned)
    assert torch.equal(kept["layers.1.attn.weight"], base["layers.1.attn.weight"]) and torch.equal(kept["norm.weight"], base["norm.weight"])
    assert torch.equal(Slerp(t=1.0).merge(None, tuned)["embed.weight"], tuned[1]["embed.weight"])


def test_a_gradient_runs_over_depth_and_filters_choose():
    names = ["embed.weight", *(f"model.layers.{i}.{part}.weight" for i in range(9) for part in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm")), "lm_head.weight"]
    rising = factors([0.0, 0.5, 0.3, 0.7, 1.0], names)
    expected = np.interp(np.arange(9) / 8, np.linspace(0, 1, 5), [0.0, 0.5, 0.3, 0.7, 1.0])
    np.testing.assert_allclose([rising[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(9)], expected, atol=1e-12)
    assert rising["embed.weight"] == rising["lm_head.weight"] == 0.0
    paper = [{"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]}, {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]}, {"value": 0.5}]
    both = factors(paper, names)
    np.testing.assert_allclose([both[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(9)], 1 - expected, atol=1e-12)
    np.testing.assert_allclose([both[f"model.layers.{i}.self_attn.q_proj.weight"] for i in range(9)], expected, atol=1e-12)
    assert {both["embed.weight"], both["lm_head.weight"], both["model.layers.4.input_layernorm.weight"]} == {0.5}
    assert factors([0.2, 0.8], ["layers.0.w"])["layers.0.w"] == 0.8  # a single block is the last one


def test_the_gradient_is_used_tensor_by_tensor(state):
    base, tuned = state(0), state(1)
    mixed = Slerp(t=[0.0, 1.0]).merge(base, [tuned])
    assert torch.equal(mixed["layers.0.attn.weight"], base["layers.0.attn.weight"]) and torch.equal(mixed["layers.1.attn.weight"], tuned["layers.1.attn.weight"])
    assert torch.equal(mixed["norm.weight"], base["norm.weight"])


def test_lazy(state, counting):
    base, tuned = counting(state(0)), counting(state(1))
    merged = Slerp().merge(base, [tuned])
    assert not base.read and not tuned.read
    merged["layers.1.attn.bias"]
    assert {*base.read, *tuned.read} == {"layers.1.attn.bias"}


@pytest.mark.parametrize("bad", [1.5, -0.1, "half", True, [], [0.5, 2.0], [{"filter": "mlp"}], [{"value": 0.5, "layer": 3}], [{"value": [{"value": 0.5}]}], [0.5, {"value": 1}]])
def test_bad_t(bad):
    with pytest.raises(RecipeError, match="`t` of slerp is"):
        Slerp(t=bad)


def test_bad_input(state):
    with pytest.raises(RecipeError, match="mixes two models, but 3"):
        Slerp().merge(state(0), [state(1), state(2), state(3)])
    with pytest.raises(RecipeError, match="needs a base"):
        Slerp().merge(None, [state(1)])
    with pytest.raises(RecipeError, match="No filter in `t` of slerp matches the tensor 'embed.weight'"):
        Slerp(t=[{"filter": "layers", "value": 0.5}]).merge(state(0), [state(1)])
