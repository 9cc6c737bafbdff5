import itertools

import pytest
import torch

from luthier.errors import ModelError, RecipeError
from luthier.merge.task_arithmetic import TaskArithmetic, task_arithmetic


def test_the_sum_of_updates(state, same):
    base, tuned = state(0), [state(i) for i in (1, 2, 3)]
    found = dict(TaskArithmetic(scale=0.3, weights=[1.0, -2.0, 0.5]).merge(base, tuned))
    expected = {}
    for name, b in base.items():
        b = b.double().numpy()
        total = sum(w * (t[name].double().numpy() - b) for w, t in zip((1.0, -2.0, 0.5), tuned))
        expected[name] = b + 0.3 * total if name != "steps" else b
    same(found, expected)


def test_one_model_at_scale_one_is_that_model_exactly_and_one_over_t_is_the_average(state, same):
    base, tuned = state(0), [state(i) for i in (1, 2, 3)]
    merged = task_arithmetic(base, [tuned[0]])
    assert all(torch.equal(merged[n], tuned[0][n]) for n in base if n != "steps")
    same(dict(task_arithmetic(base, tuned, 1 / 3)), {n: sum(t[n].double() for t in tuned) / 3 if n != "steps" else base[n] for n in base})


def test_the_order_of_models_does_not_matter(state, same):
    base, tuned = state(0), [state(i) for i in (1, 2, 3)]
    results = [dict(task_arithmetic(base, list(p), 0.4)) for p in itertools.permutations(tuned)]
    for other in results[1:]:
        same(other, results[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(state, dtype):
    base, tuned = state(0, dtype), [state(i, dtype) for i in range(1, 9)]
    merged = task_arithmetic(base, tuned, 0.125)
    for name in set(base) - {"steps"}:
        exact = base[name].double() + 0.125 * sum(t[name].double() - base[name].double() for t in tuned)
        assert merged[name].dtype == dtype
        torch.testing.assert_close(merged[name].double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_lazy(lazily):
    lazily(lambda base, tuned: TaskArithmetic().merge(base, tuned))


def test_heads_stay_the_bases(state):
    base, tuned = state(0), state(1)
    tuned["embed.weight"] = torch.zeros(2, 2)
    merged = TaskArithmetic(skip=["embed"]).merge(base, tuned)
    assert torch.equal(merged["embed.weight"], base["embed.weight"])
    with pytest.raises(ModelError, match=r"'embed\.weight'"):
        TaskArithmetic().merge(base, tuned)


def test_bad_input(state):
    with pytest.raises(RecipeError, match="`weights` has 1 entries, but 2"):
        TaskArithmetic(weights=[1.0]).merge(state(0), [state(1), state(2)])
    with pytest.raises(RecipeError, match="nothing to merge"):
        TaskArithmetic().merge(state(0), [])


def test_lora_folders_merge_as_products(tmp_path, state):
    """Two adapters: the merged weight is base + scale * (B1 A1 + B2 A2), not (B1 + B2)(A1 + A2)."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    base = {k: v.clone() for k, v in model.state_dict().items()}
    name, products = "model.layers.0.self_attn.q_proj", []
    for i in range(2):
        torch.manual_seed(1)
        plain = LlamaForCausalLM(config)
        plain.load_state_dict(base)
        adapted = get_peft_model(plain, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]))
        layer = adapted.base_model.model.get_submodule(name)
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.5 + i)
        torch.nn.init.normal_(layer.lora_A["default"].weight)
        products.append(2.0 * layer.lora_B["default"].weight.detach() @ layer.lora_A["default"].weight.detach())
        adapted.save_pretrained(tmp_path / str(i))
    merged = task_arithmetic(base, [tmp_path / "0", str(tmp_path / "1")], 0.5)
    torch.testing.assert_close(merged[name + ".weight"], base[name + ".weight"] + 0.5 * (products[0] + products[1]))
    assert torch.equal(merged["lm_head.weight"], base["lm_head.weight"])
