import pytest
import torch

from luthier.core.at_weights import at_weights, pull_back
from luthier.core.context import Context
from luthier.core.mask_learning import concrete_gate
from luthier.core.rows import Rows
from luthier.errors import DataError, ModelError, RecipeError
from luthier.merge._shared import deltas
from luthier.merge.somf import SOMF, _fused, pair_logps, preference_loss, somf
from luthier.merge.task_arithmetic import TaskArithmetic, task_arithmetic
from luthier.merge.ties import Ties, ties
from luthier.testing import tiny, toys

PAIRS = frozenset({"prompt", "chosen", "rejected"})


def ones(state):
    return {n: torch.ones(t.shape) for n, t in state.items() if t.is_floating_point()}


def test_a_full_mask_is_the_tuned_model_and_an_empty_one_the_safe_model_to_the_bit(state):
    base, tuned = state(0), state(1)
    everything, nothing = somf(base, tuned, ones(base)), somf(base, tuned, {n: 0 * m for n, m in ones(base).items()})
    for name in base:
        assert torch.equal(nothing[name], base[name])
        assert torch.equal(everything[name], tuned[name] if base[name].is_floating_point() else base[name])


def test_the_formula_by_hand(state):
    base, tuned = state(0), state(1)
    mask = {n: (torch.rand(t.shape, generator=torch.Generator().manual_seed(2)) < 0.6).float() for n, t in base.items() if t.is_floating_point() and t.ndim}
    merged = somf(base, tuned, mask)
    for name, m in mask.items():
        torch.testing.assert_close(merged[name], base[name] + m * (tuned[name] - base[name]) / m.mean())
        assert torch.equal(merged[name][m == 0], base[name][m == 0])
    assert torch.equal(merged["scale"], tuned["scale"])


def test_several_models_share_the_mask_and_a_full_one_leaves_the_plain_merger(state, same):
    base, tuned = state(0), [state(1), state(2)]
    same(dict(somf(base, tuned, ones(base), TaskArithmetic(scale=0.3))), dict(task_arithmetic(base, tuned, 0.3)))
    same(dict(somf(base, tuned, ones(base), Ties(scale=0.4))), dict(ties(base, tuned, scale=0.4)))
    mask = {"norm.weight": torch.tensor([1.0, 0.0, 1.0, 0.0])}
    merged = somf(base, tuned, mask, TaskArithmetic(scale=0.3))["norm.weight"]
    moved = sum(t["norm.weight"] - base["norm.weight"] for t in tuned)
    torch.testing.assert_close(merged, base["norm.weight"] + 0.3 * 2 * mask["norm.weight"] * moved)


RELEASED = [
    {"method": "task-arithmetic", "scale": 0.3}, {"method": "ties", "scale": 0.4, "combine": "sum", "density": 0.5},
    {"method": "dare-linear", "scale": 0.3, "density": 0.8, "rescale": "density"},
]  # fmt: skip
ALSO = [{"method": "dare-ties", "density": 0.8}, {"method": "della", "density": 0.7}, {"method": "model-stock"}]


@pytest.mark.parametrize("fuse", [SOMF(fuse=one).merger() for one in RELEASED + ALSO])
def test_the_gradient_of_the_mask_logits_is_that_of_finite_differences(state, fuse):
    base, tuned = state(0), [state(1), state(2)]
    updates = deltas(base, tuned)
    name, u = "layers.0.attn.weight", torch.rand(5, 4, generator=torch.Generator().manual_seed(1)).double()
    probe = torch.randn(5, 4, generator=torch.Generator().manual_seed(4)).double()

    def value(phi):
        return (_fused(updates, {name: concrete_gate(phi, u, 0.5)}, fuse)[name] * probe).sum()

    phi = torch.zeros(5, 4, dtype=torch.double, requires_grad=True)
    value(phi).backward()
    step = 1e-2  # rescaling happens in fp32
    for at in [(0, 0), (2, 3), (4, 1)]:
        shifted = torch.zeros(5, 4, dtype=torch.double)
        shifted[at] = step
        difference = (float(value(shifted)) - float(value(-shifted))) / (2 * step)
        assert float(phi.grad[at]) == pytest.approx(difference, rel=2e-2, abs=2e-4)


def models(seed=1, scale=0.05):
    family = tiny.tiny_llama()
    base = {n: t.clone() for n, t in family.network.state_dict().items()}
    rng = torch.Generator().manual_seed(seed)
    return family, base, {n: t + scale * torch.randn(t.shape, generator=rng) if "layers" in n else t for n, t in base.items()}


def test_the_loss_is_dpo_at_those_weights():
    family, _, tuned = models()
    rows = toys.rows(PAIRS, 4)
    batch = family.collate(rows)
    with torch.no_grad():
        reference = pair_logps(family, batch)
        with at_weights(family.network, tuned):
            policy = pair_logps(family, batch)
    gap = (policy - reference)[:, 0] - (policy - reference)[:, 1]
    expected = -torch.nn.functional.logsigmoid(0.1 * gap).mean()
    weights = {n: t.clone().requires_grad_() for n, t in tuned.items()}
    with family.evaluating(grad=True):
        found = pull_back(family.network, weights, [lambda: preference_loss(family, batch, reference)])
    assert found == pytest.approx(float(expected), rel=1e-5)
    assert torch.isfinite(weights["model.layers.0.mlp.up_proj.weight"].grad).all()


def run(method, family, base, tuned, n=12):
    ctx = Context(family, streams={"safety": Rows.of(toys.rows(PAIRS, n))})
    return method.merge(base, tuned, ctx), ctx


def margin(family, tensors, rows):
    with at_weights(family.network, tensors), torch.no_grad():
        sums = pair_logps(family, family.collate(rows))
    return float((sums[:, 0] - sums[:, 1]).mean())


def test_learning_prefers_the_safe_answers_and_touches_only_what_was_tuned():
    family, base, tuned = models()
    method = SOMF(epochs=10, lr=0.1)
    merged, ctx = run(method, family, base, [tuned])
    rows = list(ctx.rows("safety"))
    assert margin(family, dict(merged), rows) > margin(family, tuned, rows) + 0.1
    assert sum(method.report["losses"][-3:]) < sum(method.report["losses"][:3]) and len(method.report["losses"]) == 10
    assert 0.2 < method.report["density"] < 0.8 and not any("embed" in n or "lm_head" in n for n in method.report["by_tensor"])
    for name, t in base.items():
        left = merged[name] == t
        assert bool(left.all()) if "layers" not in name else 0 < int(left.sum()) < t.numel() or t.ndim < 2
    assert all(torch.equal(t, base[n]) for n, t in family.network.state_dict().items()) and all(p.grad is None for p in family.network.parameters())


def test_one_model_does_not_depend_on_the_weight_of_the_merger_and_two_are_fused():
    family, base, tuned = models()
    one, _ = run(SOMF(fuse={"method": "task-arithmetic", "scale": 0.3}), family, base, [tuned])
    two, _ = run(SOMF(fuse={"method": "task-arithmetic", "scale": 0.9}), family, base, [tuned])
    assert all(torch.equal(one[n], two[n]) for n in base)
    for fuse in ("ties", {"method": "task-arithmetic", "scale": 0.3}):
        merged, _ = run(SOMF(fuse=fuse), family, base, [tuned, models(2)[2]])
        assert all(torch.isfinite(merged[n]).all() for n in base) and any(not torch.equal(merged[n], base[n]) for n in base)


@pytest.mark.parametrize(("final", "binary"), [("threshold", True), ("sample", True), ("soft", False)])
def test_the_final_mask_is_binary_or_soft(final, binary):
    family, base, tuned = models()
    merged, _ = run(SOMF(final=final, reference="safe"), family, base, [tuned])
    name = "model.layers.0.mlp.up_proj.weight"
    ratio = (merged[name] - base[name]) / (tuned[name] - base[name])
    found = len((ratio[(tuned[name] - base[name]).abs() > 0.01] * 1000).round().unique())
    assert (found == 2) == binary


def test_nothing_changed_is_said_and_gives_the_base():
    family, base, _ = models()
    merged, ctx = run(SOMF(), family, base, [dict(base)])
    assert all(torch.equal(merged[n], base[n]) for n in base) and "nothing to realign" in ctx.notices[0]


def test_bad_input(state):
    for options, words in (
        ({"lr": 0.0}, "`lr` of somf is 0"), ({"batch": 0}, "`batch`"), ({"fuse": {"scale": 1}}, "needs the key `method`"),
        ({"final": "binary"}, "`final` of somf"), ({"reference": "base"}, "`reference` of somf"), ({"fuse": "nonsense"}, "no method 'nonsense'"),
        ({"fuse": {"method": "ties", "scal": 1}}, "has no option 'scal'. Did you mean 'scale'"), ({"fuse": "uniform-soup"}, "averages whole models"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=words):
            SOMF(**options)
    with pytest.raises(RecipeError, match=r"data: \{safety: FILE\}"):
        SOMF().merge(state(0), [state(1)])
    family, base, tuned = models()
    with pytest.raises(RecipeError, match="no 'safety' rows"):
        SOMF().merge(base, [tuned], Context(family))
    with pytest.raises(DataError, match="no columns chosen and rejected"):
        SOMF(rows="train").merge(base, [tuned], Context(family, streams={"train": Rows.of(toys.rows(frozenset({"prompt", "completion"}), 4))}))
    with pytest.raises(ModelError, match="not in the checkpoints"):
        SOMF().merge(state(0), [state(1)], Context(family))
    assert SOMF(rows="pairs").needs == {"rows:pairs"}
