import torch

from luthier.core.loss import Loss, of


def test_any_split_gives_the_same_value_and_gradient():
    x = torch.randn(10, requires_grad=True)
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 0, 1, 1, 1], dtype=torch.bool)
    whole = Loss().add("a", x**2, mask).add("b", x.sin(), per="row", weight=0.5)
    counts = {"token": float(mask.sum()), "row": 10.0}
    wanted = torch.autograd.grad(whole.value(counts), x)[0]
    got = torch.zeros(10)
    for part in (slice(0, 3), slice(3, 4), slice(4, 10)):
        piece = Loss().add("a", (x**2)[part], mask[part]).add("b", x.sin()[part], per="row", weight=0.5)
        got += torch.autograd.grad(piece.value(counts), x)[0]
    assert torch.allclose(got, wanted, rtol=1e-6)


def test_empty_masks_add_nothing_never_nan():
    x = torch.tensor([float("nan"), 1.0], requires_grad=True)
    loss = Loss().add("a", x, torch.tensor([False, False]))
    assert float(loss.value({"token": 0.0})) == 0.0 == float(loss.mean())


def test_a_plain_tensor_is_one_mean_over_rows():
    value = of(torch.tensor([1.0, 3.0]))
    assert float(value.mean()) == 2.0 and float(value.value({"batch": 4.0})) == 0.5


def test_merging_multiplies_weights_and_keeps_equal_names_apart():
    a = Loss().add("x", torch.tensor([2.0]), per="row")
    a.merge(Loss().add("x", torch.tensor([3.0]), per="row"), weight=0.1)
    assert set(a.terms) == {"x", "x'"}
    assert torch.isclose(a.value({"row": 1.0}), torch.tensor(2.3))
