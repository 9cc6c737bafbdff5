import numpy as np
import pytest
import torch

from luthier.core.context import Context
from luthier.core.source import TensorSource
from luthier.errors import RecipeError
from luthier.merge._sparsified import combined
from luthier.merge.dare import DareLinear, DareTies, dare
from luthier.merge.task_arithmetic import task_arithmetic


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rescale", ["l1", "density", "none"])
def test_kept_entries_are_those_that_were_drawn_and_rescaled(rescale):
    x, draw = normal(30, 20), torch.rand(30, 20, generator=torch.Generator().manual_seed(1))
    found, mask = dare(x, 0.3, draw, rescale).numpy(), draw.numpy() < 0.3
    kept = np.where(mask, x.numpy(), 0)
    factor = {"l1": np.abs(x.numpy()).sum() / np.abs(kept).sum(), "density": 1 / 0.3, "none": 1.0}[rescale]
    np.testing.assert_allclose(found, factor * kept, rtol=1e-6)


def test_rescaling_keeps_the_expectation_or_the_size():
    x = normal(10, 10)
    draws = torch.rand(4000, 10, 10, generator=torch.Generator().manual_seed(0))
    mean = torch.stack([dare(x, 0.2, d, "density") for d in draws]).mean(0)
    # the mean of 4000 draws has a deviation of |x| sqrt((1 - p) / p / 4000) = 0.032 |x|
    assert float(((mean - x) / x.abs()).abs().max()) < 0.16
    assert all(float(dare(x, 0.2, d, "l1").abs().sum()) == pytest.approx(float(x.abs().sum())) for d in draws[:5])


def test_everything_and_nothing():
    x, draw = normal(6, 6), torch.rand(6, 6)
    for rescale in ("l1", "density", "none"):
        assert torch.equal(dare(x, 1.0, draw, rescale), x) and not dare(x, 0.0, draw, rescale).any()


def signs(deltas, weights, normalise):
    """dare-ties without dropping, entry by entry."""
    out = np.zeros(deltas[0].shape)
    for i in np.ndindex(out.shape):
        values = [(w, w * float(d[i])) for w, d in zip(weights, deltas)]
        sign = 1 if sum(v for _, v in values) >= 0 else -1
        part = [(w, v) for w, v in values if np.sign(v) == sign]
        share = sum(w for w, _ in part)
        out[i] = sum(v for _, v in part) / (share if normalise and share else 1)
    return out


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 2.0, 0.25], [1.0, -0.5, 1.0]])
@pytest.mark.parametrize("normalise", [True, False])
def test_how_updates_are_added_up(weights, normalise):
    deltas = [normal(4, 5, seed=i).numpy().round(1) * (normal(4, 5, seed=10 + i).numpy() > -0.3) for i in range(3)]
    deltas[0][0], deltas[1][0], deltas[2][0] = 1.0, -1.0, 0.0  # opposed, and absent
    sources = [TensorSource.of({"w": torch.from_numpy(d)}) for d in deltas]
    plain = combined(sources, weights, 0.7, False, normalise)["w"].numpy()
    np.testing.assert_allclose(plain, 0.7 * sum(w * d for w, d in zip(weights, deltas)) / (sum(weights) if normalise else 1), atol=1e-9)
    agreed = combined(sources, weights, 0.7, True, normalise)["w"].numpy()
    np.testing.assert_allclose(agreed, 0.7 * signs(deltas, weights, normalise), atol=1e-9)


def test_weights_that_cancel_are_not_divided_by():
    sources = [TensorSource.of({"w": torch.ones(2)}), TensorSource.of({"w": torch.full((2,), 3.0)})]
    assert combined(sources, [1.0, -1.0], normalise=True)["w"].tolist() == [-2.0, -2.0]


def test_density_one_is_task_arithmetic(state, same):
    base, tuned = state(0), [state(1), state(2)]
    same(dict(DareLinear(density=1.0, scale=0.4, weights=[1.0, 0.5]).merge(base, tuned)), dict(task_arithmetic(base, tuned, 0.4, [1.0, 0.5])), rtol=1e-6, atol=1e-6)


def test_masks_go_by_name_seed_and_place(state):
    base, tuned = state(0), state(1)
    first, again = DareLinear(rescale="none").merge(base, [tuned]), DareLinear(rescale="none").merge(base, [tuned])
    backwards = {n: again[n] for n in reversed(list(base))}
    assert all(torch.equal(first[n], backwards[n]) for n in base)
    changed = {n: (first[n] != base[n]).flatten() for n in base if n != "steps"}
    assert not torch.equal(changed["layers.0.mlp.0.weight"], changed["layers.1.mlp.0.weight"])
    assert 0.3 < float(torch.cat(list(changed.values())).float().mean()) < 0.7
    other = DareLinear(rescale="none", seed=1).merge(base, [tuned])
    assert any(not torch.equal(first[n], other[n]) for n in base)
    run = DareLinear(rescale="none").merge(base, [tuned], Context(seed=1))
    assert all(torch.equal(run[n], other[n]) for n in base)
    twice = DareLinear(rescale="none", weights=[1.0, -1.0]).merge(base, [tuned, tuned])
    assert not torch.equal(twice["embed.weight"], base["embed.weight"])  # two models lose different entries


def test_tied_tensors_lose_the_same_entries():
    shared, other = torch.zeros(30), torch.ones(30)
    merged = DareLinear(rescale="none").merge({"embed.weight": shared, "lm_head.weight": shared}, [{"embed.weight": other, "lm_head.weight": other}])
    assert torch.equal(merged["embed.weight"], merged["lm_head.weight"])


def test_lazy(lazily):
    lazily(lambda base, tuned: DareLinear().merge(base, tuned))
    lazily(lambda base, tuned: DareTies(normalise=True).merge(base, tuned))


def test_bad_values(state):
    with pytest.raises(RecipeError, match="`density` of dare-ties is 50"):
        DareTies(density=50)
    with pytest.raises(RecipeError, match="1 entries, but 2 models"):
        DareLinear(weights=[1.0]).merge(state(0), [state(1), state(2)])
