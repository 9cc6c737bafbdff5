import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss

from luthier.core.at_weights import at_weights
from luthier.core.landscape import (
    Landscape,
    average_sharpness,
    barrier,
    between,
    collated,
    layers,
    noise,
    worst_sharpness,
)
from luthier.core.rows import Rows
from luthier.core.source import TensorSource
from luthier.errors import ModelError
from luthier.testing import tiny, toys


@pytest.fixture(scope="module")
def vit():
    model = tiny.tiny_vit()
    return model, collated(model, Rows.of(toys.rows(frozenset({"image", "label"}), 10)), size=4)


def weights(model, seed):
    g = torch.Generator().manual_seed(seed)
    return {n: t + 0.1 * torch.randn(t.shape, generator=g) for n, t in model.network.state_dict().items()}


def test_other_weights_are_in_place_inside_and_the_own_ones_afterwards(vit):
    model, batches = vit
    before = {n: t.clone() for n, t in model.network.state_dict().items()}
    places = {n: t.data_ptr() for n, t in model.network.state_dict().items()}
    other, outer = weights(model, 1), Landscape(model, batches).loss()
    with at_weights(model.network, other, statistics=True):
        assert all(torch.equal(t, other[n]) for n, t in model.network.state_dict().items())
        with pytest.raises(ZeroDivisionError), at_weights(model.network, {"classifier.bias": torch.ones(3)}, statistics=True):
            assert model.network.classifier.bias.tolist() == [1, 1, 1]
            raise ZeroDivisionError
        assert torch.equal(model.network.classifier.bias, other["classifier.bias"])
    assert all(torch.equal(t, before[n]) and t.data_ptr() == places[n] for n, t in model.network.state_dict().items())
    assert Landscape(model, batches).loss() == outer
    for bad in ({"nothing": torch.ones(3)}, {"classifier.bias": torch.ones(4)}):
        with pytest.raises(ModelError), at_weights(model.network, {"classifier.weight": torch.zeros(3, 32), **bad}, statistics=True):
            pass
    assert torch.equal(model.network.classifier.weight, before["classifier.weight"])


def test_the_loss_of_classes_is_sklearns(vit):
    model, batches = vit
    other = weights(model, 1)
    with at_weights(model.network, other, statistics=True), torch.no_grad():
        logits = torch.cat([model.classify(b) for b in batches])
    labels = torch.cat([b.tensors["labels"] for b in batches]).numpy()
    found = Landscape(model, batches).value(other)
    assert found.loss == pytest.approx(log_loss(labels, logits.softmax(-1).numpy(), labels=[0, 1, 2]), rel=1e-5)
    assert found.accuracy == pytest.approx(accuracy_score(labels, logits.argmax(-1)))
    unit = logits / logits.norm(dim=-1, keepdim=True)
    assert Landscape(model, batches, unit_logits=True).loss(other) == pytest.approx(log_loss(labels, unit.softmax(-1).numpy(), labels=[0, 1, 2]), rel=1e-5)


def test_language_models_and_pairs_have_losses_too():
    lm, clip = tiny.tiny_llama(), tiny.tiny_clip()
    batches = collated(lm, Rows.of(toys.rows(frozenset({"prompt", "completion"}), 5)), size=3)
    logp = torch.cat([lm.score(b).logp.detach() for b in batches])
    assert Landscape(lm, batches).loss() == pytest.approx(-float(logp.mean()), rel=1e-5)
    (batch,) = collated(clip, Rows.of(toys.rows(frozenset({"image", "text"}), 5)))
    logits = clip.score_pairs(batch).detach().double().numpy()
    rows, columns = (np.exp(m - np.log(np.exp(m).sum(1, keepdims=True))).diagonal() for m in (logits, logits.T))
    assert Landscape(clip, [batch]).loss() == pytest.approx(-np.log(np.concatenate([rows, columns])).mean(), rel=1e-4)


def test_the_gradient_is_that_of_the_mean_loss_over_all_batches(vit):
    model, batches = vit
    view, other = Landscape(model, batches), weights(model, 2)
    names = ["classifier.weight", "vit.embeddings.cls_token"]
    found = view.gradient({n: other[n] for n in names}, other)
    assert not any(p.grad is not None for p in model.network.parameters())
    for name in names:
        direction = torch.randn(other[name].shape, generator=torch.Generator().manual_seed(0))
        step = 1e-2
        up, down = (view.loss({**other, name: other[name] + s * step * direction}) for s in (1, -1))
        assert float((found[name] * direction).sum()) == pytest.approx((up - down) / (2 * step), rel=0.05, abs=1e-4)


def test_nothing_to_take_a_loss_on():
    with pytest.raises(ModelError, match="no rows"):
        Landscape(tiny.tiny_vit(), [])


def test_between_is_exact_at_both_ends():
    a, b = ({"w": torch.randn(5, generator=torch.Generator().manual_seed(i)), "n": torch.tensor(i)} for i in (0, 1))
    sources = TensorSource.of(a), TensorSource.of(b)
    assert torch.equal(between(*sources, 0.0)["w"], a["w"]) and torch.equal(between(*sources, 1.0)["w"], b["w"]) and between(*sources, 0.7)["n"] == 0
    np.testing.assert_allclose(between(*sources, 0.3)["w"].numpy(), 0.7 * a["w"].numpy() + 0.3 * b["w"].numpy(), rtol=1e-5)
    assert list(between(*sources, 0.3, ["w"])) == ["w"]


def test_layers():
    names = ["embed.weight", "layers.0.q.weight", "layers.0.q.bias", "layers.0.mlp.weight", "layers.10.q.weight", "head.weight", "head.bias", "scale"]
    assert layers(names) == {"embed": names[:1], "layers.0": names[1:4], "layers.10": names[4:5], "head": names[5:7], "scale": names[7:]}
    assert layers(names, "module") == {"embed": names[:1], "layers.0.q": names[1:3], "layers.0.mlp": names[3:4], "layers.10.q": names[4:5], "head": names[5:7], "scale": names[7:]}


def test_a_barrier_is_the_height_above_the_straight_line():
    grid = [0.0, 0.25, 0.5, 0.75, 1.0]
    assert barrier(grid, [1, 2, 3, 4, 5]) == 0 and barrier(grid, [1, 1, 1, 1, 5]) == 0
    assert barrier(grid, [1, 2, 6, 4, 5]) == 3


def quadratic(seed=0):
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(6, 6, generator=g, dtype=torch.float64)
    hessian, centre = root @ root.T, {"a": torch.randn(4, generator=g, dtype=torch.float64), "b": torch.randn(2, generator=g, dtype=torch.float64)}

    def offset(tensors):
        return torch.cat([(tensors.get(n, c) - c) for n, c in centre.items()])

    def loss(tensors):
        d = offset(tensors)
        return float(d @ hessian @ d / 2)

    def gradient(tensors):
        whole = dict(zip(centre, (hessian @ offset(tensors)).split([4, 2])))
        return {n: whole[n] for n in tensors}

    return hessian, centre, loss, gradient


def test_average_sharpness_at_the_minimum_of_a_quadratic():
    hessian, centre, loss, _ = quadratic()
    sizes = torch.cat(list(centre.values()))
    expected = 0.01**2 / 2 * float((hessian.diagonal() * sizes.square()).sum())
    assert average_sharpness(loss, centre, 0.01, draws=4000) == pytest.approx(expected, rel=0.1)
    assert average_sharpness(loss, centre, 0.0) == 0 and average_sharpness(loss, {}, 0.1) == 0
    assert average_sharpness(loss, centre, 0.01, 3, seed=5) == average_sharpness(loss, centre, 0.01, 3, seed=5) != average_sharpness(loss, centre, 0.01, 3, seed=6)


def test_what_layers_are_perturbed_by_adds_up_to_the_whole():
    _, centre, _, _ = quadratic()
    whole, parts = noise(centre, 0.1, 7), {**noise({"b": centre["b"]}, 0.1, 7), **noise({"a": centre["a"]}, 0.1, 7)}
    assert all(torch.equal(whole[n], parts[n]) for n in centre)


def test_worst_sharpness_is_the_best_corner_of_the_box():
    """A convex function is largest in a corner; on a linear one sign ascent finds it."""
    _, centre, _, _ = quadratic()
    slope = {n: torch.randn(c.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64) for n, c in centre.items()}
    rise = sum(float((0.1 * slope[n] * c).abs().sum()) for n, c in centre.items())
    found = worst_sharpness(lambda t: sum(float((slope[n] * t[n]).sum()) for n in t), lambda t: {n: slope[n] for n in t}, centre, 0.1)
    assert found == pytest.approx(rise)
    hessian, centre, loss, gradient = quadratic(1)
    start = {n: c + 0.05 for n, c in centre.items()}
    sizes = torch.cat([t.abs() for t in start.values()])
    corners = [torch.tensor(signs, dtype=torch.float64) * 0.2 * sizes + 0.05 for signs in np.ndindex(*[2] * 6) for signs in [2 * np.array(signs) - 1]]
    highest = max(float(c @ hessian @ c / 2) for c in corners) - loss(start)
    assert 0 < worst_sharpness(loss, gradient, start, 0.2) <= highest + 1e-9
    assert worst_sharpness(loss, gradient, start, 0.0) == 0
