import numpy as np
import pytest
import torch

from luthier.core.context import Context
from luthier.core.landscape import Landscape, collated, layer_barriers, stragglers
from luthier.core.rows import Rows
from luthier.errors import RecipeError
from luthier.merge.straggler_sparsify import StragglerSparsify, straggler_sparsify
from luthier.testing import tiny, toys


def test_stragglers_keep_their_largest_changes_and_all_is_scaled(state, ranks):
    base, tuned = state(0), state(1)
    merged = straggler_sparsify(base, tuned, ["layers.1", "norm.weight"], keep=0.4, strength=0.5)
    for n in set(base) - {"steps"}:
        change = (tuned[n].double() - base[n].double()).numpy().ravel()
        if n.startswith("layers.1") or n == "norm.weight":
            change = np.where(np.isin(np.arange(len(change)), ranks(change)[: int(0.4 * len(change))]), change, 0)
        np.testing.assert_allclose(merged[n].numpy().ravel(), base[n].numpy().ravel() + 0.5 * change, atol=1e-6)
    assert merged["steps"] == 0


def test_keeping_all_is_interpolation_and_full_strength_the_tuned_model(state):
    base, tuned = state(0), state(1)
    whole = straggler_sparsify(base, tuned, ["layers"], keep=1.0)
    half = straggler_sparsify(base, tuned, [], keep=0.0, strength=0.5)
    for n in set(base) - {"steps"}:
        assert torch.equal(whole[n], tuned[n])
        torch.testing.assert_close(half[n], torch.lerp(base[n], tuned[n], 0.5))


def test_several_models_enter_as_their_mean(state):
    base, tuned = state(0), [state(1), state(2)]
    merged = StragglerSparsify(stragglers=[], strength=1.0).merge(base, tuned)
    torch.testing.assert_close(merged["embed.weight"], (tuned[0]["embed.weight"] + tuned[1]["embed.weight"]) / 2)


@pytest.fixture(scope="module")
def pair():
    base, tuned = tiny.tiny_vit(layers=3), tiny.tiny_vit(layers=3)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in tuned.network.named_parameters():
            p.add_((0.6 if ".1." in name else 0.05) * torch.randn(p.shape, generator=g))
    return base, tuned


def test_it_finds_the_layers_with_the_highest_barriers(pair):
    tuned = pair[1]
    rows = Rows.of(toys.rows(frozenset({"image", "label"}), 12))
    state_0, state_1 = ({n: t.clone() for n, t in m.network.state_dict().items()} for m in pair)
    view = Landscape(tuned, collated(tuned, rows))
    expected = layer_barriers(state_0, state_1, lambda changed: view.loss({**state_1, **changed}))
    scratch = tiny.tiny_vit(layers=3, seed=9)  # whatever weights the current model has
    before = {n: t.clone() for n, t in scratch.network.state_dict().items()}
    merger = StragglerSparsify(keep=0.5, strength=1.0)
    merged = dict(merger.merge(state_0, [state_1], Context(scratch, 0, {"val": rows})))
    assert merger.report["barriers"] == pytest.approx(expected, abs=1e-4)
    assert set(merger.report["stragglers"]) == set(stragglers(expected, 0.2)) != set()
    assert all(torch.equal(t, before[n]) for n, t in scratch.network.state_dict().items())
    for name in state_0:
        slow = any(name.rpartition(".")[0] == layer or (layer[-1].isdigit() and name.startswith(f"{layer}.")) for layer in merger.report["stragglers"])
        changed = int((merged[name] != state_0[name]).sum())
        assert changed <= int(0.5 * state_0[name].numel()) if slow else torch.equal(merged[name], state_1[name])


def test_strength_is_chosen_on_validation_rows(state):
    base, tuned = state(0), state(1)

    def share(x):
        return float(((x["embed.weight"] - base["embed.weight"]) / (tuned["embed.weight"] - base["embed.weight"])).mean())

    merger = StragglerSparsify(stragglers=["layers.0"], strength="auto")
    merged = merger.merge(base, [tuned], Context(evaluator=lambda x: -((share(x) - 0.31) ** 2)))
    assert merger.report["strength"] == 0.3 and len(merger.report["tried"]) == 11 and share(merged) == pytest.approx(0.3, abs=1e-4)


def test_lazy_where_the_stragglers_are_known(lazily):
    lazily(lambda base, tuned: StragglerSparsify(stragglers=["layers.1"]).merge(base, tuned))


def test_what_is_missing_is_said(state):
    assert StragglerSparsify().needs == {"val"} and not StragglerSparsify(stragglers=["head"]).needs
    with pytest.raises(RecipeError, match="finds the stragglers on validation rows"):
        StragglerSparsify().merge(state(0), [state(1)], Context())
    with pytest.raises(RecipeError, match="`strength: auto`"):
        StragglerSparsify(stragglers=[], strength="auto").merge(state(0), [state(1)], Context())


@pytest.mark.parametrize(("field", "value"), [("keep", 30), ("share", -0.1), ("strength", "best"), ("strength", 2.0), ("points", 2)])
def test_bad_values(field, value):
    with pytest.raises(RecipeError, match=f"`{field}`"):
        StragglerSparsify(**{field: value})
