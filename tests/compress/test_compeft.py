import json
import math

import numpy as np
import pytest
import torch
from safetensors import safe_open
from scipy.stats import entropy

from luthier.compress._shared import entropy_bits, rice_bits, rice_decode, rice_encode, rice_parameter
from luthier.compress.compeft import ComPEFT, Masks, compeft, decode, encode, load_packed, save_packed
from luthier.core.context import Context
from luthier.core.families import CausalLM
from luthier.core.source import TensorSource
from luthier.errors import ModelError, RecipeError


def update(seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return {n: (0.02 * torch.randn(s, generator=g)).to(dtype) for n, s in {"b.B": (30, 4), "a.A": (4, 50), "c": (7,)}.items()}


def flat(tensors):
    return torch.cat([tensors[n].flatten() for n in sorted(tensors)])


# the mathematics ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("density", "alpha"), [(0.05, 1.0), (0.2, 4.0), (0.5, 0.5), (1.0, 2.0)])
def test_three_values_of_which_exactly_the_largest_are_signs(density, alpha):
    tau = update()
    done, before = flat(compeft(tau, density, alpha)), flat(tau)
    k = int(density * len(before))
    expected = np.zeros(len(before))
    top = np.argsort(-before.abs().numpy(), kind="stable")[:k]
    expected[top] = alpha * np.std(before.double().numpy(), ddof=1) * np.sign(before.numpy()[top])
    np.testing.assert_allclose(done, expected, rtol=1e-6)
    assert len(done.unique()) == (3 if density < 1 else 2)
    assert done.count_nonzero() == k


def test_the_released_threshold_keeps_one_entry_more_and_all_ties():
    tau = update()
    d = flat(tau)
    threshold = d.abs().kthvalue(len(d) - int(len(d) * 0.2)).values
    assert torch.equal(flat(compeft(tau, 0.2, ties="keep")) != 0, d.abs() >= threshold)
    equal = {"w": torch.tensor([1.0, -1.0, 1.0, -1.0])}
    assert compeft(equal, 0.5, ties="keep")["w"].count_nonzero() == 4
    assert compeft(equal, 0.5)["w"].nonzero()[:, 0].tolist() == [0, 1]


def test_pruning_keeps_values_and_keeping_all_is_the_identity():
    tau = update()
    pruned = compeft(tau, 0.3, mode="prune")
    kept = flat(pruned) != 0
    assert kept.sum() == int(0.3 * len(kept)) and torch.equal(flat(pruned)[kept], flat(tau)[kept])
    assert all(torch.equal(compeft(tau, 1.0, mode="prune")[n], tau[n]) for n in tau)


def test_stc_shares_the_mean_magnitude_of_what_is_kept():
    tau = update()
    done, before = flat(compeft(tau, 0.3, mode="stc")), flat(tau)
    kept = done != 0
    torch.testing.assert_close(done[kept].abs(), before[kept].abs().mean().expand(int(kept.sum())))
    assert torch.equal(done[kept].sign(), before[kept].sign())


def test_types_integers_zeros_and_inputs():
    tau = update(dtype=torch.bfloat16) | {"n": torch.tensor([3, 4])}
    done = compeft(tau, 0.2)
    assert all(done[n].dtype == tau[n].dtype and done[n].shape == tau[n].shape for n in tau) and torch.equal(done["n"], tau["n"])
    assert all(torch.equal(tau[n], update(dtype=torch.bfloat16)[n]) for n in update())
    assert not compeft({"w": torch.zeros(5)}, 0.4)["w"].any()
    mostly = compeft({"w": torch.tensor([0.0, 0.0, 3.0, 0.0])}, 1.0, mode="stc")["w"]
    assert mostly.tolist() == [0.0, 0.0, 3.0, 0.0]


# packing ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("density", [0.0, 0.01, 0.05, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_decode_gives_the_update_back_bit_for_bit(tmp_path, density, dtype):
    tau = compeft(update(dtype=dtype), density, 1.7)
    packed = encode(tau)
    save_packed(packed, tmp_path / "x.safetensors", {"head": torch.arange(3)})
    loaded = load_packed(tmp_path / "x.safetensors")
    assert torch.equal(loaded.pop("head"), torch.arange(3))
    for again in (decode(packed), loaded):
        assert set(again) == set(tau)
        assert all(again[n].dtype == dtype and torch.equal(again[n], tau[n]) for n in tau)


@pytest.mark.parametrize("density", [0.02, 0.05, 0.1, 0.2, 0.3, 0.5])
def test_the_code_is_within_five_percent_of_the_entropy(density):
    rng = np.random.default_rng(0)
    values = (rng.random(200_000) < density) * rng.choice([-0.5, 0.5], 200_000)
    packed = encode({"w": torch.from_numpy(values)})
    k = np.mean(values != 0)
    bound = entropy([1 - k, k / 2, k / 2], base=2) * len(values) + 16
    assert packed.entropy_bound == pytest.approx(bound, rel=1e-9)
    assert 0.999 * bound <= packed.bits <= 1.05 * bound


def test_the_papers_figures():
    assert entropy_bits(0.05) == pytest.approx(0.336, abs=1e-3) and 16 / entropy_bits(0.05) == pytest.approx(47, abs=1)
    # mean gap bits b + 1 / (1 - (1 - k)^(2^b)), by summing over the geometric distribution of gaps
    for k in (0.05, 0.2):
        b = rice_parameter(k)
        gaps = np.arange(5000)
        mean = (k * (1 - k) ** gaps * [rice_bits(np.array([g]), b) for g in gaps]).sum()
        assert mean == pytest.approx(b + 1 / (1 - (1 - k) ** 2**b), rel=1e-6)
        assert all(mean <= (k * (1 - k) ** gaps * [rice_bits(np.array([g]), o) for g in gaps]).sum() for o in (b - 1, b + 1))


@pytest.mark.parametrize("low", [0, 1, 5])
def test_rice_codes_round_trip(low):
    gaps = np.random.default_rng(0).geometric(0.1, 300) - 1
    unary, rest = rice_encode(gaps, low)
    assert np.array_equal(rice_decode(unary, rest, low, len(gaps)), gaps)
    assert rice_bits(gaps, low) == sum(int(g) // 2**low + 1 + low for g in gaps) and abs(8 * (len(unary) + len(rest)) - rice_bits(gaps, low)) < 16
    with pytest.raises(ValueError, match="cut short"):
        rice_decode(unary[:3], rest, low, len(gaps))


def test_products_by_counting_bits_are_the_products():
    a, b = compeft(update(1), 0.3, 2.0), compeft(update(2), 0.4)
    assert Masks.of(a).dot(Masks.of(b)) == pytest.approx(float(flat(a).double() @ flat(b).double()), rel=1e-6)
    assert Masks.of(a).differing(Masks.of(b)) == int((flat(a).sign() != flat(b).sign()).sum())
    assert len(Masks.of(a).plus) * 8 >= 327


def test_what_is_not_ternary_or_not_packed_is_refused(tmp_path):
    with pytest.raises(ModelError, match="more than one magnitude"):
        encode(update())
    TensorSource.of({"w": torch.ones(2)}).save(tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="not a packed update"):
        load_packed(tmp_path / "x.safetensors")
    packed = encode(compeft(update(), 0.2))
    packed.shapes = [(2,), (2,), (2,)]
    save_packed(packed, tmp_path / "y.safetensors")
    with pytest.raises(ModelError, match="beyond the tensors"):
        load_packed(tmp_path / "y.safetensors")


# the method ---------------------------------------------------------------------------------------------------------------
def network(seed=0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1))


def adapted(kind="lora"):
    from peft import IA3Config, LoraConfig, get_peft_model

    config = {
        "lora": LoraConfig(r=4, target_modules=["q_proj", "up_proj"], modules_to_save=["norm"]),
        "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    }[kind]
    family = CausalLM(get_peft_model(network(), config), None)
    for name, p in family.network.named_parameters():
        if "lora_B" in name or "ia3_" in name:
            torch.nn.init.normal_(p, mean=1.0 if "ia3_" in name else 0.0, std=0.1)
    return family


def tensors_of(family):
    from peft import get_peft_model_state_dict

    return {n: t.detach().clone() for n, t in get_peft_model_state_dict(family.network).items()}


def test_a_bare_update_and_its_account():
    tau = update()
    method = ComPEFT(density=0.1, alpha=3.0)
    done = method.compress(tau)
    assert all(torch.equal(done[n], compeft(tau, 0.1, 3.0)[n]) for n in tau)
    report = method.report
    assert report["bytes_before"] == 4 * 327 and report["kept"] == 32 and report["ratio"] == report["bytes_before"] / report["bytes_after"] > 20
    assert report["entropy_bound_bytes"] <= report["bytes_after"] * 1.01
    json.dumps(report)


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_an_adapter_is_compressed_as_released(tmp_path, kind):
    family = adapted(kind)
    before = tensors_of(family)
    method = ComPEFT(density=0.25, alpha=2.0)
    lighter = method.compress(family, Context(family, folder=tmp_path))
    after = tensors_of(lighter)
    own = {n: t for n, t in before.items() if "lora_" in n or "ia3_" in n}
    reference = 1.0 if kind == "ia3" else 0.0
    expected = compeft({n: t - reference for n, t in own.items()}, 0.25, 2.0)
    for n in before:
        torch.testing.assert_close(after[n], expected[n] + reference if n in own else before[n])
    assert all(torch.equal(t, before[n]) for n, t in tensors_of(family).items()) and lighter is not family
    stored = load_packed(tmp_path / "compeft.safetensors")
    assert set(stored) == set(before)
    for n in own:
        torch.testing.assert_close(stored[n] + reference, after[n])
    with safe_open(tmp_path / "compeft.safetensors", "pt") as file:
        assert sum(file.get_tensor(k).numel() for k in ("packed.unary", "packed.rest", "packed.signs")) <= method.report["bytes_after"] + 3
    assert method.report["file"].endswith("compeft.safetensors")
    assert torch.isfinite(lighter.network(input_ids=torch.tensor([[1, 2, 3]])).logits).all()


def test_an_adapter_measured_from_where_training_began():
    family = adapted()
    method = ComPEFT(density=0.5, reference="init")
    with pytest.raises(RecipeError, match="where training began"):
        method.compress(family)
    start = tensors_of(family)
    method.attach(family)
    again = ComPEFT(density=0.5, reference="init")
    again.load_state_dict(method.state_dict())
    with torch.no_grad():
        for name, p in family.network.named_parameters():
            if "lora_" in name:
                p += 0.1 * torch.randn(p.shape)
    tuned = tensors_of(family)
    own = [n for n in start if "lora_" in n]
    expected = compeft({n: tuned[n] - start[n] for n in own}, 0.5)
    found = tensors_of(again.compress(family))
    for n in own:
        torch.testing.assert_close(found[n], start[n] + expected[n])


def test_a_whole_model_is_compressed_as_its_difference_to_the_base(tmp_path):
    base, tuned = CausalLM(network(0), None), CausalLM(network(1), None)
    a, b = base.network.state_dict(), {n: t.clone() for n, t in tuned.network.state_dict().items()}
    method = ComPEFT(density=0.3, skip=["lm_head"])
    lighter = method.compress(tuned, Context(tuned, models={"base": base}, folder=tmp_path)).network.state_dict()
    expected = compeft({n: b[n] - a[n] for n in b if n != "lm_head.weight"}, 0.3)
    for n in b:
        torch.testing.assert_close(lighter[n], a[n] + expected[n] if n in expected else b[n])
    assert all(torch.equal(t, b[n]) for n, t in tuned.network.state_dict().items())
    stored = load_packed(tmp_path / "compeft.safetensors")
    assert torch.equal(stored["lm_head.weight"], b["lm_head.weight"])
    identity = ComPEFT(density=1.0, mode="prune").compress(tuned, Context(tuned, models={"base": base})).network.state_dict()
    assert all(torch.equal(identity[n], b[n]) for n in b)
    with pytest.raises(RecipeError, match="needs the base"):
        method.compress(tuned)


def test_density_and_alpha_are_chosen_on_validation():
    family = adapted()
    asked = []

    def evaluator(source):
        delta = source["model.layers.0.self_attn.q_proj.weight"] - family.network.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
        asked.append(float(delta.detach().norm()))
        return -abs(asked[-1] - 0.5)

    method = ComPEFT(density="auto", alpha="auto", densities=[0.2, 0.5], alphas=[0.5, 1.0, 2.0])
    lighter = method.compress(family, Context(family, evaluator=evaluator))
    assert len(asked) == 6 and len(set(asked)) == 6
    best = method.report["tried"][int(np.argmin([abs(a - 0.5) for a in asked]))]
    assert (method.report["density"], method.report["alpha"]) == (best["density"], best["alpha"])
    own = {n: t for n, t in tensors_of(family).items() if "lora_" in n}
    expected = compeft(own, best["density"], best["alpha"])
    for n, t in tensors_of(lighter).items():
        if n in own:
            torch.testing.assert_close(t, expected[n])
    with pytest.raises(RecipeError, match="bare update"):
        ComPEFT(alpha="auto").compress(update())
    with pytest.raises(RecipeError, match=r"data: \{val: FILE\}"):
        ComPEFT(alpha="auto").compress(family)


def test_compressed_updates_merge():
    from luthier.merge.task_arithmetic import task_arithmetic

    base = {n: torch.zeros_like(t) for n, t in update().items()}
    parts = [compeft(update(i), 0.3) for i in (1, 2)]
    merged = task_arithmetic(base, parts, 0.5)
    torch.testing.assert_close(flat(merged), 0.5 * (flat(parts[0]) + flat(parts[1])))


@pytest.mark.parametrize(("field", "value"), [("density", 20), ("density", 0), ("density", "most"), ("alpha", -1.0), ("alpha", "big")])
def test_bad_values(field, value):
    with pytest.raises(RecipeError, match=f"`{field}` of compeft is"):
        ComPEFT(**{field: value})


def test_the_deviation_is_taken_before_cutting_and_over_the_whole_vector():
    tau = {"small": torch.full((90,), 0.01), "large": torch.tensor([1.0, -1.0] * 5)}
    done = compeft(tau, 0.1)
    everything = np.concatenate([np.full(90, 0.01), [1.0, -1.0] * 5])
    assert float(done["large"].abs().max()) == pytest.approx(math.sqrt(((everything - everything.mean()) ** 2).sum() / 99), rel=1e-6)
    assert not done["small"].any()
