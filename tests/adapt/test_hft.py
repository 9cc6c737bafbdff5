"""HFT: exact balance of the halves, frozen matrices bit-identical, fused projections by part."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from luthier.adapt.full import Full
from luthier.adapt.hft import HFT, half, units
from luthier.core.context import Context
from luthier.core.families import CausalLM
from luthier.core.plugin import Step
from luthier.errors import RecipeError
from tests.adapt._rows import ROWS, by_ids, llama


def layers(number):
    """Unit lists of `number` Llama blocks."""
    kinds = ["attention"] * 4 + ["ffn"] * 3 + ["norm"] * 2
    names = [f"{b}.{k}.{i}" for b in range(number) for i, k in enumerate(kinds)]
    return names, kinds * number, [b for b in range(number) for _ in kinds]


def count(trained, names, kinds, blocks, kind, block):
    return sum(n in trained for n, k, b in zip(names, kinds, blocks) if k == kind and b == block)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("number", [1, 2, 7, 12])
def test_category_halves(seed, number):
    names, kinds, blocks = layers(number)
    trained = half(names, kinds, blocks, seed)
    ffn = [count(trained, names, kinds, blocks, "ffn", b) for b in range(number)]
    assert all(count(trained, names, kinds, blocks, "attention", b) == 2 for b in range(number))
    assert all(count(trained, names, kinds, blocks, "norm", b) == 1 for b in range(number))
    assert set(ffn) <= {1, 2} and abs(sum(ffn) - 1.5 * number) <= 0.5
    assert abs(len(trained) / len(names) - 0.5) <= 1 / number
    assert trained == half(names, kinds, blocks, seed)


def test_draws_differ_between_seeds_and_reach_every_matrix():
    names, kinds, blocks = layers(4)
    seen = [half(names, kinds, blocks, s) for s in range(40)]
    assert set.union(*seen) == set(names) and len({frozenset(s) for s in seen}) > 30
    rate = np.mean([[n in s for n in names] for s in seen])
    assert 0.45 < rate < 0.55


def test_other_granularities_and_fractions():
    names, kinds, blocks = layers(4)
    whole = half(names, kinds, blocks, 0, granularity="layer")
    assert {b for n, b in zip(names, blocks) if n in whole} and len(whole) == 18
    assert all((n in whole) == (names[9 * b] in whole) for n, b in zip(names, blocks))
    assert len(half(names, kinds, blocks, 0, granularity="model")) == 18
    assert half(names, kinds, blocks, 0, 1.0) == set(names)
    quarter = half(names, kinds, blocks, 0, 0.25)
    assert all(count(quarter, names, kinds, blocks, "attention", b) == 1 for b in range(4))
    assert half([], [], [], 0) == set()


def train(model, method, steps=3, optimizer=None, start=0, ctx=None, lr=0.01):
    parts_params = [p for p in model.network.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(parts_params, lr=lr, weight_decay=0.1)
    for number in range(start, start + steps):
        step = Step(number, 0, model, [], optimizer)
        method.before_step(step, ctx)
        optimizer.zero_grad(set_to_none=True)
        (-model.score(model.collate(ROWS[:6])).logp.mean()).backward()
        optimizer.step()
        method.after_step(step, ctx)
    return optimizer


def test_the_frozen_half_is_bit_identical_and_the_other_moves():
    model = llama(layers=4)
    before = {n: p.detach().clone() for n, p in model.network.named_parameters()}
    method = HFT(seed=3)
    parts = method.attach(model, Context())
    train(model, method)
    moved = {n for n, p in model.network.named_parameters() if not torch.equal(p, before[n])}
    named = {n for g in parts.groups for n in g.params}
    assert moved == named
    for block in range(4):
        inside = [n for n in moved if f"layers.{block}." in n]
        assert sum("self_attn" in n for n in inside) == 2 and sum("layernorm" in n for n in inside) == 1
        assert sum("mlp" in n for n in inside) in (1, 2)
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= moved
    assert method.report["matrices"] == pytest.approx(0.5, abs=0.1)
    assert {g.role for g in parts.groups} == {"embedding", "head", "body"}


def test_embeddings_can_be_frozen():
    model = llama()
    HFT(embed="freeze").attach(model)
    trained = {n for n, p in model.network.named_parameters() if p.requires_grad}
    assert not any(w in n for n in trained for w in ("embed", "lm_head", "model.norm"))


def test_fraction_one_is_full_fine_tuning():
    one, two = llama(), llama()
    method, full = HFT(fraction=1.0), Full()
    method.attach(one)
    full.attach(two)
    train(one, method)
    train(two, full)
    assert all(torch.equal(p, q) for p, q in zip(one.network.parameters(), two.network.parameters()))


def test_stages_and_rounds_draw_anew_and_the_seed_repeats():
    def trained(**kw):
        model = llama(layers=4)
        HFT(**kw.pop("fields", {})).attach(model, Context(**kw))
        return frozenset(n for n, p in model.network.named_parameters() if p.requires_grad)

    assert trained(seed=1) == trained(seed=1) != trained(seed=2)
    assert trained(seed=1, round=1) != trained(seed=1)
    assert trained(seed=1, fields={"seed": 9}) == trained(seed=2, fields={"seed": 9})


@pytest.mark.parametrize("state", ["drop", "keep"])
def test_redraw_by_steps_switches_groups(state):
    model = llama(layers=4)
    method = HFT(redraw="steps", every=2, state=state, embed="freeze")
    parts = method.attach(model, Context())
    first = {n for g in parts.groups if g.active for n in g.params}
    optimizer = torch.optim.AdamW([p for g in parts.groups for p in g.params.values()], lr=0.01)

    def sync():
        for g in parts.groups:
            for p in g.params.values():
                p.requires_grad_(g.active)
                p.grad = None if not g.active else p.grad

    before = {n: p.detach().clone() for n, p in model.network.named_parameters()}
    for number in range(3):
        method.before_step(Step(number, 0, model, parts.groups, optimizer), None)
        sync()
        (-model.score(model.collate(ROWS[:6])).logp.mean()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if number == 1:
            halfway = {n: p.detach().clone() for n, p in model.network.named_parameters()}
            assert {n for n in before if not torch.equal(before[n], halfway[n])} == first
    second = {n for g in parts.groups if g.active for n in g.params}
    assert second != first
    moved = {n for n, p in model.network.named_parameters() if not torch.equal(p, halfway[n])}
    assert moved == second
    stopped = next(g.params[n] for g in parts.groups for n in g.params if n in first - second)
    assert (stopped in optimizer.state) == (state == "keep")
    other = HFT(redraw="steps", every=2)
    twin = llama(layers=4)
    again = other.attach(twin, Context()).groups
    other.load_state_dict(method.state_dict())
    assert {n for g in again if g.active and g.params.keys() <= before.keys() for n in g.params} >= second


def test_redraw_by_epoch():
    model = llama(layers=4)
    method = HFT(redraw="epoch")
    groups = method.attach(model, Context()).groups
    first = [g.active for g in groups]
    method.after_epoch(Step(0, 0, model, groups, torch.optim.SGD(model.network.parameters(), lr=0.1)), None)
    assert [g.active for g in groups] != first and method.draws == 1


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=48, n_positions=64, n_embd=16, n_layer=3, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    model = by_ids(CausalLM(GPT2LMHeadModel(config), None, can_share=False))
    type(model).pad_id = property(lambda self: 0)
    return model


def test_fused_projections_are_halved_by_part(monkeypatch):
    monkeypatch.setattr(CausalLM, "pad_id", property(lambda self: 0))
    model = gpt2()
    found, outside = units(model)
    assert {n for n in found if ".0." in n and "attn" in n} == {f"transformer.h.0.attn.c_attn[{p}]" for p in ("query", "key", "value")} | {"transformer.h.0.attn.c_proj"}
    assert "lm_head.weight" not in {n for p in outside.values() for n in p}, "tied weights count once"
    method = HFT(seed=1)
    method.attach(model, Context())
    before = {n: p.detach().clone() for n, p in model.network.named_parameters()}
    train(model, method)
    for block in range(3):
        changed = []
        for suffix in ("weight", "bias"):
            name = f"transformer.h.{block}.attn.c_attn.{suffix}"
            diff = (model.network.get_parameter(name) != before[name]).view(-1, 3, 16)
            changed.append(tuple(bool(d) for d in diff.any(dim=(0, 2))))
        out = not torch.equal(model.network.get_parameter(f"transformer.h.{block}.attn.c_proj.weight"), before[f"transformer.h.{block}.attn.c_proj.weight"])
        # a key bias has no gradient (softmax is blind to it), so the weights decide
        assert sum(changed[0]) + out == 2
        assert not any(b and not w for b, w in zip(changed[1], changed[0]))


def test_bad_values():
    for bad in ({"fraction": 0.0}, {"fraction": 1.5}, {"granularity": "row"}, {"redraw": "never"}, {"every": 0}, {"embed": "maybe"}):
        with pytest.raises(RecipeError, match=next(iter(bad))):
            HFT(**bad)


def test_full_names_roles_and_freezes():
    model = llama()
    groups = {g.role: g for g in Full().attach(model).groups}
    assert set(groups) == {"embedding", "body", "head"} and set(groups["head"].params) == {"lm_head.weight"}
    assert sum(p.numel() for g in groups.values() for p in g.params.values()) == sum(p.numel() for p in model.network.parameters())
    Full(freeze=["embed", "lm_head"]).attach(model)
    assert not model.network.lm_head.weight.requires_grad
    with pytest.raises(RecipeError, match="freeze"):
        Full(freeze=["model", "lm_head"]).attach(model)
    assert isinstance(model.network, nn.Module)
