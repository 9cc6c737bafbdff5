"""Meters against torch's own counter, hand counts, and backward passes in which only some tensors train."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from luthier.core.meters import Flops, backward_costs, saved_bytes
from tests.helpers import tiny_llama


def test_flops_by_hand_and_by_torchs_counter():
    layer, x = nn.Linear(6, 4), torch.randn(5, 6, requires_grad=True)
    with Flops() as flops:
        out = layer(x)
    assert (flops.forward, flops.backward) == (2 * 5 * 6 * 4, 0)
    with flops:
        out.sum().backward()
    assert flops.backward == 2 * flops.forward and flops.total == 3 * flops.forward
    network = tiny_llama(attn_implementation="eager").network
    with Flops() as mine, FlopCounterMode(display=False) as theirs:
        network(torch.arange(20)[None] + 20).logits.sum().backward()
    assert mine.total == theirs.get_total_flops() > 0


def test_attention_on_a_cpu_is_counted_as_the_products_that_it_is():
    q, k, v = (torch.randn(1, 2, 7, 8, requires_grad=True) for _ in range(3))
    with Flops() as flops:
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
    assert flops.forward == 2 * (2 * 2 * 7 * 7 * 8) and flops.backward == 5 * (2 * 2 * 7 * 7 * 8)


def test_what_is_computed_again_is_backward():
    layer, x = nn.Linear(6, 4), torch.randn(5, 6, requires_grad=True)
    with Flops() as flops:
        checkpoint(lambda: layer(x).tanh(), use_reentrant=False).sum().backward()
    assert flops.forward == 240 and flops.backward == 3 * 240


def test_saved_bytes_are_the_inputs_that_gradients_need():
    net, x = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(5, 6)
    with saved_bytes(net) as saved:
        out = net(x)
        assert saved.now == 4 * (5 * 6 + 5 * 4), "x, and tanh's output once though two gradients need it"
        out.sum().backward()
    del out
    assert saved.now == 0 and saved.peak == 4 * (5 * 6 + 5 * 4)
    net[0].requires_grad_(False)
    with saved_bytes(net) as saved:
        out = net(x)
    assert saved.now == 4 * 5 * 4 and out.requires_grad
    with saved_bytes() as saved, torch.no_grad():
        net(x)
    assert saved.peak == 0


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}, {"attn_implementation": "eager"}])
def test_the_price_of_every_subset_is_what_autograd_spends_on_it(options):
    """T(m) = fixed + sum dw + sum of dy above the deepest, for single tensors and for sets of them."""
    network = tiny_llama(hidden=16, vocab=24, **options).network
    params = dict(network.named_parameters())
    ids = torch.randint(0, 24, (2, 9), generator=torch.Generator().manual_seed(0))

    def run():
        logits = network(input_ids=ids).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()

    with backward_costs(params) as result:
        run()
        run()
    costs = result()
    assert sorted(costs.names) == sorted(params), "every tensor has a place"
    order = [n for n in costs.names if "proj" in n]
    assert "layers.1" in order[0] and order[0].endswith("down_proj.weight") and "layers.0" in order[-1]
    names, rng = costs.names, torch.Generator().manual_seed(1)
    sets = [[i] for i in range(len(names))] + [torch.randperm(len(names), generator=rng)[:4].tolist() for _ in range(6)] + [list(range(len(names)))]
    for chosen in sets:
        for i, name in enumerate(names):
            params[name].requires_grad_(i in chosen)
            params[name].grad = None
        with Flops() as flops:
            run()
        wanted = costs.fixed + sum(costs.dw[i] for i in chosen) + sum(costs.dy[: max(chosen)])
        # eager attention is a product of two activations, of which a single query or key matrix needs one gradient only
        exact = "attn_implementation" not in options or len(chosen) > 4
        assert 2 * flops.backward == wanted if exact else 0 < 2 * flops.backward <= wanted, [names[i] for i in chosen]
        assert 2 * flops.forward == costs.forward
    assert costs.backward == wanted


def test_frozen_parts_have_no_price_and_randomness_is_left_alone():
    net = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 4), nn.Linear(4, 3))
    net[0].requires_grad_(False)
    params = {n: p for n, p in net.named_parameters() if p.requires_grad}
    x, found = torch.randn(7, 6), []
    for measured in (False, True):
        torch.manual_seed(0)
        if measured:
            with backward_costs(params) as result:
                found.append(net(x))
                found[-1].sum().backward()
        else:
            found.append(net(x))
    assert torch.equal(*found)
    costs = result()
    assert costs.names == ["3.weight", "3.bias", "2.weight", "2.bias"]
    assert costs.dw == [2 * 7 * 4 * 3, 0, 2 * 7 * 5 * 4, 0] and costs.dy == [0, 2 * 7 * 4 * 3, 0, 0]
    assert costs.fixed == 0 and costs.backward == sum(costs.dw) + sum(costs.dy)
    assert list(itertools.accumulate(costs.dy))[-1] == 168


def test_checkpointed_parts_are_measured_and_what_is_computed_again_is_fixed():
    first, second, x = nn.Linear(6, 5), nn.Linear(5, 4), torch.randn(7, 6)
    params = {"first": first.weight, "second": second.weight}
    with backward_costs(params) as result:
        checkpoint(lambda h: second(h).tanh(), first(x), use_reentrant=False).sum().backward()
    costs = result()
    assert costs.names == ["second", "first"] and costs.dw == [280, 420] and costs.dy == [280, 0]
    assert costs.fixed == 280 and costs.forward == 700 and costs.backward == 420 + 3 * 280
