"""Taps against what transformers itself returns, and scopes under checkpointing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from luthier.core.batch import Sequence
from luthier.core.hooks import checkpoint_contexts, current_scope, forward_scope, tap
from luthier.core.modelmap import ModelMap
from luthier.errors import ModelError
from tests.helpers import tiny_llama

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])


def test_a_tap_sees_what_transformers_reports():
    family = tiny_llama()
    sites = [path for path, _ in ModelMap(family).blocks]
    with torch.no_grad(), tap(family, sites) as seen:
        out = family.network(input_ids=IDS, output_hidden_states=True)
    torch.testing.assert_close(seen[sites[0]], out.hidden_states[1])
    # the last reported state is normalised, the last block's output is not
    torch.testing.assert_close(family.network.model.norm(seen[sites[1]]), out.hidden_states[2])
    assert not torch.allclose(seen[sites[1]], out.hidden_states[2])
    with torch.no_grad(), tap(family, sites, at="in") as entering:
        family.network(input_ids=IDS)
    torch.testing.assert_close(entering[sites[1]], seen[sites[0]])
    blocks = [m for _, m in ModelMap(family).blocks]
    kept = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in blocks]
    with tap(family, sites):
        assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in blocks] == [n + 1 for n in kept]
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in blocks] == kept


@pytest.mark.parametrize("at", ["in", "out"])
def test_edits_are_what_the_rest_of_the_network_sees(at):
    family = tiny_llama()
    site = ModelMap(family).blocks[1][0]
    with torch.no_grad():
        with tap(family, [site], at, edit=lambda value, name: value * 0 if name == site else None) as seen:
            cut = family.network(input_ids=IDS).logits
        assert seen[site].abs().sum() > 0
        again = family.network(input_ids=IDS).logits
        assert not torch.allclose(cut, again)
        with tap(family, [site], at, edit=lambda value, name: None):
            torch.testing.assert_close(family.network(input_ids=IDS).logits, again)
        if at == "out":
            torch.testing.assert_close(cut, family.network.lm_head(family.network.model.norm(torch.zeros_like(seen[site]))))


def test_positions_are_counted_from_each_rows_begin():
    family = tiny_llama()
    site = ModelMap(family).blocks[0][0]
    last = torch.tensor([3, 2])
    with torch.no_grad():
        with tap(family, [site]) as whole:
            before = family.network(input_ids=IDS).logits
        with tap(family, [site], positions=last, edit=lambda value, _: torch.zeros_like(value)) as seen:
            after = family.network(input_ids=IDS).logits
    torch.testing.assert_close(seen[site], whole[site][torch.arange(2), last])
    torch.testing.assert_close(after[0, :3], before[0, :3])
    torch.testing.assert_close(after[1, :2], before[1, :2])
    assert not torch.allclose(after[1, 2], before[1, 2])


def test_gradients_flow_through_a_tap_and_unknown_sites_are_named():
    family = tiny_llama()
    site = ModelMap(family).blocks[0][0]
    with tap(family, [site]) as seen:
        logp = family.score([Sequence(np.array([5, 6, 7]), np.array([False, True, True]))]).logp
    (grad,) = torch.autograd.grad(logp.sum(), seen[site])
    assert grad.abs().sum() > 0
    with pytest.raises(ModelError, match=r"no module 'model\.layer\.0'\. Did you mean 'model\.layers\.0'"), tap(family, ["model.layer.0"]):
        pass


class Routed(nn.Module):
    """Scales by the row's task and leaves a loss, as a routed adapter does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, 3.0]))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scope = current_scope()
        if scope is None:
            return x
        self.calls += 1
        scope.add_loss("balance", self.weight.sum())
        scope.put("last", x.detach())
        return (x * self.weight[scope.get("task")][:, None]).sin()


def test_a_scope_is_sealed_and_survives_recomputation():
    x, task = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 0])
    plain, routed = Routed(), Routed()
    with forward_scope(None, task=task):
        wanted = plain(x)
    wanted.sum().backward()
    with forward_scope(None, batch="rows", task=task) as scope:
        out = checkpoint(routed, x, use_reentrant=False, context_fn=checkpoint_contexts)
    with forward_scope(None, task=1 - task):  # a second pass before the backward of the first
        routed(x)
    assert current_scope() is None and scope.sealed and scope.batch == "rows" and len(scope.losses["balance"]) == 1
    before = scope.get("last")
    out.sum().backward()
    assert routed.calls == 3  # forward, second forward, recomputation
    torch.testing.assert_close(routed.weight.grad, plain.weight.grad)
    assert len(scope.losses["balance"]) == 1 and scope.get("last") is before
    assert torch.equal(routed(x), x)  # the fallback without a scope


def test_scopes_nest_and_close_after_errors():
    with forward_scope(None, a=1) as outer:
        with forward_scope(None, a=2):
            assert current_scope().get("a") == 2
        assert current_scope() is outer
    with pytest.raises(RuntimeError), forward_scope(None):
        raise RuntimeError
    assert current_scope() is None and outer.get("b", 5) == 5


def test_transformers_checkpointing_takes_the_contexts():
    family = tiny_llama()
    family.network.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts})
    family.train()
    seen = []
    ModelMap(family).blocks[0][1].mlp.register_forward_pre_hook(lambda m, args: seen.append((current_scope().get("task"), current_scope().sealed)))
    with forward_scope(family, task=7):
        loss = family.network(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert seen == [(7, False), (7, True)]
