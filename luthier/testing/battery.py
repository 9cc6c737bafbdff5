"""The conformance battery: which checks a method of each axis must pass, those of all axes, and whole runs."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from luthier import catalog
from luthier.catalog import AXES, entries, field_docs, fields_of, method
from luthier.core import checkpoint
from luthier.core.plugin import Plugin
from luthier.errors import RecipeError, UserError
from luthier.testing import checks, toys
from luthier.testing.case import Case, NotConforming, ensure, same

STEPS = 4
NEIGHBOURS = {"select": ("random",), "adapt": ("lora", "full"), "merge": ("task-arithmetic",), "measure": ("task",)}
"""What a method is run with: the first of each axis that serves its family of models."""


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
    if ".py" not in given:
        axis, _, name = given.partition("/")
        return method(axis, name)
    imported = [n.module or "" for n in ast.parse(Path(given.partition(":")[0]).read_text(encoding="utf-8")).body if isinstance(n, ast.ImportFrom)]
    axes = [m.split(".")[1] for m in imported if m.startswith("luthier.") and m.split(".")[1] in AXES]
    if not axes:
        raise RecipeError(f"{given} derives from no axis; import a contract such as luthier.objective.Objective.")
    for axis in axes[:-1]:
        try:
            return catalog.method(axis, given)
        except RecipeError:
            continue  # what it imports from this axis is not its contract
    return catalog.method(axes[-1], given)


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
    from luthier.recipe import Recipe
    from luthier.run import tune

    cut = case.folder / "cut"
    shutil.copytree(case.whole.folder, cut)
    for left in ("done", "report.json", "report.txt"):
        (cut / left).unlink(missing_ok=True)
    if case.whole.measures:
        checkpoint.replace_text(cut / "measures.json", json.dumps({"before": case.whole.measures["before"]}))
    shutil.rmtree(cut / "model")
    middle = cut / "checkpoints" / f"step-{STEPS // 2:08d}"
    ensure(middle.is_dir(), f"no checkpoint was written after step {STEPS // 2}")
    checkpoint.replace_text(cut / "checkpoints" / "latest", middle.name)
    again = tune(Recipe.from_dict({**case.plan, "run": str(cut)}), resume=True)
    a, b = (_written(run.model_path) for run in (case.whole, again))
    different = [n for n in a.keys() | b.keys() if not same(a.get(n), b.get(n))]
    ensure(not different, f"a resumed run ends with other weights, first in '{(different or [''])[0]}' ({len(different)} of {len(a)} tensors)")


def _written(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a model's or an adapter's folder."""
    return {f"{file.name}/{n}": t for file in sorted(folder.glob("**/*.safetensors")) for n, t in load_file(file).items()}


TRAINING = (runs_in_a_recipe, resumes_exactly)
AXIS: dict[str, tuple[Callable[[Case], None], ...]] = {
    "select": (checks.selects_repeatably, checks.selects_from_few, checks.picks_repeatably, *TRAINING),
    "curate": (checks.makes_rows_repeatably, checks.makes_rows_of_few, runs_in_a_recipe),
    "synthesize": (checks.makes_rows_repeatably, checks.makes_rows_of_few, runs_in_a_recipe),
    "adapt": (checks.trains_what_it_names, checks.attaches_repeatably, checks.switches_off_exactly, checks.adapts_bfloat16, *TRAINING),
    "objective": (
        checks.loss_is_sound, checks.loss_is_repeatable, checks.loss_of_one_row, checks.loss_of_nothing_supervised, checks.loss_in_bfloat16, *TRAINING,
    ),
    "optimize": (checks.optimizer_steps, checks.optimizer_in_bfloat16, *TRAINING),
    "merge": (checks.merges_plain_dicts, checks.merges_bfloat16, runs_in_a_recipe),
    "compress": (checks.compresses_plain_dicts, runs_in_a_recipe),
    "decode": (checks.decodes, runs_in_a_recipe),
    "measure": (checks.measures_without_touching, checks.measures_one_row, runs_in_a_recipe),
    "search": (checks.searches, runs_in_a_recipe),
}  # fmt: skip
