import pytest
import torch

from luthier.errors import ModelError, RecipeError
from luthier.measure.intruder_dimensions import IntruderDimensions, intruder_dimensions, scale_intruders


@pytest.fixture
def base():
    torch.manual_seed(0)
    return torch.randn(24, 12)


def test_unchanged_and_scaled_weights_have_none(base):
    for tuned in (base, 3 * base):
        found, match = intruder_dimensions(base, tuned)
        assert len(found) == 0 and torch.allclose(match, torch.ones_like(match), atol=1e-5)


def test_a_planted_direction_is_the_one_intruder_and_comes_first(base):
    u0, s0, _ = torch.linalg.svd(base, full_matrices=True)
    outside = u0[:, -1]  # orthogonal to the column space of the base
    v = torch.nn.functional.normalize(torch.randn(12), dim=0)
    found, _ = intruder_dimensions(base, base + 3 * s0[0] * torch.outer(outside, v))
    assert found.tolist() == [0]


def test_another_spectrum_is_no_intruder(base):
    u, s, v = torch.linalg.svd(base, full_matrices=False)
    found, _ = intruder_dimensions(base, u @ torch.diag(s.flip(0) + torch.arange(12.0)) @ v)
    assert len(found) == 0


def test_scaling_by_one_changes_nothing_and_by_zero_removes_it(base):
    u0, s0, _ = torch.linalg.svd(base, full_matrices=True)
    tuned = base + 3 * s0[0] * torch.outer(u0[:, -1], torch.nn.functional.normalize(torch.randn(12), dim=0))
    assert torch.allclose(scale_intruders(base, tuned, 1.0), tuned, atol=1e-4)
    removed = scale_intruders(base, tuned, 0.0)
    assert len(intruder_dimensions(base, removed)[0]) == 0


def test_the_measure_counts_matrices_inside_blocks_only(base):
    u0, s0, _ = torch.linalg.svd(base, full_matrices=True)
    tuned = base + 3 * s0[0] * torch.outer(u0[:, -1], torch.nn.functional.normalize(torch.ones(12), dim=0))
    names = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight")
    after = {names[0]: tuned, names[1]: base.clone(), names[2]: tuned}
    out = IntruderDimensions().compare(dict.fromkeys(names, base), after)
    assert out.numbers["intruders"] == 1 and out.numbers["matrices"] == 1
    assert out.plots["by depth"] == {"block": [0], "intruders": [1]}


def test_bad_settings():
    with pytest.raises(RecipeError, match="epsilon"):
        IntruderDimensions(epsilon=0)


def test_matrices_of_other_shapes_are_named(base):
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(ModelError, match=r"'model.layers.0.mlp.up_proj.weight' is \[24, 12\] in the base and \[20, 12\]"):
        IntruderDimensions().compare({name: base}, {name: base[:20]})
