"""Weights by name and place: what is chosen, that all else rests, and the rule of the loss floor."""

from __future__ import annotations

import pytest
import torch

from luthier.adapt.name_pattern import NamePattern, block_at, name_pattern
from luthier.core.plugin import Step
from luthier.errors import RecipeError
from luthier.objective.sft import SFT
from luthier.testing.tiny import tiny_bert, tiny_clip
from tests.adapt._rows import ROWS, context, llama
from tests.objective.lm_batches import Adam


def chosen(method, model):
    names = {n for g in method.attach(model).groups for n in g.params}
    assert names == {n for n, p in model.network.named_parameters() if p.requires_grad}
    return names


def test_patterns():
    names = ["model.layers.2.mlp.down_proj.weight", "model.layers.12.mlp.down_proj.weight", "model.layers.2.self_attn.o_proj.bias", "lm_head.weight"]
    found = name_pattern(names, ["layers.2.mlp.down_proj.weight", "2.mlp.down_proj", "model.layers.*.mlp.*", "layers.?.*", "down_proj", "proj"])
    assert found["layers.2.mlp.down_proj.weight"] == names[:1] == found["2.mlp.down_proj"], "whole parts of a name only: 12 is not 2"
    assert found["model.layers.*.mlp.*"] == names[:2] == found["down_proj"]
    assert found["layers.?.*"] == [names[0], names[2]] and found["proj"] == []


def test_places():
    assert [block_at(p, 32) for p in (0, 31, -1, 0.0, 1.0, 0.7)] == [0, 31, 31, 0, 31, 22]
    for bad in (32, -33, 1.5):
        with pytest.raises(RecipeError, match="32 blocks"):
            block_at(bad, 32)


def test_one_matrix_of_one_block():
    down = "model.layers.{}.mlp.down_proj.weight"
    assert chosen(NamePattern(block=1), llama(layers=3)) == {down.format(1)} == chosen(NamePattern(block=0.5), llama(layers=3))
    assert chosen(NamePattern(), llama(layers=3)) == {down.format(i) for i in range(3)}
    gates = chosen(NamePattern(part="ffn-input", block=-1), llama(layers=3))
    assert {n.split(".")[-2] for n in gates} == {"gate_proj", "up_proj"} and all(".2." in n for n in gates)
    assert len(chosen(NamePattern(part="query-key-value", block=0), llama(layers=3))) == 3
    whole = chosen(NamePattern(part="block", block=0), llama(layers=3))
    assert whole == {n for n, _ in llama(layers=3).network.named_parameters() if n.startswith("model.layers.0.")}
    assert chosen(NamePattern(patterns=["layers.0.mlp.*", "norm.weight"]), llama(layers=2)) >= {"model.norm.weight", down.format(0)}


def test_classifiers_keep_their_new_head_and_towers_are_counted_apart():
    found = chosen(NamePattern(block=1), tiny_bert(classes=3))
    assert found == {"bert.encoder.layer.1.output.dense.weight", "classifier.weight", "classifier.bias"}
    assert {n.split(".")[0] for n in chosen(NamePattern(block=0), tiny_clip())} == {"text_model", "vision_model"}


def loop(model, method, rows, steps, folder=None, **changes):
    from luthier.core.engine import Engine, Plan
    from luthier.core.journal import Journal
    from luthier.recipe import Train

    settings = {"steps": steps, "batch": 4, "schedule": "constant", "warmup": 0.0, "precision": "fp32", "save_every": 0, "clip": None, **changes}
    ctx = context(model)
    ctx.streams["train"] = rows
    engine = Engine(Plan(model, rows, [(SFT(average="sequence"), 1.0)], Adam(), [method]), Train(**settings), ctx, folder, Journal(None))
    return engine.run(), engine


def test_all_that_is_not_chosen_stays_bit_identical():
    model = llama(layers=2)
    before = {n: t.clone() for n, t in model.network.state_dict().items()}
    loop(model, NamePattern(block=1), ROWS[:8], 4)
    moved = {n for n, t in model.network.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == {"model.layers.1.mlp.down_proj.weight"}


def test_a_step_below_the_floor_changes_nothing_and_training_ends_with_the_epoch():
    model = llama(layers=2)
    before = {n: t.clone() for n, t in model.network.state_dict().items()}
    outcome, engine = loop(model, NamePattern(loss_floor=1e6), ROWS[:8], 20)
    assert outcome.steps == 2 and "below" in outcome.reason, "two batches are an epoch"
    assert all(torch.equal(t, before[n]) for n, t in model.network.state_dict().items())
    assert not any(engine.optimizer.state.values()), "and Adam has counted nothing"


def test_the_mean_over_rows_decides():
    """Losses 3 over 1 row and 0.5 over 9: the mean over rows is 0.75, over batches 1.75."""
    for floor, ends in ((0.8, True), (0.7, False)):
        method = NamePattern(loss_floor=floor)
        for loss, rows in ((3.0, 1), (0.5, 9)):
            step = Step(0, 0, None, [], None, rows=[{}] * rows, losses={"loss": loss})  # type: ignore[arg-type]
            method.after_backward(step, None)
            assert step.skip == (loss < floor)
            method.after_step(step, None)
        again = NamePattern(loss_floor=floor)
        again.load_state_dict(method.state_dict())
        again.after_epoch(step, None)
        assert (again.stop(None) is not None) == ends


@pytest.mark.parametrize("bad", [{"part": "mlp"}, {"block": 1.5}, {"loss_floor": -1}])
def test_bad_fields_are_refused(bad):
    with pytest.raises(RecipeError, match=next(iter(bad))):
        NamePattern(**bad)


def test_what_matches_nothing_is_refused():
    with pytest.raises(RecipeError, match="matches no parameter.*Did you mean"):
        NamePattern(patterns=["model.layers.0.mlp.down_prj.weight"]).attach(llama(layers=1))
    with pytest.raises(RecipeError, match="2 blocks"):
        NamePattern(block=7).attach(llama(layers=2))


def test_a_tied_partner_is_reported():
    model = llama(layers=1, tie_word_embeddings=True)
    ctx = context(model)
    NamePattern(patterns=["embed_tokens"]).attach(model, ctx)
    assert any("lm_head.weight" in n and "tied" in n for n in ctx.notices)


def test_a_two_pass_optimizer_knows_its_loss_too_late():
    from luthier.recipe import Recipe

    recipe = Recipe.from_dict({"model": "x", "data": [{"prompt": "a", "completion": "b"}], "optimize": {"method": "sam"}})
    assert "loss_floor" in (NamePattern(loss_floor=0.1).check(recipe) or "") and NamePattern().check(recipe) is None
