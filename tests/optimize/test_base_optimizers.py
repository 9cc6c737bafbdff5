"""adamw, sgd and sm3: groups, and the updates against torch or by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from luthier.core.plugin import Group
from luthier.errors import RecipeError
from luthier.optimize.adamw import AdamW
from luthier.optimize.sgd import SGD
from luthier.optimize.sm3 import SM3, sm3


def groups():
    torch.manual_seed(0)
    return [
        Group("body", {"w": nn.Parameter(torch.randn(3, 4)), "b": nn.Parameter(torch.randn(3))}),
        Group("head", {"h": nn.Parameter(torch.randn(2, 3))}, lr_scale=10.0, weight_decay=0.5),
    ]


@pytest.mark.parametrize("tuner", [AdamW(lr=0.01, weight_decay=0.1), SGD(lr=0.01, weight_decay=0.1), SM3(lr=0.01, weight_decay=0.1)])
def test_groups_carry_rates_roles_and_decay(tuner):
    given = groups()
    optimizer = tuner.build(given)
    by_name = {n: g for g in optimizer.param_groups for n in g["names"]}
    assert by_name["w"]["weight_decay"] == 0.1 and by_name["b"]["weight_decay"] == 0.0 and by_name["h"]["weight_decay"] == 0.5
    assert by_name["h"]["lr"] == pytest.approx(0.1) and by_name["h"]["role"] == "head" and by_name["h"]["lr_scale"] == 10.0
    before = {n: p.detach().clone() for g in given for n, p in g.params.items()}
    given[0].params["w"].grad = torch.ones(3, 4)
    optimizer.step()
    assert not torch.equal(given[0].params["w"], before["w"])
    assert torch.equal(given[0].params["b"], before["b"]) and torch.equal(given[1].params["h"], before["h"])


def test_plain_parameters_are_accepted_and_stepped_like_torch():
    layer, twin = nn.Linear(3, 2), nn.Linear(3, 2)
    twin.load_state_dict(layer.state_dict())
    pairs = [(AdamW(lr=0.1, eps=1e-6).build(layer.parameters()), torch.optim.AdamW(twin.parameters(), lr=0.1, eps=1e-6, weight_decay=0.0))]
    for ours, theirs in pairs:
        for _ in range(3):
            for p, q in zip(layer.parameters(), twin.parameters()):
                p.grad = torch.randn_like(p)
                q.grad = p.grad.clone()
            ours.step()
            theirs.step()
    assert all(torch.equal(p, q) for p, q in zip(layer.parameters(), twin.parameters()))


def test_sm3_covers_never_fall_below_the_summed_squares():
    torch.manual_seed(0)
    rows, columns, total = torch.zeros(3), torch.zeros(5), torch.zeros(6)
    index = torch.tensor([0, 3, 6, 7, 11, 14])
    for _ in range(10):
        grad = torch.randn(6)
        least = torch.minimum(rows[index // 5], columns[index % 5])
        nu, rows, columns = sm3(grad, index, rows, columns)
        total += grad**2
        torch.testing.assert_close(nu, least + grad**2)
        assert bool((nu >= total - 1e-5).all())
        for i in range(3):
            assert float(rows[i]) >= float(nu[index // 5 == i].max()) - 1e-6
    assert float(columns[2]) == pytest.approx(float(nu[index % 5 == 2].max()) if bool((index % 5 == 2).any()) else 0.0)


def test_sm3_of_a_single_row_and_of_a_vector_is_adagrad():
    """With one row and as many columns as entries, min(r, c) = c: the entry's own sum."""
    torch.manual_seed(0)
    row, vector, oracle = nn.Parameter(torch.randn(1, 4)), nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
    with torch.no_grad():
        row.copy_(oracle[None])
        vector.copy_(oracle)
    ours = SM3(lr=0.1, momentum=0.0, eps=1e-30).build([("row", row), ("vector", vector)])
    theirs = torch.optim.Adagrad([oracle], lr=0.1, eps=0.0)
    for _ in range(5):
        grad = torch.randn(4)
        row.grad, vector.grad, oracle.grad = grad[None].clone(), grad.clone(), grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(vector, oracle)
    torch.testing.assert_close(row[0], oracle)


def test_sm3_on_a_packed_support_equals_the_dense_matrix_with_zero_gradients_elsewhere():
    torch.manual_seed(0)
    index, packed, dense = torch.tensor([1, 4, 5, 10]), nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(3, 4))
    sparse = SM3(lr=0.1).build([Group("delta", {"p": packed}, options={"support": {"p": (index, (3, 4))}})])
    full = SM3(lr=0.1, eps=1e-8).build([("d", dense)])
    for _ in range(4):
        packed.grad = torch.randn(4)
        dense.grad = torch.zeros(12).index_add(0, index, packed.grad).view(3, 4)
        sparse.step()
        full.step()
    torch.testing.assert_close(dense.flatten()[index], packed)


def test_bad_values():
    for kind, bad in ((AdamW, {"betas": (1.0, 0.9)}), (AdamW, {"lr": 0.0}), (SGD, {"momentum": 1.0}), (SM3, {"beta": 1.0}), (SGD, {"weight_decay": -1.0})):
        with pytest.raises(RecipeError, match=next(iter(bad))):
            kind(**bad)
    with pytest.raises(RecipeError, match="nesterov"):
        SGD(momentum=0.0, nesterov=True)
