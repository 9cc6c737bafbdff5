"""Input statistics of linear layers, against direct computation from the layer's inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.core.batch import Batch, Sequence
from luthier.core.collect import collect, linear_layers
from luthier.core.families import CausalLM


class Model(CausalLM):
    """Rows are {"ids": [...]}; everything but the first token is supervised."""

    pad_id = 0

    def collate(self, rows, ids=None, train_on="completion"):
        made = [Sequence(np.array(r["ids"]), np.arange(len(r["ids"])) > 0, row=i) for i, r in enumerate(rows)]
        return Batch(list(rows), np.arange(len(rows)), made)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    return Model(LlamaForCausalLM(config), None)


ROWS = [{"ids": [1, 2, 3]}, {"ids": [1, 2, 3, 4, 5, 6, 7]}, {"ids": [9, 8]}]
SITE = "model.layers.1.mlp.down_proj"


def inputs(model, row):
    """What enters SITE for one row alone."""
    seen = []
    layer = model.network.get_submodule(SITE)
    handle = layer.register_forward_pre_hook(lambda m, x: seen.append(x[0].detach()))
    with torch.no_grad():
        model.network(input_ids=torch.tensor([row["ids"]]))
    handle.remove()
    return seen[0][0]


def test_all_statistics_leave_padding_out(model):
    found = collect(model, ROWS, {"second_moment", "column_norm", "abs_max", "abs_mean", "mean"})
    assert set(found) == set(linear_layers(model.network)) and "lm_head" not in found
    x = torch.cat([inputs(model, r) for r in ROWS])
    one = found[SITE]
    assert one["tokens"] == 12 and one["sequences"] == 3
    torch.testing.assert_close(one["second_moment"], x.T @ x, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(one["column_norm"], x.norm(dim=0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(one["abs_max"], x.abs().amax(0), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(one["mean"], x.mean(0), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(one["abs_mean"], x.abs().mean(0), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("scale", ["abs_max", "max"])
def test_scaling_is_by_sequence(model, scale):
    found = collect(model, ROWS, {"second_moment"}, sites=[SITE], scale=scale, batch=2)
    wanted = 0
    for row in ROWS:
        x = inputs(model, row)
        x = x / (x.abs().max() if scale == "abs_max" else x.max().abs())
        wanted = wanted + x.T @ x
    torch.testing.assert_close(found[SITE]["second_moment"], wanted, atol=1e-5, rtol=1e-4)


def test_the_model_is_left_as_it_was(model):
    model.train()
    before = {n: p.clone() for n, p in model.network.named_parameters()}
    collect(model, ROWS, {"mean"}, dtype=torch.float64)
    assert all(torch.equal(before[n], p) and p.grad is None for n, p in model.network.named_parameters())
    assert model.network.training and not any(m._forward_pre_hooks for m in model.network.modules())


def test_unknown_names_are_refused(model):
    with pytest.raises(ValueError, match="median"):
        collect(model, ROWS, {"median"})
    with pytest.raises(ValueError, match="nowhere"):
        collect(model, ROWS, {"mean"}, sites=["nowhere"])


def test_no_rows_give_nothing(model):
    assert collect(model, [], {"mean"}) == {}
