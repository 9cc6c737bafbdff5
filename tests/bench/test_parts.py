"""What the profiler's sums say of a step whose products are known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench.parts import Parts, sentence


def test_products_are_counted_with_their_operations():
    a, b, c = torch.randn(64, 32), torch.randn(32, 48), torch.zeros(64, 48)
    many, q = torch.randn(3, 8, 16), torch.randn(1, 2, 40, 16)
    parts = Parts()
    parts.start()
    a @ b
    c.addmm_(a, b)
    torch.bmm(many, many.transpose(1, 2))
    F.linear(a, b.t(), torch.zeros(48))
    F.scaled_dot_product_attention(q, q, q)
    c.exp()
    parts.stop()
    found = parts.found
    assert found["flops"] == 3 * 2 * 64 * 32 * 48 + 3 * 2 * 8 * 16 * 8
    assert all(found[part] > 0 for part in ("products", "attention", "others"))
    assert found["products"] + found["attention"] + found["others"] <= 1


def test_the_parts_in_words():
    words = sentence({"products": 0.7, "attention": 0.1, "others": 0.15, "flops": 2.3e11, "flops_per_second": 1.5e11, "must": 2.1e11})
    assert "70 % are matrix products (230 GFLOP at 150 GFLOP/s" in words and "210 must be done" in words
    assert words.endswith("5 % what lies between operations")
    with pytest.raises(KeyError):
        sentence({})
