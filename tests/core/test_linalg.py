import math
from unittest import mock

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.core import linalg, sparse
from luthier.core.linalg import UpdateFilter, top_k
from luthier.core.windows import window
from luthier.errors import ModelError


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# svd and friends --------------------------------------------------------------------------------------------------------
def test_svd_is_the_decomposition_with_fixed_signs():
    w = randn(7, 5).bfloat16()
    u, s, vt = linalg.svd(w)
    assert u.dtype == torch.float32
    torch.testing.assert_close(u * s @ vt, w.float(), atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(s, scipy.linalg.svdvals(w.float().numpy()), rtol=1e-5)
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()
    again = linalg.svd(-w, 3)
    torch.testing.assert_close(again[0], u[:, :3], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(again[2], -vt[:3], atol=1e-5, rtol=1e-4)


def test_randomised_svd_finds_the_leading_subspace():
    u0, _ = torch.linalg.qr(randn(60, 40, seed=1))
    v0, _ = torch.linalg.qr(randn(50, 40, seed=2))
    w = (u0 * 0.5 ** torch.arange(40.0)) @ v0.T
    u, s, vt = linalg.svd(w, 4, exact=False)
    np.testing.assert_allclose(s, scipy.linalg.svdvals(w.numpy())[:4], rtol=1e-4)
    torch.testing.assert_close(u @ u.T, u0[:, :4] @ u0[:, :4].T, atol=1e-4, rtol=0)
    assert torch.equal(vt, linalg.svd(w, 4, exact=False)[2])


def test_effective_rank():
    assert linalg.effective_rank(torch.eye(6) * 3) == pytest.approx(6.0)
    assert linalg.effective_rank(torch.outer(randn(4), randn(5))) == pytest.approx(1.0, abs=1e-3)
    assert linalg.effective_rank(torch.zeros(3, 3)) == 0.0
    values = np.array([3.0, 2.0, 1.0])
    p = values / values.sum()
    assert linalg.effective_rank(torch.tensor(values)) == pytest.approx(math.exp(-(p * np.log(p)).sum()))


def test_projector_removes_the_rows_and_nothing_else():
    rows = randn(3, 8)
    p = linalg.projector(rows)
    torch.testing.assert_close(p @ p, p, atol=1e-5, rtol=0)
    torch.testing.assert_close(rows @ p, torch.zeros(3, 8), atol=1e-5, rtol=0)
    null = torch.from_numpy(scipy.linalg.null_space(rows.numpy()))
    torch.testing.assert_close(p @ null, null, atol=1e-5, rtol=0)
    half = linalg.projector(rows, alpha=0.5)
    torch.testing.assert_close(rows @ half, rows / 2, atol=1e-5, rtol=1e-4)
    assert linalg.basis(rows, keep=2).shape == (8, 2)
    assert linalg.basis(torch.ones(4, 8), center=True).shape == (8, 0)
    strong = torch.diag(torch.tensor([10.0, 1.0, 1.0]))
    assert linalg.basis(strong, keep=0.9).shape == (3, 1)
    with pytest.raises(ValueError, match="span all"):
        linalg.projector(randn(9, 8))


def test_procrustes_agrees_with_scipy():
    a, b = randn(10, 4), randn(10, 4, seed=1)
    r, _ = scipy.linalg.orthogonal_procrustes(a.numpy(), b.numpy())
    np.testing.assert_allclose(linalg.procrustes(a, b), r, atol=1e-5)
    for seed in range(6):
        c = randn(10, 3, seed=seed)
        assert float(torch.linalg.det(linalg.procrustes(c, randn(10, 3, seed=seed + 50), rotation=True))) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_fwht_is_the_hadamard_matrix_and_its_own_adjoint(n):
    x, y = randn(3, n, dtype=torch.float64), randn(3, n, seed=1, dtype=torch.float64)
    np.testing.assert_allclose(linalg.fwht(x), x.numpy() @ scipy.linalg.hadamard(n), atol=1e-9)
    torch.testing.assert_close((linalg.fwht(x) * y).sum(), (x * linalg.fwht(y)).sum())
    torch.testing.assert_close(linalg.fwht(linalg.fwht(x, True), True), x)


def test_fwht_needs_a_power_of_two():
    with pytest.raises(ValueError, match="power of two"):
        linalg.fwht(torch.ones(6))


def test_sketch_is_linear_and_keeps_squared_lengths_on_average():
    x, y = randn(5, 37), randn(5, 37, seed=1)
    torch.testing.assert_close(linalg.sketch(2 * x - y, 8, 3), 2 * linalg.sketch(x, 8, 3) - linalg.sketch(y, 8, 3), atol=1e-4, rtol=1e-4)
    norms = torch.stack([linalg.sketch(x[0], 16, s).square().sum() for s in range(400)])
    assert float(norms.mean()) == pytest.approx(float(x[0].square().sum()), rel=0.1)
    assert not torch.equal(linalg.sketch(x, 8, 3), linalg.sketch(x, 8, 4))
    whole = linalg.sketch(x, 64, 0)
    torch.testing.assert_close(whole.square().sum(1), x.square().sum(1), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="sketched"):
        linalg.sketch(x, 65, 0)


def test_kron_linear_is_the_kronecker_product():
    a, b, x = randn(3, 4), randn(2, 5, seed=1), randn(6, 20, seed=2)
    np.testing.assert_allclose(linalg.kron_linear(a, b, x), x.numpy() @ np.kron(a.numpy(), b.numpy()).T, atol=1e-4)


# top-k ------------------------------------------------------------------------------------------------------------------
def brute(scores, k, first=0):
    """Positions of ranks first..first+k-1 of all (name, index) pairs, by sorting with the index as the second key."""
    entries = [(-float(v), t, i, n) for t, (n, s) in enumerate(scores.items()) for i, v in enumerate(s.flatten().tolist())]
    chosen = sorted(entries, key=lambda e: e[:3])[first : first + k]
    return {n: sorted(i for _, _, i, m in chosen if m == n) for n in scores}


small = st.lists(st.sampled_from([-2.0, -1.0, -0.5, -0.0, 0.0, 1e-40, 0.5, 1.0, 3.0, float("inf")]), min_size=1, max_size=9)


@pytest.mark.parametrize("in_memory", [0, sparse.IN_MEMORY])
@settings(max_examples=150, deadline=None)
@given(st.lists(small, min_size=1, max_size=4), st.integers(0, 40), st.integers(0, 6))
def test_top_k_over_all_tensors_is_exact_with_ties_by_index(in_memory, parts, k, first):
    scores = {f"t{i}": torch.tensor(p) for i, p in enumerate(parts)}
    with mock.patch.object(sparse, "IN_MEMORY", in_memory):
        found = top_k(scores, k, band=first)
    assert {n: i.tolist() for n, i in found.items()} == brute(scores, k, first)
    assert all(i.dtype == torch.int64 for i in found.values())


@settings(max_examples=60, deadline=None)
@given(small, st.integers(0, 12), st.integers(0, 4))
def test_top_k_of_each_tensor_and_each_row(values, k, first):
    matrix = torch.tensor([values, values[::-1]])
    by_tensor = top_k({"m": matrix}, k, "tensor", first)["m"].tolist()
    assert by_tensor == brute({"m": matrix}, k, first)["m"]
    n = len(values)
    rows = [brute({"r": row}, k, first)["r"] for row in matrix]
    assert top_k({"m": matrix}, k, "row", first)["m"].tolist() == rows[0] + [n + i for i in rows[1]]


def test_top_k_with_shares_short_rows_and_many_chunks(monkeypatch):
    assert top_k({"bias": torch.rand(8)}, 0.1, "row")["bias"].numel() == 0
    scores = {"a": randn(1000), "b": randn(30, 20, seed=1)}
    whole = top_k(scores, 0.25)
    assert sum(map(len, whole.values())) == 400
    monkeypatch.setattr(sparse, "CHUNK", 7)
    chunked = top_k(scores, 0.25)
    assert all(torch.equal(whole[n], chunked[n]) for n in scores)
    assert {n: i.tolist() for n, i in whole.items()} == brute(scores, 400)


@pytest.mark.parametrize("in_memory", [0, sparse.IN_MEMORY])
def test_top_k_refuses_nan_but_not_infinity(in_memory, monkeypatch):
    monkeypatch.setattr(sparse, "IN_MEMORY", in_memory)
    with pytest.raises(ModelError, match="'b' holds NaN"):
        top_k({"a": torch.ones(2), "b": torch.tensor([1.0, math.nan])}, 1)
    assert top_k({"a": torch.tensor([1.0, math.inf, -math.inf])}, 1)["a"].tolist() == [1]
    with pytest.raises(ValueError, match="scope"):
        top_k({"a": torch.ones(2)}, 1, "rows")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("near", [True, False])
def test_trim_keeps_what_the_mask_lets_pass(dtype, near):
    """Also where sizes differ by less than fp32 can tell, and where some that are equal must go."""
    x = randn(40, 5).to(dtype)
    if near:
        x = (1.5 + torch.arange(-100, 100).reshape(40, 5) * 2.0**-26).to(dtype) * randn(40, 5).sign().to(dtype)
    for k in (0, 1, 37, 100, 199, 200):
        found = sparse.cut({"x": x.abs()}, k)
        kept = found.trim("x", x)
        assert torch.equal(kept, x.masked_fill(~found.mask("x", x.abs()), 0))
        assert kept.dtype == dtype and int((kept != 0).sum()) == k
        with window("x", 8, 24):
            assert torch.equal(found.trim("x", x[8:24]), kept[8:24])


# sparse updates ---------------------------------------------------------------------------------------------------------
def test_sparse_updates_apply_and_revert_bit_for_bit(tmp_path):
    state = {"w": randn(4, 5), "h": randn(6, seed=3).half()}
    before = {k: v.clone() for k, v in state.items()}
    update = {"w": (torch.tensor([0, 7, 19]), torch.tensor([1.0, -2.0, 0.3])), "h": (torch.tensor([2]), torch.tensor([0.1]))}
    dense = before["w"].flatten().numpy().copy()
    dense[[0, 7, 19]] += 2 * np.array([1.0, -2.0, 0.3], dtype=np.float32)
    old = sparse.apply(state, update, scale=2.0)
    np.testing.assert_allclose(state["w"].flatten(), dense, rtol=1e-6)
    sparse.revert(state, old)
    assert all(torch.equal(state[k], before[k]) for k in state)
    sparse.save(update, tmp_path / "update.safetensors")
    again = sparse.load(tmp_path / "update.safetensors")
    assert all(torch.equal(a, b) for n in update for a, b in zip(update[n], again[n]))


def test_sparse_updates_add_on_the_union_of_positions():
    a = {"w": (torch.tensor([1, 3]), torch.tensor([1.0, 2.0]))}
    b = {"w": (torch.tensor([0, 3]), torch.tensor([5.0, 7.0])), "v": (torch.tensor([2]), torch.tensor([1.0]))}
    total = sparse.add(a, b, scale=2.0)
    assert total["w"][0].tolist() == [0, 1, 3] and total["w"][1].tolist() == [10.0, 1.0, 16.0]
    assert total["v"][1].tolist() == [2.0]


def test_sparse_updates_of_another_model_are_refused(tmp_path):
    with pytest.raises(ModelError, match="does not have"):
        sparse.apply({"w": torch.ones(2)}, {"x": (torch.tensor([0]), torch.ones(1))})
    with pytest.raises(ModelError, match="another model"):
        sparse.apply({"w": torch.ones(2)}, {"w": (torch.tensor([2]), torch.ones(1))})


def test_scatter_has_gather_as_its_adjoint():
    base, index = randn(3, 4), torch.tensor([1, 5, 11])
    values = randn(3, seed=1).requires_grad_()
    weight = randn(3, 4, seed=2)
    (sparse.scatter(base, index, values) * weight).sum().backward()
    torch.testing.assert_close(values.grad, weight.flatten()[index])
    assert sparse.take({"w": base}, {"w": index})["w"][1].tolist() == base.flatten()[index].tolist()


# update filter ----------------------------------------------------------------------------------------------------------
def train(optimizer, param, steps=5):
    for step in range(steps):
        optimizer.zero_grad()
        (param * randn(*param.shape, seed=step)).sum().backward()
        optimizer.step()


def test_filter_keeps_masked_entries_exactly_under_decay_and_momentum():
    start = randn(4, 3)
    plain, held = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    mask = torch.tensor([True, False, True])
    train(torch.optim.AdamW([plain], lr=0.1, weight_decay=0.5), plain)
    optimizer = torch.optim.AdamW([held], lr=0.1, weight_decay=0.5)
    filter_ = UpdateFilter({held: mask}).install(optimizer)
    train(optimizer, held)
    assert torch.equal(held[:, 1], start[:, 1])
    torch.testing.assert_close(held[:, [0, 2]], plain[:, [0, 2]])
    filter_.remove()
    train(optimizer, held, 1)
    assert not torch.equal(held[:, 1], start[:, 1])


def test_filter_scales_the_finished_update_where_scaled_gradients_would_cancel():
    start = randn(4, 3)
    plain, scaled = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    train(torch.optim.Adam([plain], lr=0.1), plain, 1)
    optimizer = torch.optim.Adam([scaled], lr=0.1)
    rows = torch.tensor([[0.25], [1.0], [0.0], [0.5]])
    with UpdateFilter({scaled: rows}).installed(optimizer):
        train(optimizer, scaled, 1)
    torch.testing.assert_close((scaled - start).detach(), ((plain - start) * rows).detach(), atol=1e-6, rtol=1e-4)


def test_filter_takes_the_gradient_of_an_undrawn_parameter_away():
    param = torch.nn.Parameter(randn(3))
    optimizer = torch.optim.AdamW([param], lr=0.1)
    UpdateFilter({param: torch.zeros(3, dtype=torch.bool)}).install(optimizer)
    before = param.detach().clone()
    train(optimizer, param, 2)
    assert torch.equal(param, before) and param not in optimizer.state
