
import numpy as np
import pytest
import torch

from tests.counting import Counting

SHAPES = {
    "embed.weight": (7, 4), "layers.0.attn.weight": (5, 4), "layers.0.attn.bias": (5,), "layers.0.mlp.0.weight": (3, 11),
    "layers.1.attn.weight": (5, 4), "layers.1.attn.bias": (5,), "layers.1.mlp.0.weight": (3, 11), "norm.weight": (4,), "scale": (),
}  # fmt: skip


def make_state(seed, dtype=torch.float32, shapes=SHAPES):
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=g).to(dtype) for n, s in shapes.items()} | {"steps": torch.tensor(seed)}


@pytest.fixture
def state():
    return make_state


@pytest.fixture
def counting():
    return Counting


@pytest.fixture
def ranks():
    """Flat positions from the largest magnitude to the smallest, equal ones by index, by plain sorting."""

    def order(values):
        flat = np.abs(np.asarray(values, dtype=np.float32)).ravel()
        return sorted(range(len(flat)), key=lambda i: (-flat[i], i))

    return order


@pytest.fixture
def same():
    """Two mappings hold the same tensors, up to rounding."""

    def check(found, expected, **tolerance):
        assert set(found) == set(expected)
        for name in expected:
            torch.testing.assert_close(found[name], torch.as_tensor(expected[name]).to(found[name].dtype), msg=lambda m, n=name: f"{n}: {m}", **tolerance)

    return check


@pytest.fixture
def lazily(state, counting):
    """A merger reads nothing before a tensor is asked for, and then that tensor only; inputs stay as they were."""

    def check(merge, whole=False):
        base, tuned = counting(state(0)), [counting(state(i)) for i in (1, 2, 3)]
        merged = merge(base, tuned)
        assert not base.read and not any(t.read for t in tuned)
        tensor = merged["layers.1.attn.bias"]
        assert tensor.shape == (5,) and all("layers.1.attn.bias" in t.read for t in tuned)
        if not whole:
            assert {*base.read, *(n for t in tuned for n in t.read)} == {"layers.1.attn.bias"}
        everything = dict(merged)
        assert set(everything) == set(base) and everything["steps"] == 0
        for i, x in enumerate([base, *tuned]):
            assert all(torch.equal(x.tensors[n], state(i)[n]) for n in x)

    return check
