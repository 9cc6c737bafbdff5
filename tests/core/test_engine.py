"""The loop itself: counts, accumulation, hooks, exact resume, and what happens when things go wrong."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from luthier.adapt import Adapter
from luthier.core import checkpoint
from luthier.core.batch import Batch, Sequence
from luthier.core.context import Context
from luthier.core.engine import Engine, Plan, rate
from luthier.core.journal import Journal
from luthier.core.loss import Loss
from luthier.core.plugin import Group, Parts
from luthier.errors import RecipeError, TrainingError
from luthier.objective import Objective, Supervised
from luthier.objective.info_nce import InfoNCE
from luthier.optimize import Optimizer, torch_groups
from tests.helpers import tiny_bert, tiny_llama


class Everything(Adapter):
    axis, name = "adapt", "everything"

    def attach(self, model, ctx=None):
        return Parts([Group("body", dict(model.network.named_parameters()))])


class Adam(Optimizer):
    axis, name, lr = "optimize", "adam", 1e-3

    def build(self, groups, ctx=None):
        return torch.optim.AdamW(torch_groups(groups, self.lr), lr=self.lr)


class NLL(Supervised):
    axis, name = "objective", "nll"


class Drawn(Supervised):
    """Depends on a named random stream and on the global one (dropout)."""

    axis, name, default_loss = "objective", "drawn", False

    def loss(self, model, batch, ctx=None):
        scores = model.score(batch)
        noise = torch.rand(len(scores), generator=ctx.rng("drawn"))
        return Loss().add("drawn", -scores.logp * noise, per="token")


RNG = np.random.default_rng(0)
ROWS = [{"n": i, "ids": RNG.integers(19, 64, int(RNG.integers(6, 14)))} for i in range(24)]


def collate(rows, ids, train_on="completion"):
    made = [Sequence(r["ids"], np.arange(len(r["ids"])) >= 3, row=i) for i, r in enumerate(rows)]
    return Batch(list(rows), np.asarray(ids), made)


def settings(**changes):
    return SimpleNamespace(**{
        "epochs": 2, "steps": None, "batch": 8, "tokens_per_micro_batch": 60, "seed": 0, "schedule": "cosine", "warmup": 0.1, "clip": 1.0, "precision": "fp32",
        "gradient_checkpointing": False, "reuse": 1, "save_every": 2, "keep": 2, "log_every": 1, "eval_every": None,
    } | changes)  # fmt: skip


def engine(folder=None, objectives=None, rows=ROWS, dropout=0.1, others=(), selector=None, **changes):
    family = tiny_llama(attention_dropout=dropout)
    family.collate = collate
    plan = Plan(family, rows, [(o, 1.0) for o in (objectives or [NLL()])], Adam(), [Everything()], selector, others=list(others))
    return Engine(plan, settings(**changes), Context(family, 0), folder, Journal(folder / "metrics.jsonl" if folder else None))


def weights(made):
    return {k: v.clone() for k, v in made.model.network.state_dict().items()}


@pytest.mark.parametrize("limit", [20, 45, 90])
def test_any_micro_batch_split_gives_the_same_weights(limit):
    whole, cut = engine(dropout=0, tokens_per_micro_batch=None), engine(dropout=0, tokens_per_micro_batch=limit)
    a, b = whole.run(), cut.run()
    assert a.losses["nll"] == pytest.approx(b.losses["nll"], rel=1e-5)
    for x, y in zip(weights(whole).values(), weights(cut).values()):
        assert torch.allclose(x, y, atol=2e-5)


def test_the_loss_is_the_mean_over_all_supervised_tokens():
    made = engine(dropout=0, steps=1, batch=24, tokens_per_micro_batch=30)
    reference = tiny_llama()
    with torch.no_grad():
        wanted = -reference.score(collate(ROWS, range(24))).logp.mean()
    assert made.run().losses["nll"] == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_a_stopped_run_continues_bit_for_bit_with_dropout(tmp_path, stop):
    whole = engine(tmp_path / "a", [Drawn()])
    whole.run()
    cut = engine(tmp_path / "b", [Drawn()])
    step = cut._step

    def stopping(*args):
        if cut.ctx.clock.step == stop:
            raise KeyboardInterrupt
        return step(*args)

    cut._step = stopping
    with pytest.raises(KeyboardInterrupt):
        cut.run()
    again = engine(tmp_path / "b", [Drawn()])
    again.run(resume=True)
    assert all(torch.equal(x, y) for x, y in zip(weights(whole).values(), weights(again).values()))
    lines = [[json.loads(line) for line in (tmp_path / d / "metrics.jsonl").read_text().splitlines()] for d in "ab"]
    assert [(x["step"], x["loss"]) for x in lines[0]] == [(x["step"], x["loss"]) for x in lines[1]]


def test_changed_threads_or_rows_are_refused_on_resume(tmp_path):
    engine(tmp_path, steps=2).run()
    other = engine(tmp_path, steps=4)
    other.identity["threads"] = 99
    with pytest.raises(TrainingError, match="threads was .* and is 99"):
        other.run(resume=True)


def test_a_loss_that_is_no_number_stops_names_the_rows_and_keeps_the_checkpoint(tmp_path):
    class Bad(NLL):
        def loss(self, model, batch, ctx=None):
            loss = super().loss(model, batch, ctx)
            return loss.add("bad", torch.tensor([float("nan") if ctx.clock.step == 3 else 0.0]), per="batch")

    made = engine(tmp_path, [Bad()])
    with pytest.raises(TrainingError, match=r"not a number at step 3 .*on rows \d+.*step-00000002"):
        made.run()
    assert checkpoint.latest(tmp_path / "checkpoints").name == "step-00000002"
    assert all(torch.isfinite(w).all() for w in weights(made).values())


def test_inactive_groups_do_not_move_even_with_momentum_and_decay():
    class Frozen(Everything):
        def before_step(self, step, ctx):
            step.groups[0].active = step.number < 2

    longer = engine(dropout=0, steps=5, schedule="constant", warmup=0)
    shorter = engine(dropout=0, steps=2, schedule="constant", warmup=0)
    longer.plan.adapters, shorter.plan.adapters = [Frozen()], [Frozen()]
    start = weights(longer)
    longer.run(), shorter.run()
    assert not all(torch.equal(start[k], v) for k, v in weights(longer).items())
    assert all(torch.equal(x, y) for x, y in zip(weights(longer).values(), weights(shorter).values()))


def test_penalties_and_skips_and_order_of_hooks():
    calls = []

    class Watcher(Everything):
        axis, name = "compress", "watcher"

        def attach(self, model, ctx=None):
            calls.append("attach")

        def before_step(self, step, ctx):
            calls.append("before")

        def penalty(self, model, ctx):
            calls.append("penalty")
            return Loss().add("norm", sum(p.square().sum() for p in model.network.parameters()).reshape(1), per="batch", weight=1e-3)

        def after_backward(self, step, ctx):
            calls.append("gradient")
            step.skip = True

        def after_step(self, step, ctx):
            calls.append("after")

    made = engine(dropout=0, steps=1, tokens_per_micro_batch=None, others=[Watcher()])
    before = weights(made)
    outcome = made.run()
    assert calls == ["attach", "before", "penalty", "gradient", "after"]
    assert outcome.losses["norm"] > 0 and outcome.losses["loss"] == pytest.approx(outcome.losses["nll"] + 1e-3 * outcome.losses["norm"], rel=1e-4)
    assert all(torch.equal(before[k], v) for k, v in weights(made).items())


def test_a_loss_that_is_yielded_in_parts_equals_the_whole():
    class Parts2(Objective):
        axis, name = "objective", "parts"

        def loss(self, model, batch, ctx=None):
            for half in (range(0, len(batch) // 2), range(len(batch) // 2, len(batch))):
                part = batch.take(half)
                yield Loss().add("nll", -model.score(part).logp, per="token")

    a, b = engine(dropout=0, tokens_per_micro_batch=None), engine(None, [Parts2()], dropout=0, tokens_per_micro_batch=None)
    a.run(), b.run()
    for x, y in zip(weights(a).values(), weights(b).values()):
        assert torch.allclose(x, y, atol=2e-5)


def test_nothing_to_train_is_refused():
    class Nothing(Everything):
        def attach(self, model, ctx=None):
            return Parts()

    made = engine(steps=1)
    made.plan.adapters = [Nothing()]
    with pytest.raises(RecipeError, match="Nothing trains"):
        made.run()


def test_two_plugins_may_not_both_pick():
    class Picker(Everything):
        def pick(self, batch, row_scores, ctx):
            return torch.ones(len(batch))

    with pytest.raises(RecipeError, match="Both .* decide 'pick'"):
        engine(others=[Picker(), Picker()])


def test_schedules():
    train = settings(warmup=0.1, schedule="linear")
    values = [rate(train, s, 100) for s in range(100)]
    assert values[0] == pytest.approx(0.1) and max(values) == values[10] == 1.0 and values[99] == pytest.approx(1 / 90)
    assert rate(settings(warmup=4, schedule="constant"), 1, 100) == 0.5
    cosine = settings(warmup=0, schedule="cosine")
    assert rate(cosine, 50, 100) == pytest.approx((1 + math.cos(math.pi * 0.5)) / 2)


def test_online_picks_leave_the_batch_and_oversampled_rows_are_counted():
    class Half(Everything):
        axis, name, oversample = "select", "half", 2.0

        def attach(self, model, ctx=None):
            return None

        def pick(self, batch, row_scores, ctx):
            order = torch.as_tensor(row_scores["loss"]).argsort(descending=True)
            kept = torch.zeros(len(batch))
            kept[order[: len(batch) // 2]] = 1
            return kept

    made = engine(dropout=0, epochs=1, batch=4, selector=Half())
    outcome = made.run()
    assert outcome.steps == 3 and made.ctx.clock.samples == 12


def scaled(scale, **changes):
    """An engine whose losses are scaled as in fp16."""
    made = engine(**{"dropout": 0, "steps": 4, "clip": 0.5, **changes})
    prepare = made.prepare

    def with_scaler():
        prepare()
        made.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)

    made.prepare = with_scaler
    return made


def test_a_loss_scale_changes_neither_the_clipping_nor_the_step():
    plain, half = engine(dropout=0, steps=4, clip=0.5), scaled(2.0**10)
    plain.run(), half.run()
    for x, y in zip(weights(plain).values(), weights(half).values()):
        assert torch.allclose(x, y, atol=1e-5)


def test_an_overflow_under_a_loss_scale_skips_the_step_and_lowers_the_scale():
    made = scaled(2.0**127, steps=1)
    before = weights(made)
    made.run()
    assert made.accelerator.scaler.get_scale() < 2.0**127
    assert all(torch.equal(x, before[k]) for k, x in weights(made).items())


def test_runs_of_different_precision_follow_one_another():
    losses = []
    for precision in ("fp32", "bf16", "fp32"):
        made = engine(precision=precision, steps=1, dropout=0.0)
        losses.append(made.run().losses["loss"])
    assert losses[0] == losses[2] != losses[1] == pytest.approx(losses[0], rel=0.02)


def test_the_loss_that_is_told_is_the_loss_where_gradients_are_cached():
    rows, found = [{"anchor": f"w{i} w{i + 1}", "positive": f"w{i + 2} w{i + 20}"} for i in range(6)], []
    for chunk in (0, 2):
        family = tiny_bert()
        plan = Plan(family, rows, [(InfoNCE(chunk=chunk), 0.5)], Adam(), [Everything()])
        found.append(Engine(plan, settings(steps=2, batch=6), Context(family, 0), None, Journal(None)).run().losses)
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[0]["loss"] == pytest.approx(0.5 * found[0]["info_nce"], rel=1e-5)
