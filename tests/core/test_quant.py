"""Grids, rotations and codebooks against brute force, scipy and autograd."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard
from sklearn.metrics import pairwise_distances_argmin

from luthier.core.quant import Grid, Rotation, VectorQuant, fake_quant, pack_codes, rounding_error, unpack_codes


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(("bits", "clip"), [(4, 1.0), (3, 0.9), (2, 1.0)])
def test_a_grid_has_few_values_by_the_formula(bits, clip):
    x = normal(5, 40, dtype=torch.float64)
    rounded = fake_quant(x, bits, clip)
    assert all(len(row.unique()) <= 2**bits for row in rounded)
    row, n = x[2].numpy(), 2**bits - 1
    s = clip * (row.max() - row.min()) / n
    z = np.floor(-row.min() / s)
    np.testing.assert_allclose(rounded[2], s * (np.clip(np.round(row / s) + z, 0, n) - z), rtol=1e-12)
    assert rounding_error(x, bits, clip) == pytest.approx(float((rounded - x).square().sum()))


def test_rounding_twice_on_one_grid_is_rounding_once():
    x = normal(3, 16)
    grid = Grid.of(x, 4)
    assert torch.equal(grid(grid(x)), grid(x))
    for constant in (0.0, 2.5, -1.5):
        assert torch.equal(fake_quant(torch.full((2, 4), constant), 4), torch.full((2, 4), constant))


def test_the_gradient_passes_as_if_nothing_was_rounded():
    x, v = normal(4, 8).requires_grad_(), normal(4, 8, seed=1)
    through = torch.autograd.grad((fake_quant(x.sin(), 3) * v).sum(), x)[0]
    assert torch.equal(through, torch.autograd.grad((x.sin() * v).sum(), x)[0])


@pytest.mark.parametrize("size", [1, 8, 32, 12, 9])
def test_a_rotation_is_orthogonal_and_undone(size):
    rotation = Rotation(size, seed=3).double()
    r = rotation(torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(r @ r.T, torch.eye(size, dtype=torch.float64), atol=1e-6, rtol=0)
    x = normal(2, 5, 3 * size, dtype=torch.float64)
    torch.testing.assert_close(rotation.back(rotation(x)), x, atol=1e-6, rtol=0)
    torch.testing.assert_close(rotation(x)[..., size : 2 * size], x[..., size : 2 * size] @ r)
    torch.testing.assert_close(rotation.back(x)[..., :size], x[..., :size] @ r.T)


def test_a_rotation_of_a_power_of_two_is_a_signed_hadamard_matrix():
    rotation = Rotation(16, seed=1)
    expected = hadamard(16) / 4 * rotation.signs.numpy()
    np.testing.assert_allclose(rotation(torch.eye(16)), expected, atol=1e-6)
    assert torch.equal(Rotation(16, seed=1).signs, rotation.signs) and not torch.equal(Rotation(16, seed=2).signs, rotation.signs)


def test_one_codebook_gives_every_group_its_nearest_code():
    w = normal(12, 16)
    quant = VectorQuant.fit(w, group=4, size=8)
    wanted = normal(12, 16, seed=5)
    quant.recode(wanted, torch.arange(quant.groups))
    units = (wanted / quant.scales.detach()).reshape(-1, 4)
    assert quant.codes[0].tolist() == pairwise_distances_argmin(units.numpy(), quant.codebooks[0].detach().numpy()).tolist()
    before = quant.codes.clone()
    changed = quant.recode(wanted, torch.tensor([3, 7]), force=True)
    assert changed.all() and (quant.codes != before).nonzero()[:, 1].tolist() == [3, 7]


def test_lloyds_alternation_never_raises_the_error():
    w = normal(16, 24)
    quant = VectorQuant.fit(w, group=4, size=8, iterations=1)
    errors = []
    for _ in range(6):
        quant.recode(w, torch.arange(quant.groups))
        errors.append(float(((quant() - w) / quant.scales).detach().square().sum()))
        units = (w / quant.scales).reshape(-1, 4).detach()
        for k in quant.codes[0].unique():
            quant.codebooks.data[0, k] = units[quant.codes[0] == k].mean(0)
        errors.append(float(((quant() - w) / quant.scales).detach().square().sum()))
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(errors)) and errors[-1] < errors[0]


def test_beam_search_of_two_codebooks_never_raises_the_error_and_can_find_the_best():
    w = normal(6, 8)
    quant = VectorQuant.fit(w, group=2, size=4, count=2)
    wanted = normal(6, 8, seed=2)
    error = lambda: ((quant() - wanted) / quant.scales).square().reshape(-1, 2).sum(1).detach()  # noqa: E731
    errors = [error()]
    for beam in (1, 2, 16):
        quant.recode(wanted, torch.arange(quant.groups), beam=beam)
        errors.append(error())
        assert (errors[-1] <= errors[-2] + 1e-5).all()
    units = (wanted / quant.scales.detach()).reshape(-1, 2)
    pairs = (quant.codebooks[0][:, None] + quant.codebooks[1]).reshape(-1, 2).detach()
    best = torch.cdist(units, pairs).square().min(1).values
    assert ((errors[-1] - best).abs() < 1e-4).float().mean() > 0.9


def test_gradients_of_codebooks_are_sums_over_their_users():
    quant = VectorQuant.fit(normal(6, 8), group=2, size=4)
    grad = normal(6, 8, seed=1)
    quant.chain(grad)
    per_group = (grad * quant.scales.detach()).reshape(-1, 2)
    expected = torch.stack([per_group[quant.codes[0] == k].sum(0) for k in range(4)])
    torch.testing.assert_close(quant.codebooks.grad[0], expected)
    torch.testing.assert_close(quant.scales.grad[:, 0], (grad * (quant() / quant.scales)).sum(1).detach())
    books = quant.codebooks.grad.clone()
    quant.codebooks.requires_grad_(False).grad = None
    quant.chain(grad)
    assert quant.codebooks.grad is None
    quant.codebooks.requires_grad_(True)
    quant.scales.requires_grad_(False)
    quant.chain(grad)
    torch.testing.assert_close(quant.codebooks.grad, books)


def test_codes_are_packed_without_loss_and_counted():
    quant = VectorQuant.fit(normal(10, 12), group=4, size=7)
    packed = pack_codes(quant.codes, 3)
    assert len(packed) == (30 * 3 + 7) // 8
    assert torch.equal(unpack_codes(packed, 3, 30), quant.codes[0].long())
    assert quant.bits() == 30 * 3 + 16 * (7 * 4 + 10)
    with pytest.raises(ValueError, match="cut short"):
        unpack_codes(packed[:2], 3, 30)
