"""Sorted fine-tuning: its loss against truncated networks and torch's cross-entropy."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from luthier.core.exits import exit_depths
from luthier.errors import RecipeError
from luthier.objective.sft import SFT
from luthier.objective.sorted_exits import SortedExits, exit_scores, sorted_exits
from tests.helpers import tiny_llama
from tests.objective.lm_batches import logits_of, random_batch


def cut(model, depth):
    """The network of the first blocks alone, as a network of its own."""
    twin = copy.deepcopy(model)
    twin.network.model.layers = twin.network.model.layers[:depth]
    return twin


def flat_losses(model, batch):
    return torch.cat([F.cross_entropy(logits_of(model, s), torch.from_numpy(s.labels[s.supervised]), reduction="none") for s in batch.sequences])


@pytest.mark.parametrize("shared", [False, True])
def test_loss_and_gradient_are_the_mean_over_truncated_networks(shared):
    model, batch = tiny_llama(layers=3, tie_word_embeddings=shared), random_batch()
    by_hand = torch.stack([flat_losses(cut(model, n), batch).mean() for n in (1, 2, 3)])
    loss = SortedExits(exits=[1, 2]).loss(model, batch)
    assert list(loss.terms) == ["exit_1", "exit_2", "exit_3"]
    torch.testing.assert_close(loss.mean(), by_hand.mean())
    loss.mean().backward()
    got = {n: p.grad.clone() for n, p in model.network.named_parameters()}
    model.network.zero_grad()
    # the last exit's gradient by hand, the others' through networks that share the weights
    total = flat_losses(model, batch).mean()
    layers = model.network.model.layers
    for n in (1, 2):
        model.network.model.layers = layers[:n]
        total = total + flat_losses(model, batch).mean()
    model.network.model.layers = layers
    (total / 3).backward()
    for name, p in model.network.named_parameters():
        torch.testing.assert_close(got[name], p.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_the_whole_depth_alone_is_plain_tuning():
    model, batch = tiny_llama(layers=2), random_batch(weights=[1.0, 2.0, 0.5])
    values = {}
    for name, objective in (("sorted", SortedExits(exits=[2])), ("plain", SFT())):
        model.network.zero_grad()
        loss = objective.loss(model, batch).mean()
        loss.backward()
        values[name] = loss.detach(), [p.grad.clone() for p in model.network.parameters()]
    assert torch.equal(values["sorted"][0], values["plain"][0])
    assert all(torch.equal(a, b) for a, b in zip(values["sorted"][1], values["plain"][1]))


def test_exits_read_by_the_head_are_those_of_the_function():
    model, batch = tiny_llama(layers=3), random_batch()
    with torch.no_grad():
        scores = exit_scores(model, batch, [1, 3])
        logits = [one.head(one.hidden) for one in scores.values()]
        wanted = (flat_losses(cut(model, 1), batch) + flat_losses(model, batch)) / 2
    torch.testing.assert_close(sorted_exits(logits, scores[3].target), wanted)


def test_lora_on_the_network_is_seen_at_every_exit():
    from luthier.adapt.lora import Lora

    model, batch = tiny_llama(layers=2), random_batch()
    Lora(rank=2).attach(model)
    SortedExits(exits=[1]).loss(model, batch).mean().backward()
    grads = {n: p.grad for n, p in model.network.named_parameters() if "lora_B" in n}
    assert grads and all(g is not None and g.abs().sum() > 0 for g in grads.values())


def test_depths():
    assert exit_depths(tiny_llama(layers=2)) == [1, 2]
    assert exit_depths(tiny_llama(layers=10, hidden=8, num_attention_heads=2, num_key_value_heads=1)) == [3, 4, 5, 6, 7, 8, 9, 10]
    assert exit_depths(tiny_llama(layers=3), [2, 1, 2]) == [1, 2, 3]
    with pytest.raises(RecipeError, match="depth 4; the network has 3"):
        exit_depths(tiny_llama(layers=3), [4])
    with pytest.raises(RecipeError, match="exits"):
        SortedExits(exits=[0])
