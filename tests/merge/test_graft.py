import pytest
import torch

from luthier.core import sparse
from luthier.core.context import Context
from luthier.core.rows import Rows
from luthier.errors import ModelError, RecipeError
from luthier.merge.graft import Graft, graft, learn_region, overlap
from luthier.testing import tiny, toys

GRAFTABLE = ("layers.0.attn.weight", "layers.0.attn.bias", "layers.0.mlp.0.weight", "layers.1.attn.weight", "layers.1.attn.bias", "layers.1.mlp.0.weight", "norm.weight", "scale")


def constant(state, value):
    return {n: torch.full(t.shape, value) for n, t in state.items() if t.is_floating_point()}


def test_an_empty_mask_is_the_base_and_a_full_one_the_tuned_model(state):
    base, tuned = state(0), state(1)
    nothing, everything = graft(base, tuned, constant(base, False)), graft(base, tuned, constant(base, True))
    for name, tensor in base.items():
        assert torch.equal(nothing[name], tensor)
        assert torch.equal(everything[name], tuned[name] if tensor.is_floating_point() else tensor)


def test_entries_are_copied_to_the_bit_and_nothing_else_moves(state):
    base, tuned = state(0, torch.bfloat16), state(1, torch.bfloat16)
    mask = {n: torch.rand(base[n].shape, generator=torch.Generator().manual_seed(3)) < 0.3 for n in GRAFTABLE}
    merged = graft(base, tuned, mask)
    for name in GRAFTABLE:
        assert torch.equal(merged[name][mask[name]], tuned[name][mask[name]]) and torch.equal(merged[name][~mask[name]], base[name][~mask[name]])
        assert merged[name].dtype == torch.bfloat16
    assert torch.equal(merged["embed.weight"], base["embed.weight"])


def test_an_entry_that_several_claim_is_their_mean(state):
    base, one, two = state(0), state(1), state(2)
    a, b = constant(base, False), constant(base, False)
    a["norm.weight"], b["norm.weight"] = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    merged = graft(base, [one, two], [a, b])["norm.weight"]
    expected = [(one["norm.weight"][0] + two["norm.weight"][0]) / 2, one["norm.weight"][1], two["norm.weight"][2], base["norm.weight"][3]]
    torch.testing.assert_close(merged, torch.stack(expected))
    assert overlap(a, b) == 0.5 and overlap(a, a) == 1.0


def test_the_base_patch_is_the_largest_movement_of_all_graftable_entries(state, ranks):
    base, tuned = state(0), state(1)
    method = Graft(density=0.1, mask="movement")
    merged = method.merge(base, [tuned])
    moved = torch.cat([(tuned[n] - base[n]).reshape(-1) for n in GRAFTABLE])
    k = round(0.1 * moved.numel())
    chosen = torch.zeros(moved.numel(), dtype=torch.bool)
    chosen[ranks(moved)[:k]] = True
    found = torch.cat([(merged[n] != base[n]).reshape(-1) for n in GRAFTABLE])
    assert torch.equal(found, chosen)
    assert method.report["regions"][0]["kept"] == k and method.report["regions"][0]["density"] == pytest.approx(k / moved.numel())
    assert torch.equal(merged["embed.weight"], base["embed.weight"])


def test_a_head_is_copied_whole_on_demand(state):
    base, tuned = state(0) | {"classifier.weight": torch.zeros(3, 4)}, state(1) | {"classifier.weight": torch.ones(3, 4)}
    said = Context()
    assert torch.equal(Graft(mask="movement").merge(base, [tuned], said)["classifier.weight"], torch.zeros(3, 4))
    assert "name it in `whole`" in said.notices[0]
    said = Context()
    merged = Graft(mask="movement", whole=["classifier", "embed"]).merge(base, [tuned], said)
    assert torch.equal(merged["classifier.weight"], torch.ones(3, 4)) and not said.notices


def test_forgetting_is_the_complement(state):
    base, tuned = state(0), state(1)
    kept, gone = Graft(0.2, "movement").merge(base, [tuned]), Graft(0.2, "movement", action="forget").merge(base, [tuned])
    for name in GRAFTABLE:
        assert torch.equal(kept[name] == tuned[name], gone[name] == base[name])
    assert torch.equal(gone["embed.weight"], tuned["embed.weight"])


# learning ---------------------------------------------------------------------------------------------------------------
def problem():
    """A linear layer that solves its rows with exactly two of the tuned entries; the largest movement is a wrong one."""
    base = {"weight": torch.zeros(1, 6)}
    tuned = torch.tensor([[1.0, -1.0, 3.0, 0.5, 0.5, 0.5]])
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    layer = torch.nn.Linear(6, 1, bias=False)
    goal = x @ torch.tensor([[1.0], [-1.0], [0.0], [0.0], [0.0], [0.0]])
    return base, {"weight": tuned}, layer, lambda: (layer(x) - goal).square().mean()


def error_of(base, tuned, layer, loss):
    def value(masks):
        with torch.no_grad():
            layer.weight.copy_(torch.where(masks["weight"], tuned["weight"], base["weight"]))
            return -float(loss())

    return value


@pytest.mark.parametrize("limit", [None, 2])
def test_the_mask_leaves_a_bad_start_and_finds_the_entries_that_matter(limit):
    base, tuned, layer, loss = problem()
    start = {"weight": torch.tensor([[True, False, True, False, False, False]])}
    found = learn_region(base, tuned, start, layer, [[loss]] * 60, error_of(base, tuned, layer, loss), bias=3.0, limit=limit)
    assert found.masks["weight"].tolist() == [[True, True, False, False, False, False]]
    assert found.update > 0 and found.history[0]["density"] == pytest.approx(1 / 3) and len(found.history) == 61 and len(found.losses) == 60


def test_the_first_gradient_is_the_papers_by_hand_and_auto_moves_the_most_moved_score_by_one():
    base, tuned, layer, loss = problem()
    start = {"weight": torch.tensor([[False, True, False, False, True, False]])}
    rng = torch.Generator().manual_seed(5)
    s = torch.rand(1, 6, generator=torch.Generator().manual_seed(5))
    sigma = torch.sigmoid(s - 2.0)
    gamma = torch.where(start["weight"], 1 - sigma, sigma)
    with torch.no_grad():
        layer.weight.copy_(gamma * tuned["weight"])
    loss().backward()
    by_hand = layer.weight.grad * tuned["weight"] * (1 - 2 * start["weight"].float()) * sigma * (1 - sigma)
    layer.weight.grad = None
    found = learn_region(base, tuned, start, layer, [[loss]], lambda masks: 0.0, bias=2.0, generator=rng)
    assert found.lr == pytest.approx(1 / float(by_hand.abs().max()), rel=1e-5) and found.update == 0 and found.masks is start


def run(method, family, base, tuned, **streams):
    made = {name: Rows.of(toys.rows(frozenset({"prompt", "completion"}), n)) for name, n in ({"train": 8, "val": 4} | streams).items()}
    ctx = Context(family, streams=made)
    return method.merge(base, tuned, ctx), ctx


def tuned_llama():
    """A tiny model, and itself after a few steps of SGD on the toy rows, its embeddings and head fixed."""
    family, tuned = tiny.tiny_llama(), tiny.tiny_llama()
    rows = toys.rows(frozenset({"prompt", "completion"}), 8)
    moving = [p for n, p in tuned.network.named_parameters() if "layers" in n]
    optimizer = torch.optim.SGD(moving, lr=0.3)
    for _ in range(12):
        optimizer.zero_grad()
        (-tuned.score(tuned.collate(rows)).logp.mean()).backward()
        optimizer.step()
    return family, dict(family.network.state_dict()), {n: p.detach() for n, p in tuned.network.state_dict().items()}


def test_on_a_language_model_the_learned_graft_is_never_worse_than_the_patch_and_the_network_stays(tmp_path):
    family, base, tuned = tuned_llama()
    before = {n: t.clone() for n, t in base.items()}
    merits = {}
    for name, options in {"movement": {"mask": "movement"}, "random": {"mask": "random"}, "learned": {"updates": 15}, "exact": {"updates": 15, "exact": True}}.items():
        method = Graft(density=0.01, batch=8, **options)
        merged, ctx = run(method, family, base, [tuned], val=2)
        family_at = tiny.tiny_llama()
        family_at.network.load_state_dict(dict(merged))
        batches = [family_at.collate(list(ctx.rows(s))) for s in ("train", "val")]
        merits[name] = sum(float(family_at.score(b).logp.detach().mean()) for b in batches) / 2  # both kinds count alike, whatever their numbers
        facts = method.report["regions"][0]
        assert facts["kept"] == sum(int((merged[n] != base[n]).sum()) for n in base)
        if name == "learned":
            assert max(h["merit"] for h in facts["history"]) == pytest.approx(merits[name], rel=1e-4)
        if name != "learned":
            assert facts["density"] == pytest.approx(0.01, abs=1e-3)
    assert merits["learned"] >= merits["movement"] - 1e-6 > merits["random"] and merits["exact"] >= merits["movement"] - 1e-6
    assert all(torch.equal(t, before[n]) for n, t in family.network.state_dict().items()) and all(p.grad is None for p in family.network.parameters())


def test_the_graft_is_also_written_as_a_sparse_update(tmp_path):
    family, base, tuned = tuned_llama()
    ctx = Context(family, folder=tmp_path)
    merged = Graft(0.01, "movement").merge(base, [tuned], ctx)
    update = sparse.load(tmp_path / "graft.safetensors")
    again = {n: t.clone() for n, t in base.items()}
    sparse.apply(again, update)
    assert all(torch.allclose(again[n], merged[n], atol=1e-7) for n in base)
    assert sum(len(i) for i, _ in update.values()) == sum(int((merged[n] != base[n]).sum()) for n in base)


def test_several_models_learn_on_rows_of_their_own():
    family, base, tuned = tuned_llama()
    method = Graft(density=0.01, updates=1, batch=4, rows=["train", "other"])
    merged, _ = run(method, family, base, [tuned, tuned], other=6)
    assert len(method.report["regions"]) == 2 and method.report["overlap"][0][0] == 1.0
    assert all(torch.equal(merged[n][merged[n] != base[n]], tuned[n][merged[n] != base[n]]) for n in base)


def test_bad_input(state):
    for options, words in (({"density": 0}, "`density` of graft is 0"), ({"updates": 0}, "`updates`"), ({"lr": -1.0}, "`lr` of graft"), ({"lr": "fast"}, "`lr` of graft")):
        with pytest.raises(RecipeError, match=words):
            Graft(**options)
    with pytest.raises(RecipeError, match="mask: movement"):
        Graft().merge(state(0), [state(1)])
    with pytest.raises(RecipeError, match="2 streams for 1 models"):
        Graft(mask="movement", rows=["a", "b"]).merge(state(0), [state(1)])
    with pytest.raises(RecipeError, match="one tuned model"):
        Graft(mask="movement", action="forget").merge(state(0), [state(1), state(2)])
    with pytest.raises(RecipeError, match="no tensor that it may graft"):
        Graft(mask="movement", skip=["*"]).merge(state(0), [state(1)])
    with pytest.raises(ModelError, match="not in the checkpoints"):
        Graft().merge(state(0), [state(1)], Context(tiny.tiny_llama()))
    family, base, tuned = tuned_llama()
    with pytest.raises(RecipeError, match="no 'train' rows"):
        Graft().merge(base, [tuned], Context(family))
