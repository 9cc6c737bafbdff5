import itertools

import pytest
import torch

from luthier.core.context import Context
from luthier.core.source import TensorSource
from luthier.errors import RecipeError
from luthier.merge.breadcrumbs import breadcrumbs
from luthier.merge.lines import Lines, depth_scales, lines
from luthier.merge.task_arithmetic import task_arithmetic
from luthier.merge.ties import ties
from luthier.merge.uniform_soup import uniform_soup

NAMES = ["embed.weight", "layers.0.w", "layers.1.w", "layers.2.w", "layers.3.w", "norm.weight"]


def blocks(seed):
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(3, 2, generator=g) for n in NAMES}


def test_the_factor_grows_linearly_from_alpha_to_alpha_plus_beta():
    scales = depth_scales(NAMES, 0.2, 0.6)
    assert [scales[n] for n in NAMES] == pytest.approx([0.2, 0.2, 0.4, 0.6, 0.8, 0.2])
    assert [depth_scales(NAMES, 0, 1, "quadratic")[n] for n in NAMES[1:5]] == pytest.approx([0, 1 / 9, 4 / 9, 1])
    assert [depth_scales(NAMES, 0, 1, "sqrt")[n] for n in NAMES[1:5]] == pytest.approx([0, (1 / 3) ** 0.5, (2 / 3) ** 0.5, 1])
    update = blocks(1)
    scaled = lines(update, 0.2, 0.6)
    assert all(torch.allclose(scaled[n], update[n] * s) for n, s in zip(NAMES, [0.2, 0.2, 0.4, 0.6, 0.8, 0.2]))
    assert depth_scales(["layers.0.w"], 0.1, 0.4)["layers.0.w"] == 0.5


def test_no_scaling_is_the_tuned_model_and_even_scaling_is_interpolation():
    base, tuned = blocks(0), blocks(1)
    whole = Lines(alpha=1.0, beta=0.0).merge(base, [tuned])
    assert all(torch.equal(whole[n], tuned[n]) for n in NAMES)
    even = Lines(alpha=0.3, beta=0.0).merge(base, [tuned])
    for n in NAMES:
        torch.testing.assert_close(even[n], torch.lerp(base[n], tuned[n], 0.3))
    deep = Lines(alpha=0.0).merge(base, [tuned])
    assert torch.equal(deep["layers.3.w"], tuned["layers.3.w"]) and torch.equal(deep["layers.0.w"], base["layers.0.w"])
    assert torch.equal(deep["norm.weight"], base["norm.weight"])


def test_it_commutes_with_sums():
    a, b = blocks(1), blocks(2)
    together = lines({n: a[n] + b[n] for n in NAMES}, 0.2, 0.7)
    for n in NAMES:
        torch.testing.assert_close(together[n], lines(a, 0.2, 0.7)[n] + lines(b, 0.2, 0.7)[n])


def test_alpha_of_several_models_gives_the_shallow_part_the_size_of_the_average():
    base, tuned = blocks(0), [blocks(i) for i in (1, 2, 3)]
    method = Lines(beta=0.4)
    merged = dict(method.merge(base, tuned))
    assert method.report["alpha"] == pytest.approx(1 / 3)
    torch.testing.assert_close(merged["embed.weight"], sum(t["embed.weight"] for t in tuned) / 3)
    scaled = Lines(beta=0.4, after={"method": "task-arithmetic", "scale": 0.5})
    scaled.merge(base, tuned)
    assert scaled.report["alpha"] == pytest.approx(2 / 3)
    wrapped = Lines(beta=0.4, after={"method": "ties", "density": 0.5})
    wrapped.merge(base, tuned)
    vector = ties(base, tuned, 0.5)
    summed = sum(float(sum(t[n] - base[n] for t in tuned).abs().sum()) for n in NAMES)
    assert wrapped.report["alpha"] == pytest.approx(summed / sum(float((vector[n] - base[n]).abs().sum()) for n in NAMES) / 3, rel=1e-5)


@pytest.mark.parametrize(
    ("after", "plain"),
    [
        ("task-arithmetic", lambda b, t: task_arithmetic(b, t)),
        ({"method": "ties", "density": 0.5, "scope": "tensor"}, lambda b, t: ties(b, t, 0.5, scope="tensor")),
        ({"method": "breadcrumbs", "keep": 0.6}, lambda b, t: breadcrumbs(b, t, 0.6)),
        ("uniform-soup", lambda b, t: uniform_soup(t)),
    ],
)  # fmt: skip
def test_any_merger_can_be_wrapped_and_is_scaled_after_it(after, plain):
    base, tuned = blocks(0), [blocks(1), blocks(2)]
    found, merged = Lines(alpha=0.2, beta=0.6, after=after).merge(base, tuned), plain(base, tuned)
    for n, s in zip(NAMES, [0.2, 0.2, 0.4, 0.6, 0.8, 0.2]):
        torch.testing.assert_close(found[n], base[n] + s * (merged[n] - base[n]))


def test_alpha_is_chosen_on_validation_by_target_and_control():
    base, tuned = blocks(0), blocks(1)

    def share(x):
        return float(((x["embed.weight"] - base["embed.weight"]) / (tuned["embed.weight"] - base["embed.weight"])).mean())

    ctx = Context(evaluator=lambda x: 1 - 0.1 * (1 - share(x)) ** 2)
    method = Lines()
    method.merge(base, [tuned], ctx)
    assert method.report["alpha"] == 1.0 and len(method.report["tried"]) == 11
    ctx.helpers["control"] = lambda x: 2 * (1 - 0.1 * share(x) ** 2)
    # 2 (1 - .1 (1 - a)^2) + (1 - .1 a^2): best at a = 2/3, on the grid 0.7
    method.merge(base, [tuned], ctx)
    assert method.report["alpha"] == 0.7 and method.report["beta"] == pytest.approx(0.3)
    Lines(target_weight=0.5).merge(base, [tuned], ctx)
    grid = Lines(grid=[0.25, 0.75])
    grid.merge(base, [tuned], ctx)
    assert grid.report["alpha"] == 0.75
    ctx.evaluator = lambda x: -((1 - share(x)) ** 2)
    ctx.helpers["control"] = lambda x: -(share(x) ** 2)
    method.merge(base, [tuned], ctx)
    assert method.report["alpha"] == 0.7


def test_beta_of_several_models_is_chosen_on_validation():
    base, tuned = blocks(0), [blocks(1), blocks(2)]
    total = sum(t["layers.3.w"] - base["layers.3.w"] for t in tuned)
    ctx = Context(evaluator=lambda x: -abs(float(((x["layers.3.w"] - base["layers.3.w"]) / total).mean()) - 0.5 - 0.6))
    method = Lines()
    method.merge(base, tuned, ctx)
    assert method.report["alpha"] == pytest.approx(0.5) and method.report["beta"] == 0.6


def test_without_validation_rows_the_stated_values_are_used_and_said():
    ctx, method = Context(), Lines()
    method.merge(blocks(0), [blocks(1)], ctx)
    assert (method.report["alpha"], method.report["beta"]) == (0.1, 0.9) and "set `alpha`" in ctx.notices[0]
    method.merge(blocks(0), [blocks(1), blocks(2)])
    assert (method.report["alpha"], method.report["beta"]) == (pytest.approx(0.5), 0.4)
    given = Lines(beta=0.7)
    given.merge(blocks(0), [blocks(1)])
    assert given.report["alpha"] == pytest.approx(0.3)


def test_lazy_order_and_heads(lazily, state, same):
    lazily(lambda base, tuned: Lines(alpha=0.2, beta=0.4).merge(base, tuned))
    base, tuned = state(0), [state(i) for i in (1, 2, 3)]
    results = [dict(Lines(beta=0.5).merge(base, list(p))) for p in itertools.permutations(tuned)]
    for other in results[1:]:
        same(other, results[0], rtol=1e-5, atol=1e-6)
    skipped = Lines(alpha=0.5, skip=["layers.1"], after="uniform-soup").merge(base, tuned)
    assert torch.equal(skipped["layers.1.attn.weight"], base["layers.1.attn.weight"])


def test_half_precision_is_not_rounded_between_merger_and_scale():
    base = {n: t.bfloat16() for n, t in blocks(0).items()}
    tuned = [{n: (base[n].float() + 0.01 * blocks(i)[n]).bfloat16() for n in NAMES} for i in (1, 2)]
    found = Lines(alpha=0.5, beta=0.5).merge(base, tuned)
    for n, s in zip(NAMES, [0.5, 0.5, 2 / 3, 5 / 6, 1.0, 0.5]):
        exact = base[n].double() + s * sum(t[n].double() - base[n].double() for t in tuned)
        assert torch.equal(found[n], exact.bfloat16())


def test_what_is_left_out_does_not_move_the_other_blocks():
    base, tuned = blocks(0), blocks(1)
    found = Lines(alpha=0.2, beta=0.6, skip=["layers.1", "layers.3"]).merge(base, [tuned])
    torch.testing.assert_close(found["layers.2.w"], torch.lerp(base["layers.2.w"], tuned["layers.2.w"], 0.6))
    assert torch.equal(found["layers.3.w"], base["layers.3.w"])


def test_blocks_of_real_models():
    from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel, GPT2Config, GPT2Model

    small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    models = {
        "bert": (BertModel(BertConfig(vocab_size=9, num_hidden_layers=3, **small)), {(i, 3) for i in range(3)}),
        "gpt2": (GPT2Model(GPT2Config(vocab_size=9, n_embd=8, n_layer=4, n_head=1)), {(i, 4) for i in range(4)}),
        "clip": (
            CLIPModel(CLIPConfig(text_config={"num_hidden_layers": 2, "vocab_size": 9, **small}, vision_config={"num_hidden_layers": 3, "image_size": 8, "patch_size": 4, **small})),
            {(0, 2), (1, 2), (0, 3), (1, 3), (2, 3)},
        ),
    }  # fmt: skip
    for model, expected in models.values():
        scales = depth_scales(TensorSource.of(model), 0.1, 0.6)
        assert {round(s, 6) for s in scales.values()} == {round(0.1 + 0.6 * i / (n - 1), 6) for i, n in expected} | {0.1}
    assert scales["text_model.encoder.layers.1.mlp.fc1.weight"] == scales["vision_model.encoder.layers.2.mlp.fc1.weight"] == pytest.approx(0.7)
    assert scales["vision_model.encoder.layers.1.mlp.fc1.weight"] == pytest.approx(0.4)


@pytest.mark.parametrize("bad", [{"alpha": "best"}, {"beta": "max"}, {"after": {"density": 0.2}}])
def test_bad_values(bad):
    with pytest.raises(RecipeError, match="of lines"):
        Lines(**bad)


def test_an_unknown_merger_is_answered_with_the_nearest():
    with pytest.raises(RecipeError, match="Did you mean 'ties'"):
        Lines(after="tiess").merge(blocks(0), [blocks(1)])
