import pytest
import torch

from luthier.core.context import Context
from luthier.core.rows import Rows
from luthier.errors import RecipeError
from luthier.measure.portability import Portability, portability, subspace_overlap
from luthier.testing import tiny, toys


def square(seed, rank=8, d=8):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(d, rank, generator=g) @ torch.randn(rank, d, generator=g)


def named(x):
    return {"model.layers.0.mlp.up_proj.weight": x}


def test_a_patch_that_comes_out_the_same_has_no_residual():
    old, moved, patch = square(0), square(1, 2), square(2, 2)
    found = portability(named(old), named(old + moved), named(old + patch), named(old + moved + patch))
    assert found.numbers["residual_over_naive"] == pytest.approx(0, abs=1e-6) and found.numbers["cosine_of_patches"] == pytest.approx(1)
    assert found.numbers["cosine_to_evolution"] == pytest.approx(float((moved * patch).sum() / moved.norm() / patch.norm()), abs=1e-5)


def test_norms_by_hand():
    old, moved, ours, theirs = square(0), square(1), square(2), square(3)
    found = portability(named(old), named(old + moved), named(old + ours), named(old + moved + theirs), rank=2)
    n = found.numbers
    assert n["residual_over_naive"] == pytest.approx(float((theirs - ours).norm() / (moved + ours).norm()), rel=1e-5)
    assert n["residual_over_patch"] == pytest.approx(float((theirs - ours).norm() / ours.norm()), rel=1e-5)
    spectral = torch.linalg.matrix_norm(theirs - ours, 2) / torch.linalg.matrix_norm(moved + ours, 2)
    assert n["spectral_over_naive"] == pytest.approx(float(spectral), rel=1e-5)
    assert n["evolution"] == pytest.approx(float(moved.norm()), rel=1e-5) and len(found.tables["by matrix"]) == 1


def test_the_naive_update_and_the_residual_make_the_retrained_model():
    """With squared loss and orthogonal features of evolution and task, the residual is 0: a linear model's own algebra."""
    task, drift = torch.zeros(20, 4), torch.zeros(20, 4)
    task[:, :2], drift[:, 2:] = torch.randn(20, 2, generator=torch.Generator().manual_seed(0)), torch.randn(20, 2, generator=torch.Generator().manual_seed(1))
    goal = torch.randn(20, 3, generator=torch.Generator().manual_seed(2))

    def fitted(start, x, y):
        return start + torch.linalg.pinv(x) @ (y - x @ start)

    old = torch.randn(4, 3, generator=torch.Generator().manual_seed(3))
    new = fitted(old, drift, goal)
    found = portability(named(old), named(new), named(fitted(old, task, goal)), named(fitted(new, task, goal)), rank=2)
    assert found.numbers["residual_over_patch"] == pytest.approx(0, abs=1e-5)
    assert found.numbers["evolution"] > 0.1 and found.numbers["cosine_to_evolution"] == pytest.approx(0, abs=1e-6)
    assert found.numbers["overlap"] == pytest.approx(0, abs=1e-5)


def test_subspaces():
    eye = torch.eye(6)
    assert subspace_overlap(eye[:, :2] @ eye[:2], eye[:, :2] @ eye[:2], 2) == pytest.approx(1)
    assert subspace_overlap(eye[:, :2] @ eye[:2], eye[:, 2:4] @ eye[2:4], 2) == pytest.approx(0, abs=1e-6)


def test_scores_are_those_of_the_ported_model():
    old, new, patched, tuned = (tiny.tiny_llama(seed=s) for s in range(4))
    rows = Rows.of(toys.rows(frozenset({"prompt", "completion"}), 5))
    before = {n: t.clone() for n, t in new.network.state_dict().items()}
    found = Portability().measure(tuned, rows, Context(tuned, models={"base": new, "old": old, "patched": patched}))
    ported = tiny.tiny_llama()
    o, p = old.network.state_dict(), patched.network.state_dict()
    ported.network.load_state_dict({n: before[n] + p[n] - o[n] for n in before})
    batch = ported.collate(list(rows))
    for name, model in (("ported_score", ported), ("new_base_score", new), ("retrained_score", tuned)):
        assert found.numbers[name] == pytest.approx(model.score(batch).logp.mean().item(), rel=1e-4)
    assert all(torch.equal(t, before[n]) for n, t in new.network.state_dict().items())


def test_what_is_missing_is_said_and_bad_input_refused():
    model = tiny.tiny_llama()
    assert "no base" in Portability().measure(model, None, None).notes[0]
    assert "models: {old: MODEL}" in Portability().measure(model, None, Context(model, models={"base": model})).notes[0]
    with pytest.raises(RecipeError, match="rank >= 1"):
        Portability(rank=0)
    same = portability(*[named(torch.ones(3, 3))] * 4)
    assert same.numbers["residual_over_naive"] is None and same.tables["by matrix"] == []
