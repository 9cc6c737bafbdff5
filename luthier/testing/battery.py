"""The conformance battery: what every method of an axis must hold to, checked at toy size."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from luthier.catalog import AXES, entries, field_docs, fields_of, method
from luthier.core import checkpoint
from luthier.core.batch import Batch
from luthier.core.context import Context
from luthier.core.loss import Loss, of
from luthier.core.plugin import Plugin, defines
from luthier.errors import UserError
from luthier.testing import tiny, toys


STEPS = 4
NEIGHBOURS = {"select": ("random",), "adapt": ("lora", "full"), "merge": ("task-arithmetic",), "measure": ("task",)}
"""What a method is run with: the first of each axis that serves its family of models."""


class NotConforming(AssertionError):
    """What a method does not hold to, in one sentence."""


class Case:
    """One method under test, with toy rows and models for it."""

    def __init__(self, cls: Any, options: dict[str, Any]) -> None:
        self.cls, self.options = cls, {**cls.toy, **options}
        self.family = toys.shared_family([cls]) or "causal-lm"
        self.columns = toys.columns_for([cls], self.family)
        self.folder = Path(tempfile.mkdtemp(prefix="luthier-check-"))
        self.whole: Any = None
        """The finished run of `runs_in_a_recipe`, and its recipe."""
        self.plan: dict[str, Any] = {}

    def build(self) -> Any:
        return self.cls(**copy.deepcopy(self.options))

    def model(self, seed: int = 0) -> Any:
        make = {
            "causal-lm": tiny.tiny_llama, "text-encoder": lambda seed: tiny.tiny_bert(seed=seed, classes=3),
            "image-classifier": tiny.tiny_vit, "dual-encoder": tiny.tiny_clip,
        }[self.family]  # fmt: skip
        return make(seed=seed)

    def rows(self, n: int = 6) -> Any:
        from luthier.core.rows import Rows

        return Rows.of(toys.rows(self.columns, n))

    def context(self, model: Any = None, n: int = 6) -> Context:
        model = model or self.model()
        streams = {name: self.rows(n) for name in ("train", "test", "val", "general")}
        frozen = model.frozen_copy()
        models = dict.fromkeys(("base", "stage", "previous", *getattr(self.cls, "toy_models", ())), frozen)
        ctx = Context(model, 0, streams, models)
        ctx.clock.steps = 8
        ctx.evaluator = lambda source: float(sum(v.float().sum() for v in dict(source).values() if v.is_floating_point()) % 1)
        return ctx

    def batch(self, plugin: Any, ctx: Context, n: int = 4) -> Batch:
        rows = self.rows(n)
        return plugin.collate(list(rows), rows.ids, ctx) if hasattr(plugin, "collate") else ctx.current.collate(list(rows), rows.ids)  # type: ignore[union-attr]


def check_method(given: Any, skip: tuple[str, ...] = (), **options: Any) -> list[str]:
    """Run the common checks and those of the method's axis, without those in `skip`; returns their names."""
    cls = _class_of(given)
    case = Case(cls, options)
    done = []
    try:
        for check in (*COMMON, *AXIS[cls.axis]):
            if check.__name__ not in skip:
                _checked(check, case)
                done.append(check.__name__)
    finally:
        shutil.rmtree(case.folder, ignore_errors=True)
    return done


def _checked(check: Callable[[Case], None], case: Case) -> None:
    """One check; whatever goes wrong is told with the method's and the check's name."""
    name = f"{case.cls.axis}/{case.cls.name}"
    try:
        check(case)
    except NotConforming as found:
        raise NotConforming(f"{name}: {found}") from None
    except Exception as crash:
        raise NotConforming(f"{name}: {check.__name__} ended with {type(crash).__name__}: {crash}") from crash


def _class_of(given: Any) -> Any:
    if isinstance(given, type):
        return given
    if ".py" in given:
        import ast

        from luthier import catalog

        path = Path(given.partition(":")[0])
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = [n.module or "" for n in tree.body if isinstance(n, ast.ImportFrom)]
        axis = next(m.split(".")[1] for m in imported if m.startswith("luthier.") and m.split(".")[1] in AXES)
        return catalog.method(axis, given)
    axis, _, name = given.partition("/")
    return method(axis, name)


def ensure(condition: Any, sentence: str) -> None:
    if not condition:
        raise NotConforming(sentence)


# every axis ---------------------------------------------------------------------------------------------------------------


def is_documented(case: Case) -> None:
    text = inspect.getdoc(case.cls) or ""
    ensure(len(text.split("\n\n")[0].split()) >= 5 and not text.startswith(f"{case.cls.__name__}("), "its docstring does not begin with the idea in a sentence")
    documented = field_docs(case.cls)
    missing = [f.name for f in fields_of(case.cls) if not documented.get(f.name)]
    ensure(not missing, f"the field '{(missing or [''])[0]}' has no documentation (a string literal under it)")
    reserved = [f.name for f in fields_of(case.cls) if callable(getattr(Plugin, f.name, None)) or str(Plugin.__annotations__.get(f.name, "")).startswith("ClassVar")]
    ensure(not reserved, f"its field '{(reserved or [''])[0]}' hides what every plug-in has under that name; call it otherwise")
    ensure(case.cls.axis in AXES and case.cls.name == case.cls.name.lower(), "its name is not lower case")


def defaults_build(case: Case) -> None:
    required = [f.name for f in fields_of(case.cls) if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    ensure(not required or set(required) <= set(case.options), f"the fields {required} have no defaults, so `method: {case.cls.name}` alone is no recipe")
    case.build()


def wrong_types_are_refused(case: Case) -> None:
    from luthier.recipe import Recipe

    for bad in ({"no_such_field": 1}, {f.name: {"a": object} for f in fields_of(case.cls)[:1] if f.type in ("int", "float", "bool")}):
        if not bad:
            continue
        entry = {"method": toys.spec_of(case.cls), **bad}
        try:
            getattr(Recipe.from_dict({"model": "m", "data": "d.jsonl", case.cls.axis: entry}), case.cls.axis)[0].build()
        except UserError:
            continue
        raise NotConforming(f"a recipe with {sorted(bad)} is not refused")


def state_round_trips(case: Case) -> None:
    """Through a checkpoint, into an instance that was attached to the same model."""

    def attached() -> Any:
        plugin, ctx = case.build(), case.context()
        if isinstance(plugin, Plugin) and case.cls.axis in ("adapt", "objective"):
            plugin.attach(ctx.current, ctx)  # type: ignore[arg-type]
        return plugin

    plugin = attached()
    before = plugin.state_dict()
    if not before:
        return
    tensors: dict[str, torch.Tensor] = {}
    tree = checkpoint.pack(before, tensors)
    again = attached()
    again.load_state_dict(checkpoint.unpack(tree, tensors))
    ensure(same(again.state_dict(), before), "its state does not survive a checkpoint")


COMMON: tuple[Callable[[Case], None], ...] = (is_documented, defaults_build, wrong_types_are_refused, state_round_trips)


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
    one = case.build().select(case.rows(1), 1, case.context())
    ensure(one.indices.tolist() == [0], "a pool of one row is not handled")


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


# training -------------------------------------------------------------------------------------------------------------------


def trains_what_it_names(case: Case) -> None:
    model, plugin = case.model(), case.build()
    parts = plugin.attach(model, case.context(model))
    named = {id(p) for g in parts.groups for p in g.params.values()}
    ensure(named, "no parameter is in a group")
    known = {id(p) for p in model.all_modules().parameters()} | {id(p) for m in parts.modules.values() for p in m.parameters()}
    ensure(named <= known, "a group names a parameter that is in no module")
    active = {id(p) for g in parts.groups if g.active for p in g.params.values()}
    stray = [n for n, p in model.network.named_parameters() if p.requires_grad and id(p) not in named]
    ensure(not stray, f"'{(stray or [''])[0]}' would train though no group names it")
    loss = _sum_of_outputs(case, model)
    loss.backward()
    moved = [p for g in parts.groups if g.active for p in g.params.values() if p.grad is not None]
    ensure(moved or not active, "no gradient reaches what it trains")


def switches_off_exactly(case: Case) -> None:
    model, plugin = case.model(), case.build()
    with torch.no_grad():
        before = _outputs(case, model.eval())
    plugin.attach(model, case.context(model))
    if not plugin.switchable:
        return
    with torch.no_grad():
        for parameter in model.network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
        with model.evaluating(), plugin.disabled(model):
            after = _outputs(case, model)
    ensure(torch.equal(before, after), "`disabled` does not give back the original model")


def loss_is_sound(case: Case) -> None:
    plugin, ctx = case.build(), case.context()
    model: Any = ctx.current
    plugin.attach(model, ctx)
    batch = _ready(case, plugin, ctx, 4)
    kept = [s.ids.copy() for s in batch.sequences]
    values = _losses(plugin, model, batch, ctx)
    ensure(values and all(math.isfinite(float(v.detach())) for v in values), "the loss of a toy batch is not finite")
    for value in values:
        if value.requires_grad:
            value.backward()
    grads = [p.grad for p in model.all_modules().parameters() if p.grad is not None]
    ensure(grads and all(torch.isfinite(g).all() for g in grads), "no finite gradient reaches the model")
    ensure(all(np.array_equal(a, s.ids) for a, s in zip(kept, batch.sequences)), "it changes the batch it is given")


def loss_of_one_row(case: Case) -> None:
    plugin, ctx = case.build(), case.context()
    model: Any = ctx.current
    plugin.attach(model, ctx)
    values = _losses(plugin, model, _ready(case, plugin, ctx, 1), ctx)
    ensure(all(math.isfinite(float(v.detach())) for v in values), "the loss of a single row is not finite")


def loss_of_nothing_supervised(case: Case) -> None:
    plugin, ctx = case.build(), case.context()
    model: Any = ctx.current
    if "score" not in model.verbs:
        return
    plugin.attach(model, ctx)
    batch = _ready(case, plugin, ctx, 2)
    for s in batch.sequences:
        s.mask = np.zeros_like(s.mask)
        s.data = {k: (v[:0] if np.ndim(v) > 0 else v) for k, v in s.data.items()}
    values = _losses(plugin, model, batch, ctx)
    ensure(all(math.isfinite(float(v.detach())) for v in values), "with nothing supervised the loss is not finite")


def loss_in_bfloat16(case: Case) -> None:
    plugin, ctx = case.build(), case.context()
    model: Any = ctx.current
    plugin.attach(model, ctx)
    model.all_modules().to(torch.bfloat16)
    for frozen in ctx.models.values():
        frozen.all_modules().to(torch.bfloat16)
    values = _losses(plugin, model, _ready(case, plugin, ctx, 2), ctx)
    ensure(all(math.isfinite(float(v.detach())) for v in values), "the loss in bfloat16 is not finite")


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


# weights, answers, numbers -----------------------------------------------------------------------------------------------------


def merges_plain_dicts(case: Case) -> None:
    rng = torch.Generator().manual_seed(0)
    base = {n: p.detach().clone() for n, p in case.model().network.state_dict().items()}
    tuned = [{n: p + 0.01 * torch.randn(p.shape, generator=rng) if p.is_floating_point() else p for n, p in base.items()} for _ in range(2)]
    kept = copy.deepcopy((base, tuned))
    results = [dict(case.build().merge(base, tuned, case.context())) for _ in range(2)]
    ensure(same((base, tuned), kept), "it changes the state dicts it is given")
    ensure(set(results[0]) == set(base) and all(results[0][n].shape == base[n].shape and results[0][n].dtype == base[n].dtype for n in base), "names, shapes or types differ from the base's")
    ensure(same(results[0], results[1]), "the same input does not give the same result")
    ensure(all(torch.isfinite(v).all() for v in results[0].values()), "the result is not finite")


def compresses_plain_dicts(case: Case) -> None:
    update = {"a": torch.randn(8, 8), "b": torch.randn(8)}
    kept = copy.deepcopy(update)
    lighter = dict(case.build().compress(update))
    ensure(same(update, kept), "it changes the update it is given")
    ensure(set(lighter) == set(update) and all(lighter[k].shape == update[k].shape for k in update), "names or shapes change")


def decodes(case: Case) -> None:
    model = case.model()
    ctx = case.context(model)
    models = {"model": model, **{name: ctx.model(name) for name in getattr(case.cls, "toy_models", ())}}
    wrapped = case.build().wrap(models, ctx)
    ensure(wrapped.kind == model.kind, "the wrapped model is of another family")
    if "generate" in model.verbs:
        from luthier.core.families import Decode

        answers = wrapped.generate([np.array([20, 21, 22]), np.array([23])], Decode(max_new_tokens=3))
        ensure(len(answers) == 2 and all(len(a) == 1 for a in answers), "it does not give one answer a prompt")


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


def searches(case: Case) -> None:
    asked = []

    def trial(point: dict[str, Any]) -> dict[str, float]:
        asked.append(tuple(point.values()))
        return {"score": -abs(point["x"] - 2), "task/nll": abs(point["x"] - 2.0), "parameters": float(point["x"])}

    found = case.build().search({"x": [0, 1, 2, 3], "y": [True, False]}, trial)
    ensure(found and all(p["x"] in (0, 1, 2, 3) for p in found), "it returns no point of the space")
    ensure(len(asked) == len(set(asked)), "it tries a point twice")


# the whole chain ------------------------------------------------------------------------------------------------------------


def runs_in_a_recipe(case: Case) -> None:
    """With a neighbour on every other axis that serves the same family of models and does not clash."""
    from luthier.recipe import Recipe
    from luthier.run import tune

    chosen = {case.cls.axis: case.cls, **_neighbours(case)}
    case.plan = _recipe(case, chosen)
    try:
        case.whole = tune(Recipe.from_dict(case.plan))
        return
    except UserError as clash:
        first = clash
    # What only the loaded model tells, such as an adapter that cannot be merged into it: then the method runs alone.
    case.plan = _recipe(case, {case.cls.axis: case.cls}, "alone")
    try:
        case.whole = tune(Recipe.from_dict(case.plan))
    except UserError as refusal:
        with_all = ", ".join(f"{a} {c.name}" for a, c in chosen.items())
        raise NotConforming(f"a recipe with {with_all} is refused: {first}; and so is one without neighbours: {refusal}") from refusal


def _recipe(case: Case, chosen: dict[str, Any], name: str = "whole") -> dict[str, Any]:
    plan = toys.recipe(chosen, case.family, case.folder / name)
    plan[case.cls.axis] = toys.entry(case.cls, case.options)
    plan["train"] |= {"steps": STEPS, "save_every": STEPS // 2}
    return plan


def _neighbours(case: Case) -> dict[str, Any]:
    """The first of each axis's candidates that a recipe with the method and the neighbours so far accepts."""
    from luthier.recipe import Recipe, check

    found: dict[str, Any] = {}
    for axis, names in NEIGHBOURS.items():
        for name in names if axis != case.cls.axis else ():
            known = any(e.name == name for e in entries(axis))
            tried = {case.cls.axis: case.cls, **found, axis: method(axis, name)} if known else {}
            if not tried or toys.shared_family(list(tried.values())) != case.family:
                continue
            try:
                check(Recipe.from_dict(_recipe(case, tried)))
            except UserError:
                continue
            found[axis] = tried[axis]
            break
    return found


def resumes_exactly(case: Case) -> None:
    """The same run, stopped in the middle and continued, reaches the same weights."""
    from luthier.core.models import load
    from luthier.recipe import Recipe
    from luthier.run import tune

    cut = case.folder / "cut"
    shutil.copytree(case.whole.folder, cut)
    for left in ("done", "measures.json", "report.json", "report.txt"):
        (cut / left).unlink(missing_ok=True)
    shutil.rmtree(cut / "model")
    middle = cut / "checkpoints" / f"step-{STEPS // 2:08d}"
    ensure(middle.is_dir(), f"no checkpoint was written after step {STEPS // 2}")
    checkpoint.replace_text(cut / "checkpoints" / "latest", middle.name)
    again = tune(Recipe.from_dict({**case.plan, "run": str(cut)}), resume=True)
    a, b = (dict(load(r.model_path).network.state_dict()) for r in (case.whole, again))
    different = [n for n in a if not same(a[n], b[n])]
    ensure(not different, f"a resumed run ends with other weights, first in '{(different or [''])[0]}' ({len(different)} of {len(a)} tensors)")


TRAINING = (runs_in_a_recipe, resumes_exactly)
AXIS: dict[str, tuple[Callable[[Case], None], ...]] = {
    "select": (selects_repeatably, picks_repeatably, *TRAINING),
    "curate": (makes_rows_repeatably, runs_in_a_recipe),
    "synthesize": (makes_rows_repeatably, runs_in_a_recipe),
    "adapt": (trains_what_it_names, switches_off_exactly, *TRAINING),
    "objective": (loss_is_sound, loss_of_one_row, loss_of_nothing_supervised, loss_in_bfloat16, *TRAINING),
    "optimize": (optimizer_steps, *TRAINING),
    "merge": (merges_plain_dicts, runs_in_a_recipe),
    "compress": (compresses_plain_dicts, runs_in_a_recipe),
    "decode": (decodes, runs_in_a_recipe),
    "measure": (measures_without_touching, runs_in_a_recipe),
    "search": (searches, runs_in_a_recipe),
}


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


def _sum_of_outputs(case: Case, model: Any) -> torch.Tensor:
    out = _outputs(case, model)
    return (out * torch.arange(1, out.numel() + 1, dtype=out.dtype).reshape(out.shape)).sum() / out.numel()


def _outputs(case: Case, model: Any) -> torch.Tensor:
    batch = model.collate(list(case.rows(3)))
    return model.score(batch).logp if "score" in model.verbs else model.classify(batch)


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, through nested containers."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    return bool(a == b) or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))
