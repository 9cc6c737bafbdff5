"""DRIFT: the size and the direction of every push, where it vanishes, what is never pushed, once a step."""

import pytest
import torch

from luthier.core.context import Context
from luthier.core.plugin import Group, Step
from luthier.errors import ModelError, RecipeError
from luthier.optimize.drift import Drift, cosine, drift
from luthier.recipe import Recipe
from luthier.run import tune
from luthier.testing import tiny, toys

MODES = ("absolute", "gradnorm", "adaptive_cosine")


def pair(seed=0, shape=(6, 4)):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g), torch.randn(shape, generator=g)


@pytest.mark.parametrize("mode", MODES)
def test_no_strength_and_no_difference_leave_the_gradient_bitwise(mode):
    g, d = pair()
    assert torch.equal(drift(g, d, 0.0, mode), g)
    assert torch.equal(drift(g, torch.zeros_like(d), 1.0, mode), g)


@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_the_push_of_each_mode(alpha):
    for seed in range(5):
        g, d = pair(seed)
        torch.testing.assert_close(drift(g, d, alpha, "absolute"), g - alpha * d)
        push = drift(g, d, alpha, "gradnorm") - g
        assert push.norm() == pytest.approx(alpha * g.norm().item(), rel=1e-5) and cosine(push, d) == pytest.approx(-1, abs=1e-5)
        adaptive = drift(g, d, alpha) - g
        cos = torch.nn.functional.cosine_similarity(g.flatten(), d.flatten(), dim=0)
        assert (adaptive * d).sum().item() == pytest.approx(-alpha * (cos.item() + 1) / 2 * g.norm().item() * d.norm().item(), rel=1e-4)


def test_the_adaptive_push_vanishes_where_descent_goes_there_already_and_is_whole_where_it_leaves():
    _, d = pair()
    torch.testing.assert_close(drift(-3 * d, d), -3 * d)
    torch.testing.assert_close(drift(3 * d, d), torch.zeros_like(d), atol=1e-5, rtol=0)
    zero = torch.zeros_like(d)
    assert all(torch.equal(drift(zero, d, 1.0, mode), zero) for mode in ("gradnorm", "adaptive_cosine"))


def context(model, sibling, **models):
    return Context(model, models={"reasoner": sibling, **models})


def built(method, model, ctx):
    params = dict(model.network.named_parameters())
    return method.build([Group("body", params)], ctx), params


def test_attention_and_feed_forward_are_pushed_once_and_nothing_else():
    model, other = tiny.tiny_llama(), tiny.tiny_llama(seed=1)
    ctx = context(model, other)
    method = Drift(mode="gradnorm", alpha=0.5)
    optimizer, params = built(method, model, ctx)
    for p in params.values():
        p.grad = torch.ones_like(p)
    method.after_backward(Step(1, 0, model, [], optimizer), ctx)
    pushed = {n for n, p in params.items() if not torch.equal(p.grad, torch.ones_like(p))}
    assert pushed == {n for n in params if "proj" in n} == {p.name for p in method.pulls}
    name = "model.layers.1.mlp.up_proj.weight"
    difference = other.network.get_parameter(name) - params[name]
    expected = 1 - 0.5 * params[name].numel() ** 0.5 * difference / difference.norm()
    torch.testing.assert_close(params[name].grad, expected.detach())
    assert "drift/cosine" in ctx.logged and f"{len(pushed)} of {len(params)}" in ctx.notices[0]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"skip_first": 1}, lambda n: "layers.1" in n and "proj" in n),
        ({"layers": [0]}, lambda n: "layers.0" in n and "proj" in n),
        ({"targets": ["norm", "head"]}, lambda n: "norm" in n or "lm_head" in n),
        ({"targets": ["embedding"]}, lambda n: "embed" in n),
    ],
)
def test_what_is_pushed_can_be_chosen(options, names):
    model = tiny.tiny_llama()
    method = Drift(**options)
    _, params = built(method, model, context(model, tiny.tiny_llama(seed=1)))
    assert {p.name for p in method.pulls} == {n for n in params if names(n)}


def test_a_vision_tower_is_never_pushed():
    model = tiny.tiny_clip()
    method = Drift()
    built(method, model, context(model, tiny.tiny_clip(seed=1)))
    assert method.pulls and all("text_model" in p.name for p in method.pulls)


def test_strengths_by_name_norm_matching_and_the_direction_between_two_models():
    model, one, two = (tiny.tiny_llama(seed=s) for s in range(3))
    method = Drift(alphas={"*.mlp.*": 0.3, "model.layers.1": 0.1}, away_from="other")
    built(method, model, context(model, one, other=two))
    by_name = {p.name: p for p in method.pulls}
    assert by_name["model.layers.0.self_attn.q_proj.weight"].alpha == 1.0 and by_name["model.layers.0.mlp.up_proj.weight"].alpha == 0.3
    assert by_name["model.layers.1.mlp.up_proj.weight"].alpha == 0.1
    name = "model.layers.0.mlp.up_proj.weight"
    difference = (one.network.get_parameter(name) - two.network.get_parameter(name)).detach()
    assert by_name[name].delta.norm() == pytest.approx(model.network.get_parameter(name).norm().item(), rel=1e-5)
    assert cosine(by_name[name].delta, difference) == pytest.approx(1, abs=1e-5)
    plain = Drift(away_from="other", match_norm=False, offload=True)
    built(plain, model, context(model, one, other=two))
    torch.testing.assert_close({p.name: p for p in plain.pulls}[name].delta, difference)


def test_names_are_mapped_on_demand_only():
    model, other = tiny.tiny_llama(), tiny.tiny_llama(seed=1)
    params = {f"wrapped.{n}": p for n, p in model.network.named_parameters()}
    with pytest.raises(RecipeError, match="no partner in 'reasoner'"):
        Drift().build([Group("body", params)], context(model, other))
    method = Drift(names={"wrapped.model.": "model."})
    method.build([Group("body", params)], context(model, other))
    assert len(method.pulls) == 14
    with pytest.raises(ModelError, match="siblings of one architecture"):
        built(Drift(), model, context(model, tiny.tiny_llama(hidden=16)))
    with pytest.raises(ModelError, match="'shallow' has no 'model.layers.1"):
        built(Drift(away_from="shallow"), model, context(model, other, shallow=tiny.tiny_llama(layers=1)))


def runs(folder, optimize, **other):
    plan = toys.recipe({}, "causal-lm", folder)
    plan["train"] |= {"steps": 3}
    return tune(Recipe.from_dict({**plan, "optimize": optimize, **other}))


def test_a_run_moves_toward_the_sibling_and_without_strength_it_is_the_plain_one(tmp_path):
    from luthier.core.models import load, save_network

    sibling = tmp_path / "sibling"
    save_network(tiny.tiny_llama(seed=5), sibling)
    models = {"reasoner": str(sibling)}
    states = {}
    for name, optimize in {
        "plain": {"method": "adamw", "lr": 1e-2}, "none": {"method": "drift", "lr": 1e-2, "alpha": 0.0}, "pushed": {"method": "drift", "lr": 1e-2},
    }.items():  # fmt: skip
        states[name] = load(str(runs(tmp_path / name, optimize, models=models).model_path)).network.state_dict()
    goal = load(str(sibling)).network.state_dict()
    assert all(torch.equal(states["plain"][n], states["none"][n]) for n in goal)
    moving = [n for n in goal if "proj" in n]
    distance = {k: sum((s[n] - goal[n]).square().sum().item() for n in moving) for k, s in states.items()}
    assert distance["pushed"] < distance["plain"]


def test_bad_input():
    for options, words in (
        ({"lr": 0.0}, "'lr'"), ({"alpha": -1.0}, "'alpha'"), ({"mode": "other"}, "'mode'"), ({"targets": ["vision"]}, "'targets'"), ({"skip_first": -1}, "'skip_first'"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=words):
            Drift(**options)
    assert Drift(toward="r2", away_from="r1").needs == {"model:r1", "model:r2"}
