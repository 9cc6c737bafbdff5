import pytest
import torch

from luthier.errors import RecipeError
from luthier.measure.intruder_dimensions import intruder_dimensions
from luthier.merge.scale_intruders import ScaleIntruders

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def planted():
    """A base, and the base with one direction of its own that the base does not have."""
    torch.manual_seed(0)
    base = torch.randn(24, 12)
    u, s, _ = torch.linalg.svd(base, full_matrices=True)
    v = torch.nn.functional.normalize(torch.randn(12), dim=0)
    names = (NAME, "model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.layers.0.norm.weight")
    before = {n: base.clone() for n in names[:3]} | {names[3]: torch.ones(12)}
    tuned = {**before, NAME: base + 3 * s[0] * torch.outer(u[:, -1], v), "lm_head.weight": base + 1, names[3]: 2 * torch.ones(12)}
    return before, tuned


def test_the_planted_direction_shrinks_and_all_else_stays_as_tuned(planted):
    base, tuned = planted
    merged = ScaleIntruders(factor=0.25).merge(base, [tuned])
    u, s, v = torch.linalg.svd(tuned[NAME], full_matrices=False)
    expected = tuned[NAME] - 0.75 * s[0] * torch.outer(u[:, 0], v[0])
    torch.testing.assert_close(merged[NAME], expected, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(merged[n], tuned[n]) for n in tuned if n != NAME)


def test_one_changes_nothing_and_zero_leaves_no_intruder(planted):
    base, tuned = planted
    torch.testing.assert_close(ScaleIntruders(factor=1.0).merge(base, [tuned])[NAME], tuned[NAME], atol=1e-4, rtol=1e-4)
    assert len(intruder_dimensions(base[NAME], ScaleIntruders(factor=0.0).merge(base, [tuned])[NAME])[0]) == 0


def test_bad_input(planted):
    with pytest.raises(RecipeError, match="factor"):
        ScaleIntruders(factor=-1)
    with pytest.raises(RecipeError, match="no base"):
        ScaleIntruders().merge(None, [planted[1]])
