"""What every method of an axis must hold to, one check a property; `battery.py` says which axis gets which."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch

from luthier.core import checkpoint
from luthier.core.batch import Batch
from luthier.core.context import Context
from luthier.core.loss import Loss, of
from luthier.core.plugin import defines
from luthier.testing.case import Case, allowed, ensure, outputs, same

# rows -----------------------------------------------------------------------------------------------------------------------


def selects_repeatably(case: Case) -> None:
    from luthier.select import Selector

    if case.cls.select is Selector.select:
        return
    picks = []
    for _ in range(2):
        rows = case.rows(8)
        before = copy.deepcopy([dict(r) for r in rows])
        picks.append(case.build().select(rows, 4, case.context()))
        ensure(same([dict(r) for r in rows], before), "it changes the rows it is given")
    ensure(np.array_equal(picks[0].indices, picks[1].indices), "the same seed does not give the same rows")
    ensure(len(picks[0].indices) == 4 and set(picks[0].indices.tolist()) <= set(range(8)), f"asked for 4 of 8 rows it gave {len(picks[0].indices)}")


def selects_from_few(case: Case) -> None:
    """A pool of one row, and of none."""
    from luthier.select import Selector

    if case.cls.select is Selector.select:
        return
    one = case.build().select(case.rows(1), 1, case.context(n=1))
    ensure(one.indices.tolist() == [0], "a pool of one row is not handled")
    none = allowed(case.build().select, case.rows(6).take([]), 0, case.context())
    ensure(none is None or len(none.indices) == 0, "it chooses from an empty pool")


def picks_repeatably(case: Case) -> None:
    from luthier.core.rowscores import RowScores

    if not defines(case.build(), "pick"):
        return
    weights = []
    for _ in range(2):
        plugin, ctx = case.build(), case.context()
        batch = case.batch(plugin, ctx, 4)
        with ctx.current.evaluating():  # type: ignore[union-attr]
            weights.append(torch.as_tensor(plugin.pick(batch, RowScores(ctx.current, batch), ctx)))  # type: ignore[arg-type]
    ensure(torch.equal(weights[0], weights[1]), "the same seed does not give the same weights")
    ensure(len(weights[0]) == 4 and bool((weights[0] != 0).any()), "it gives no row a weight")


def makes_rows_repeatably(case: Case) -> None:
    verb = "curate" if case.cls.axis == "curate" else "synthesize"
    found = []
    for _ in range(2):
        rows = case.rows(6)
        before = copy.deepcopy([dict(r) for r in rows])
        found.append([dict(r) for r in getattr(case.build(), verb)(rows, case.context())])
        ensure(same([dict(r) for r in rows], before), "it changes the rows it is given")
    ensure(same(found[0], found[1]), "the same seed does not give the same rows")
    ensure(len(found[0]) > 0, "it leaves no rows")


def makes_rows_of_few(case: Case) -> None:
    """One row, and none: rows, or a sentence that says why not."""
    verb = "curate" if case.cls.axis == "curate" else "synthesize"
    for n in (1, 0):
        made = allowed(getattr(case.build(), verb), case.rows(6).take(range(n)), case.context())
        ensure(made is None or all(hasattr(r, "keys") for r in made), "what it makes are no rows")


# training -------------------------------------------------------------------------------------------------------------------


def trains_what_it_names(case: Case) -> None:
    for one in case.families:
        model, plugin, parts, _ = one.attached
        if parts is None:
            if one is case:  # the sentence why
                plugin.attach(model, one.context(model))
            continue
        named = {id(p) for g in parts.groups for p in g.params.values()}
        ensure(named, "no parameter is in a group")
        known = {id(p) for p in model.all_modules().parameters()} | {id(p) for m in parts.modules.values() for p in m.parameters()}
        ensure(named <= known, "a group names a parameter that is in no module")
        stray = [n for n, p in model.network.named_parameters() if p.requires_grad and id(p) not in named]
        ensure(not stray, f"'{(stray or [''])[0]}' would train though no group names it")
        out = outputs(one, model)
        (out * torch.arange(1, out.numel() + 1, dtype=out.dtype).reshape(out.shape)).sum().backward()
        active = [p for g in parts.groups if g.active for p in g.params.values()]
        ensure(not active or any(p.grad is not None for p in active), f"no gradient reaches what it trains in a {one.family}")


def attaches_repeatably(case: Case) -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        model, plugin = case.model(), case.build()
        parts = plugin.attach(model, case.context(model))
        found.append([{n: p.detach().clone() for n, p in g.params.items()} for g in parts.groups])
    ensure(same(found[0], found[1]), "the same seed does not start from the same parameters")


def switches_off_exactly(case: Case) -> None:
    for one in case.families:
        model, plugin, parts, before = one.attached
        if parts is None or not plugin.switchable:
            continue
        with torch.no_grad():
            for parameter in model.network.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)
            with model.evaluating(), plugin.disabled(model):
                after = outputs(one, model)
        ensure(torch.equal(before, after), f"`disabled` does not give back the original {one.family}")


def adapts_bfloat16(case: Case) -> None:
    model, plugin = case.model(), case.build()
    model.network.to(torch.bfloat16)
    allowed(plugin.attach, model, case.context(model))
    ensure(torch.isfinite(outputs(case, model)).all(), "a bfloat16 model's outputs are not finite")


def loss_is_sound(case: Case) -> None:
    for one in case.families:
        plugin, ctx = _attached(one)
        model: Any = ctx.current
        batch = _ready(one, plugin, ctx, 4)
        kept = [s.ids.copy() for s in batch.sequences], copy.deepcopy([dict(r) for r in batch.rows])
        values = _losses(plugin, model, batch, ctx)
        ensure(_finite(values) and values, f"the loss of a toy batch is not finite on a {one.family}")
        for value in values:
            if value.requires_grad:
                value.backward()
        grads = [p.grad for p in model.all_modules().parameters() if p.grad is not None]
        ensure(grads and all(torch.isfinite(g).all() for g in grads), f"no finite gradient reaches a {one.family}")
        strange = [p for m in ctx.models.values() for p in m.all_modules().parameters() if p.grad is not None]
        ensure(not strange, "a gradient reaches a reference model")
        ensure(all(np.array_equal(a, s.ids) for a, s in zip(kept[0], batch.sequences)) and same([dict(r) for r in batch.rows], kept[1]), "it changes the batch it is given")


def loss_is_repeatable(case: Case) -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        plugin, ctx = _attached(case)
        found.append([v.detach() for v in _losses(plugin, ctx.current, _ready(case, plugin, ctx, 4), ctx)])
    ensure(same(found[0], found[1]), "the same seed does not give the same loss")


def loss_of_one_row(case: Case) -> None:
    for one in case.families:
        plugin, ctx = _attached(one)
        ensure(_finite(_losses(plugin, ctx.current, _ready(one, plugin, ctx, 1), ctx)), f"the loss of a single row is not finite on a {one.family}")


def loss_of_nothing_supervised(case: Case) -> None:
    plugin, ctx = _attached(case)
    if "score" not in ctx.current.verbs:  # type: ignore[union-attr]
        return
    batch = _ready(case, plugin, ctx, 2)
    for s in batch.sequences:
        s.mask = np.zeros_like(s.mask)
        s.data = {k: (v[:0] if np.ndim(v) > 0 else v) for k, v in s.data.items()}
    ensure(_finite(_losses(plugin, ctx.current, batch, ctx)), "with nothing supervised the loss is not finite")


def loss_in_bfloat16(case: Case) -> None:
    for one in case.families:
        plugin, ctx = _attached(one)
        for family in (ctx.current, *ctx.models.values()):
            family.all_modules().to(torch.bfloat16)
        ensure(_finite(_losses(plugin, ctx.current, _ready(one, plugin, ctx, 2), ctx)), f"the loss in bfloat16 is not finite on a {one.family}")


def optimizer_steps(case: Case) -> None:
    torch.manual_seed(0)
    trained, left = torch.nn.Parameter(torch.randn(6, 4)), torch.nn.Parameter(torch.randn(6, 4))
    before = trained.detach().clone(), left.detach().clone()
    plugin = case.build()
    optimizer = plugin.build([("trained", trained), ("left", left)])
    if plugin.two_pass:
        return
    trained.grad = torch.randn(6, 4)
    optimizer.step()
    ensure(not torch.equal(trained, before[0]), "a step moves nothing")
    ensure(torch.equal(left, before[1]), "a step moves a parameter without gradient")
    again = case.build().build([("trained", trained), ("left", left)])
    tensors: dict[str, torch.Tensor] = {}
    tree = checkpoint.pack(optimizer.state_dict(), tensors)
    again.load_state_dict(checkpoint.unpack(tree, tensors))
    ensure(all("lr_scale" in g for g in again.param_groups), "its parameter groups carry no 'lr_scale'")


def optimizer_in_bfloat16(case: Case) -> None:
    torch.manual_seed(0)
    plugin = case.build()
    if plugin.two_pass:
        return
    param = torch.nn.Parameter(torch.randn(6, 4).bfloat16())
    optimizer = plugin.build([("param", param)])
    param.grad = torch.randn(6, 4).bfloat16()
    optimizer.step()
    ensure(param.dtype == torch.bfloat16 and torch.isfinite(param).all(), "a step on bfloat16 weights is not finite")


# weights, answers, numbers -----------------------------------------------------------------------------------------------------


def merges_plain_dicts(case: Case) -> None:
    rng = torch.Generator().manual_seed(0)
    base = {n: p.detach().clone() for n, p in case.model().network.state_dict().items()}
    tuned = [{n: p + 0.01 * torch.randn(p.shape, generator=rng) if p.is_floating_point() else p for n, p in base.items()} for _ in range(2)]
    if allowed(case.build().merge, base, tuned, case.context()) is None:  # one that takes a single model says so
        tuned = tuned[:1]
    kept = copy.deepcopy((base, tuned))
    results = [dict(case.build().merge(base, tuned, case.context())) for _ in range(2)]
    ensure(same((base, tuned), kept), "it changes the state dicts it is given")
    ensure(set(results[0]) == set(base) and all(results[0][n].shape == base[n].shape and results[0][n].dtype == base[n].dtype for n in base), "names, shapes or types differ from the base's")
    ensure(same(results[0], results[1]), "the same input does not give the same result")
    ensure(all(torch.isfinite(v).all() for v in results[0].values()), "the result is not finite")


def merges_bfloat16(case: Case) -> None:
    base = {"a": torch.randn(8, 8).bfloat16(), "b": torch.randn(8).bfloat16()}
    tuned = [{n: (p.float() + 0.1 * torch.randn(p.shape)).bfloat16() for n, p in base.items()} for _ in range(2)]
    merged = allowed(case.build().merge, base, tuned, case.context()) or allowed(case.build().merge, base, tuned[:1], case.context())
    ensure(merged is None or all(merged[n].dtype == torch.bfloat16 and torch.isfinite(merged[n]).all() for n in base), "half-precision tensors do not merge into finite ones of their type")


def compresses_plain_dicts(case: Case) -> None:
    update = {"a": torch.randn(8, 8), "b": torch.randn(8)}
    kept = copy.deepcopy(update)
    lighter = allowed(case.build().compress, update)
    ensure(same(update, kept), "it changes the update it is given")
    if lighter is None:  # one that shrinks whole networks says so
        return
    lighter = dict(lighter)
    ensure(set(lighter) == set(update) and all(lighter[k].shape == update[k].shape for k in update), "names or shapes change")


def decodes(case: Case) -> None:
    model = case.model()
    ctx = case.context(model)
    models = {"model": model, **{name: ctx.model(name) for name in getattr(case.cls, "toy_models", ())}}
    wrapped = case.build().wrap(models, ctx)
    ensure(wrapped.kind == model.kind, "the wrapped model is of another family")
    if "generate" in model.verbs:
        from luthier.core.families import Decode

        found = []
        for _ in range(2):
            torch.manual_seed(0)
            ctx = case.context(model)
            wrapped = case.build().wrap({"model": model, **{name: ctx.model(name) for name in getattr(case.cls, "toy_models", ())}}, ctx)
            found.append(wrapped.generate([np.array([20, 21, 22]), np.array([23])], Decode(max_new_tokens=3)))
        ensure(len(found[0]) == 2 and all(len(a) == 1 for a in found[0]), "it does not give one answer a prompt")
        ensure(same([a[0].ids for a in found[0]], [a[0].ids for a in found[1]]), "the same seed does not give the same answers")


def measures_without_touching(case: Case) -> None:
    model = case.model()
    ctx = case.context(model)
    before = {n: p.clone() for n, p in model.network.state_dict().items()}
    with model.evaluating():
        found = [case.build().measure(model, ctx.rows("test"), case.context(model)) for _ in range(2)]
    ensure(all(v is None or math.isfinite(v) for v in found[0].numbers.values()), "a number is not finite; a missing one is None")
    ensure(same(found[0].numbers, found[1].numbers), "the same model does not give the same numbers")
    ensure(same(before, dict(model.network.state_dict())), "it changes the model")
    ensure(found[0].numbers or found[0].notes, "it says nothing")


def measures_one_row(case: Case) -> None:
    for one in case.families:
        model = one.model()
        with model.evaluating():
            found = allowed(one.build().measure, model, one.rows(1), one.context(model, n=1))
        ensure(found is None or all(v is None or math.isfinite(v) for v in found.numbers.values()), f"a number of a single row is not finite on a {one.family}")


def searches(case: Case) -> None:
    asked = []

    def trial(point: dict[str, Any]) -> dict[str, float]:
        asked.append(tuple(point.values()))
        return {"score": -abs(point["x"] - 2), "task/nll": abs(point["x"] - 2.0), "parameters": float(point["x"])}

    found = case.build().search({"x": [0, 1, 2, 3], "y": [True, False]}, trial)
    ensure(found and all(p["x"] in (0, 1, 2, 3) for p in found), "it returns no point of the space")
    ensure(len(asked) == len(set(asked)), "it tries a point twice")



def _attached(case: Case) -> tuple[Any, Context]:
    plugin, ctx = case.build(), case.context()
    plugin.attach(ctx.current, ctx)
    return plugin, ctx


def _finite(values: list[torch.Tensor]) -> bool:
    return all(math.isfinite(float(v.detach())) for v in values)


def _ready(case: Case, plugin: Any, ctx: Context, n: int) -> Batch:
    """A batch as the loop would hand it to `loss`."""
    batch = case.batch(plugin, ctx, n)
    if defines(plugin, "rollout"):
        with ctx.current.evaluating():  # type: ignore[union-attr]
            batch = plugin.rollout(batch, ctx)
    return plugin.prepare(batch, ctx)


def _losses(plugin: Any, model: Any, batch: Batch, ctx: Context) -> list[torch.Tensor]:
    given = plugin.loss(model, batch, ctx)
    parts = [given] if isinstance(given, (Loss, torch.Tensor)) else list(given)
    return [of(p).mean() for p in parts]
