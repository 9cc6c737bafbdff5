import pytest
import torch

from luthier.core.context import Context
from luthier.core.source import TensorSource
from luthier.errors import ModelError, RecipeError
from luthier.merge.portllm import PortLLM, cosine, make_patch, portllm
from luthier.testing import tiny


def test_an_unchanged_base_gives_the_fine_tune_bit_for_bit(state):
    for dtype in (torch.float32, torch.bfloat16):
        base, tuned = state(0, dtype), state(1, dtype)
        ported = portllm(make_patch(base, tuned), base)
        assert all(torch.equal(ported[n], tuned[n]) for n in base if base[n].is_floating_point()) and ported["steps"] == 0
        assert all(torch.equal(ported[n], PortLLM().merge(base, [tuned])[n]) for n in base)


def test_porting_commutes_with_the_evolution_of_the_base(state, same):
    old, new, tuned = state(0), state(1), state(2)
    ported, other = dict(portllm(make_patch(old, tuned), new)), dict(portllm(make_patch(old, new), tuned))
    ported["steps"] = other["steps"]
    same(ported, other)
    torch.testing.assert_close(ported["norm.weight"], new["norm.weight"] + (tuned["norm.weight"] - old["norm.weight"]))


def test_both_ways_to_name_the_other_base_are_the_same(same):
    old, new, tuned = tiny.tiny_llama(), tiny.tiny_llama(seed=1), tiny.tiny_llama(seed=2)
    states = [dict(f.network.state_dict()) for f in (old, new, tuned)]
    expected = {n: states[1][n] + (states[2][n] - states[0][n]) for n in states[0]}
    one = PortLLM(old="before").merge(states[1], [states[2]], Context(new, models={"before": old}))
    two = PortLLM(onto="after").merge(states[0], [states[2]], Context(old, models={"after": new}))
    same(dict(one), expected)
    same(dict(two), expected)


def test_a_lora_folder_is_ported_as_peft_would(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    old, new = tiny.tiny_llama(), tiny.tiny_llama(seed=1)
    before = {n: t.clone() for n, t in new.network.state_dict().items()}
    adapted = get_peft_model(old.network, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]))
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(len(name)))
    adapted.save_pretrained(tmp_path)
    ported = PortLLM().merge(before, [TensorSource.of(tmp_path, before)])
    loaded = PeftModel.from_pretrained(new.network, tmp_path).merge_and_unload().state_dict()
    assert all(torch.allclose(ported[n], loaded[n], atol=1e-6) for n in before)
    assert not torch.equal(ported["model.layers.0.self_attn.q_proj.weight"], before["model.layers.0.self_attn.q_proj.weight"])
    assert torch.equal(ported["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])


def test_several_patches_add_up_and_scale(state):
    base, one, two = state(0), state(1), state(2)
    merged = PortLLM(scale=0.5).merge(base, [one, two])
    torch.testing.assert_close(merged["scale"], base["scale"] + 0.5 * (one["scale"] - base["scale"] + two["scale"] - base["scale"]))


def test_the_scale_is_chosen_on_validation_rows(state):
    base, tuned = state(0), state(1)
    goal = base["norm.weight"] + 0.75 * (tuned["norm.weight"] - base["norm.weight"])
    ctx = Context(evaluator=lambda s: -float((s["norm.weight"] - goal).abs().sum()))
    method = PortLLM(scale="auto")
    torch.testing.assert_close(method.merge(base, [tuned], ctx)["norm.weight"], goal)
    assert method.report["scale"] == 0.75 and len(method.report["tried"]) == 7
    assert "neither `old` nor `onto`" in ctx.notices[0]


def test_patches_against_the_evolution_can_be_left_out():
    # old 0; the base went (+1, +1), the patch goes the same way in `a` and back in `b`
    old = {"a": torch.zeros(2), "b": torch.zeros(2)}
    family = tiny.tiny_llama()
    family.network.state_dict = lambda *args, **kw: old  # the named model is these two tensors
    new, tuned = {"a": torch.ones(2), "b": torch.ones(2)}, {"a": torch.full((2,), 0.5), "b": torch.full((2,), -0.5)}
    method = PortLLM(old="old", drop_below=-0.5)
    merged = method.merge(new, [tuned], Context(models={"old": family}))
    assert merged["a"].tolist() == [1.5, 1.5] and merged["b"].tolist() == [1.0, 1.0]
    assert method.report["dropped"] == ["b"] and method.report["cosines"]["a"] == pytest.approx(1.0)
    assert cosine(torch.zeros(3), torch.ones(3)) == 0.0


def test_what_does_not_fit_is_refused(state):
    old, tuned = state(0), state(1)
    wider = state(2) | {"embed.weight": torch.zeros(9, 4)}
    with pytest.raises(ModelError, match=r"'embed.weight' is \[7, 4\] in the patch and \[9, 4\] in the new base. Its vocabulary was resized"):
        dict(portllm(make_patch(old, tuned), wider))
    fewer = {n: t for n, t in state(2).items() if n != "norm.weight"}
    with pytest.raises(ModelError, match="changes 'norm.weight'"):
        portllm(make_patch(old, tuned), fewer)
    shared = torch.zeros(4)
    tied, untied = {"in": shared, "out": shared}, {"in": torch.zeros(4), "out": torch.ones(4)}
    with pytest.raises(ModelError, match="one tensor in the new base"):
        portllm({"in": torch.zeros(4), "out": torch.ones(4)}, tied)
    with pytest.raises(ModelError, match="one tensor in the old base"):
        portllm(make_patch(tied, dict.fromkeys(tied, torch.ones(4))), untied)


def test_another_tokenizer_is_refused():
    new, old = tiny.tiny_llama(), tiny.tiny_llama(seed=1)
    old.processor = tiny.tiny_tokenizer(50)
    with pytest.raises(ModelError, match="another tokenizer"):
        PortLLM(old="old").merge(new.network.state_dict(), [old.network.state_dict()], Context(new, models={"old": old}))


def test_bad_input(state):
    for options, words in (({"old": "a", "onto": "b"}, "not both"), ({"scale": "big"}, "`scale` of portllm"), ({"drop_below": 2.0}, "between -1 and 1"), ({"drop_below": 0.0}, "name the other base")):
        with pytest.raises(RecipeError, match=words):
            PortLLM(**options)
    with pytest.raises(RecipeError, match="validation rows"):
        PortLLM(scale="auto").merge(state(0), [state(1)])
    with pytest.raises(ModelError):
        PortLLM(old="/no/such/folder").merge(state(0), [state(1)])
