"""LoFiT: nothing changes at zero, exactly the chosen heads move, folding is exact and loads with plain transformers."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from luthier.adapt.lofit import HeadEdits, LoFiT, lofit, strongest
from luthier.core.plugin import Step
from luthier.errors import ModelError, RecipeError
from tests.adapt._rows import ROWS, context, llama
from tests.helpers import tiny_bert, tiny_vit

IDS = torch.tensor([ROWS[4]["ids"], ROWS[9]["ids"]])


def logits(model, **kw):
    with torch.no_grad():
        return model.network(input_ids=IDS, **kw).logits


def run(model, method, steps, lr=0.05):
    ctx = context(model)
    ctx.clock.steps = steps
    parts = method.attach(model, ctx)
    optimizer = torch.optim.AdamW([{"params": list(g.params.values()), "lr": lr * g.lr_scale, "weight_decay": 0.0} for g in parts.groups])
    trained = []
    for number in range(steps):
        step = Step(number, 0, model, parts.groups, optimizer)
        method.before_step(step, ctx)
        for g in parts.groups:
            for p in g.params.values():
                p.requires_grad_(g.active)
        loss = -model.score(model.collate(ROWS)).logp.mean()
        extra = method.penalty(model, ctx)
        (loss + (extra.mean() if extra else 0.0)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        trained.append(sum(p.numel() for p in model.network.parameters() if p.requires_grad))
    return parts, trained


def test_pure_functions():
    z = torch.randn(2, 5, 3, 4)
    scale, offset = torch.randn(3, 4), torch.randn(3, 4)
    torch.testing.assert_close(lofit(z, scale, offset), z * (1 + scale) + offset)
    assert torch.equal(lofit(z, torch.zeros(3, 4), torch.zeros(3, 4)), z) and lofit(z) is z
    found = strongest(torch.tensor([[[3.0, 4.0], [0.0, 1.0]], [[6.0, 0.0], [0.0, 2.0]]]), 3)
    assert found.tolist() == [[1, 0], [0, 0], [1, 1]]


def test_zero_edits_are_bit_equal():
    model, before = llama(), logits(llama())
    method = LoFiT(number=2)
    method.attach(model, context(model))
    with torch.no_grad():
        method._edits.scale.zero_()
    assert torch.equal(logits(model), before)
    chosen = llama()
    known = LoFiT(heads=[[0, 1], [1, 3]])
    known.attach(chosen)
    with torch.no_grad():
        known._edits.offset.zero_()
    assert torch.equal(logits(chosen), before)


def test_the_edit_acts_on_head_outputs_before_the_projection():
    model = llama()
    method = LoFiT(heads=[[1, 2]])
    method.attach(model)
    offset = method._edits.offset.detach()[0]
    seen = {}
    site = model.network.model.layers[1].self_attn.o_proj
    handle = site.register_forward_hook(lambda m, x, y: seen.update(x=x[0], y=y))
    plain = llama()
    plain_seen = {}
    plain.network.model.layers[1].self_attn.o_proj.register_forward_hook(lambda m, x, y: plain_seen.update(x=x[0], y=y))
    logits(model), logits(plain)
    handle.remove()
    dim = len(offset)
    change = seen["y"] - plain_seen["y"]
    torch.testing.assert_close(change, (site.weight[:, 2 * dim : 3 * dim] @ offset).expand_as(change), atol=1e-6, rtol=1e-4)
    others = [i for i in range(16) if not 2 * dim <= i < 3 * dim]
    torch.testing.assert_close(seen["x"][..., others], plain_seen["x"][..., others])


def test_two_steps_learn_k_heads():
    model = llama(layers=3)
    method = LoFiT(number=2, select_share=0.5, l1=1e-3)
    parts, trained = run(model, method, 8)
    dim = 4
    assert trained == [3 * 4 * dim] * 4 + [2 * dim] * 4
    assert not method._edits.scale.any() and not method.selecting
    assert len(method.report["heads"]) == 2 and torch.tensor(method.report["norms"]).shape == (3, 4)
    norms = torch.tensor(method.report["norms"]).flatten()
    top = {(int(i) // 4, int(i) % 4) for i in norms.topk(2).indices}
    assert {tuple(h) for h in method.report["heads"]} == top
    assert [g.active for g in parts.groups] == [False, True]
    assert method.penalty(model) is None
    only = {n for n, p in model.network.named_parameters() if p.requires_grad}
    assert only == {"lofit.offset"}


def test_penalty_is_l1_of_all_scales():
    model = llama()
    method = LoFiT(number=1, l1=0.01)
    method.attach(model, context(model))
    value = method.penalty(model).mean()
    torch.testing.assert_close(value, 0.01 * method._edits.scale.abs().sum())
    assert LoFiT(number=1, l1=0.0).attach(llama(), context()) and float(method._edits.scale.std()) == pytest.approx(1e-3, rel=0.5)


@pytest.mark.parametrize("steps", [3, 8])
def test_folding_equals_the_hooks_and_is_undone(steps):
    """After 3 of 8 steps scales are still being learned: they fold as well."""
    model = llama()
    method = LoFiT(number=3, select_share=0.5 if steps == 8 else 0.99)
    run(model, method, steps)
    before, names = logits(model), set(model.network.state_dict())
    assert float((before - logits(llama())).abs().max()) > 1e-4
    with method.folded(model):
        torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-4)
        assert model.config.attention_bias and "lofit.offset" not in model.network.state_dict()
        generated = model.network.generate(input_ids=IDS[:1, :4], max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert not model.config.attention_bias and set(model.network.state_dict()) == names
    assert torch.equal(logits(model), before)
    again = model.network.generate(input_ids=IDS[:1, :4], max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(generated, again)
    with method.disabled(model):
        assert torch.equal(logits(model), logits(llama()))


def test_the_folded_model_loads_with_plain_transformers(tmp_path):
    model = llama()
    method = LoFiT(number=3)
    run(model, method, 6)
    before = logits(model)
    with method.folded(model):
        model.network.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=IDS).logits, before, atol=1e-5, rtol=1e-4)
    assert loaded.model.layers[0].self_attn.o_proj.bias is not None


def test_copies_and_controls():
    model = llama()
    method = LoFiT(selection="all")
    method.attach(model)
    assert len(method._edits.heads) == 8
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), logits(model))
    with torch.no_grad():
        copied.network.lofit.offset.add_(1.0)
    assert not torch.equal(logits(copied), logits(model))
    drawn = []
    for seed in (0, 0, 1):
        ctx = context()
        ctx.seed = seed
        one = LoFiT(selection="random", number=3)
        one.attach(llama(), ctx)
        drawn.append(one.report["heads"])
    assert drawn[0] == drawn[1] != drawn[2] and len({tuple(h) for h in drawn[0]}) == 3


def test_encoders_have_biases_already():
    for model in (tiny_bert(classes=3), tiny_vit()):
        method = LoFiT(heads=[[0, 1]])
        method.attach(model)
        with torch.no_grad():
            method._edits.offset.fill_(0.5)
        inputs = {"input_ids": torch.tensor([[1, 7, 9, 2]])} if model.kind == "text-encoder" else {"pixel_values": torch.randn(1, 3, 12, 12)}
        with torch.no_grad():
            before = model.network(**inputs).logits
            with method.folded(model):
                torch.testing.assert_close(model.network(**inputs).logits, before, atol=1e-5, rtol=1e-4)


def test_refusals():
    for bad in ({"number": 0}, {"select_share": 1.0}, {"l1": -1.0}, {"selection": "best"}, {"heads": [[1]]}):
        with pytest.raises(RecipeError, match=next(iter(bad))):
            LoFiT(**bad)
    with pytest.raises(RecipeError, match="layer 7"):
        LoFiT(heads=[[7, 0]]).attach(llama())
    with pytest.raises(RecipeError, match="8 heads"):
        LoFiT(number=99).attach(llama())
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = llama()
    model.network = Qwen2ForCausalLM(Qwen2Config(vocab_size=48, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2))
    with pytest.raises(ModelError, match="bias"):
        LoFiT(number=1).attach(model)
    assert HeadEdits(2, 3, 4, 1).offsets(0) is None
