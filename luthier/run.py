"""From a recipe to a judged model: stages, measures, the run folder; and what can be done with a finished run.

A run folder holds recipe.yaml (resolved), about.json (versions, seeds, data fingerprints), metrics.jsonl and checkpoints of each
stage, measures.json (before and after), the report (report.html, report.txt, report.json), and `model`, which loads without luthier.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import platform
import re
import shutil
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core import checkpoint, ranks
from luthier.core.context import Context, seed_of
from luthier.core.journal import check_trackers
from luthier.core.stage import Stage
from luthier.core.trials import search
from luthier.errors import RecipeError, Stopped, UserError
from luthier.measure import Measures
from luthier.recipe import Data, Recipe, StageEntry, check

if TYPE_CHECKING:
    from luthier.core.rows import Rows


@dataclass
class Run:
    """A run folder."""

    folder: Path
    recipe: Recipe
    measures: dict[str, dict[str, Any]] = field(default_factory=dict)
    """"before" and "after": measure name to its numbers, tables, plots and notes."""

    @property
    def model_path(self) -> Path:
        return self.folder / "model"

    def model(self, decoded: bool = True) -> Any:
        """The tuned model, with the recipe's decoder around it."""
        from luthier.core.models import load

        family = load(spec_of(self.model_path, self.recipe))
        return _decoded(self.recipe, family, {}) if decoded else family

    def numbers(self, when: str = "after") -> dict[str, float | None]:
        """All measured numbers, as "measure/number"."""
        return {f"{m}/{k}": v for m, found in self.measures.get(when, {}).items() for k, v in found["numbers"].items()}

    def ask(self, prompts: SequenceOf[str], max_new_tokens: int = 64) -> list[str]:
        """The tuned model's greedy answers."""
        from luthier.core.families import Decode
        from luthier.core.rows import prompt_ids

        family = self.model()
        ids = [prompt_ids({"prompt": p}, family.tokenizer) for p in prompts]
        return [a[0].text for a in family.generate(ids, Decode(max_new_tokens=max_new_tokens))]


def tune(recipe: Recipe | Mapping[str, Any] | str | Path, run: str | Path | None = None, resume: bool = False, quiet: bool = True, report: bool = True) -> Run:
    """Run a recipe. With `resume` an interrupted run continues to the very weights it would have reached.

    `report`: write the report card, report.html, also when the run fails or is stopped; the numbers are written in any case."""
    ranks.start()
    recipe = _as_recipe(recipe)
    notices = check(recipe)
    check_trackers(recipe.train.tracker)
    with ranks.by_first() as mine:
        folder = _folder(recipe, run, resume) if mine else Path()
    folder, quiet = ranks.from_first(folder), quiet or not ranks.first()
    with checkpoint.disk_errors(folder, "run", (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)):
        if recipe.search:
            recipe = search(recipe, folder, functools.partial(tune, report=False), (lambda sentence: None) if quiet else print)
        runner = _Runner(recipe, folder, quiet, report)
        try:
            return runner.go(resume, notices)
        except BaseException as error:
            if ranks.first():
                runner.ended(error)
            raise


def open_run(folder: str | Path) -> Run:
    """A finished run."""
    folder = Path(folder)
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} is no run folder: it holds no recipe.yaml.")
    if not (folder / "model").is_dir():
        raise UserError(f"The run {folder} has no model yet; continue it with `luthier tune {folder} --resume`.")
    measures = folder / "measures.json"
    return Run(folder, Recipe.load(folder / "recipe.yaml"), json.loads(measures.read_text()) if measures.exists() else {})


def ask(run: str | Path, prompts: SequenceOf[str], max_new_tokens: int = 64) -> list[str]:
    """Answers of a run's tuned model."""
    return open_run(run).ask(prompts, max_new_tokens)


def spec_of(path: Path, recipe: Recipe) -> Any:
    """How a model that a run wrote is loaded: with the options of the model that it started from."""
    start = recipe.model_spec()
    options = {k: start[k] for k in ("dtype", "attention", "trust_remote_code") if k in start} if isinstance(start, Mapping) else {}
    return {"id": str(path), **options} if options else path


# -- the run itself ------------------------------------------------------------------------------------------------------


class _Runner:
    """Goes through the stages and measures before and after."""

    def __init__(self, recipe: Recipe, folder: Path, quiet: bool, report: bool = True) -> None:
        self.recipe, self.folder, self.quiet, self.report = recipe, folder, quiet, report
        self.models: dict[str, Any] = {}
        self.store: dict[str, Any] = {}
        self.facts: list[dict[str, Any]] = []
        self.loaded: list[tuple[Data, dict[str, Rows]]] = []
        self.run = Run(folder, recipe)

    def say(self, sentence: str = "") -> None:
        if not self.quiet:
            print(sentence, flush=True)

    def go(self, resume: bool, notices: list[str]) -> Run:
        started = time.monotonic()
        with ranks.by_first() as mine:
            if mine:
                (self.folder / "ended.json").unlink(missing_ok=True)
        if self.recipe.train.threads:
            import torch

            torch.set_num_threads(self.recipe.train.threads)
        self.streams = self._streams(self.recipe)
        start = self.recipe.model_spec()
        self.models = {name: self._lazy(self.recipe.model_spec(name)) for name in self.recipe.models}
        self.models["base"] = self._lazy(start)
        for notice in notices:
            self.say(notice)
        with ranks.by_first() as mine:
            if mine:
                self._preflight(start)
                self._write_about(resume)
        self._measure("before", start, resume)
        last = start
        for number, (entry, anew) in enumerate(self._entries()):
            here = start if anew else last
            last = self._loop(number, entry, here, resume) if entry.loop else self._stage(entry.recipe, self._stage_folder(number, entry), here, resume)  # type: ignore[arg-type]  # only a loop has no recipe
        with ranks.by_first() as mine:
            if mine and last != self.folder / "model":
                self._adopt(Path(last))
        self._measure("after", self.folder / "model", resume)
        with ranks.by_first() as mine:
            if mine:
                self._report(time.monotonic() - started)
        return self.run

    def _streams(self, recipe: Recipe) -> dict[str, Rows]:
        """A recipe's rows; those of a stage that names no data of its own are the run's."""
        from luthier.core.rows import load_streams

        known = next((streams for data, streams in self.loaded if _same(data, recipe.data)), None)
        if known is None:
            known = load_streams(recipe.data.to_dict(), base=recipe.base, tell=self.say)
            self.loaded.append((recipe.data, known))
        return known

    def _entries(self) -> list[tuple[StageEntry, bool]]:
        """The recipe's stages, and whether each starts from the run's own model. One whose selector wants several rounds becomes a
        loop that starts every round from where it began."""
        found = []
        for entry in self.recipe.stage_list():
            anew = entry.start == "base" and not entry.loop
            recipe = None if entry.loop else entry.recipe
            rounds = 1 if recipe is None or not recipe.select else int(getattr(recipe.select[0].build(), "rounds", 1))
            if recipe is not None and rounds > 1:
                entry = StageEntry(None, entry.name, "base", True, [recipe], rounds)
            found.append((entry, anew))
        return found

    def _stage_folder(self, number: int, entry: Any, turn: int | None = None) -> Path:
        if len(self.recipe.stage_list()) == 1 and not entry.loop:
            return self.folder
        name = f"{number:02d}-{entry.name or 'stage'}" + ("" if turn is None else f"-{turn:02d}")
        return self.folder / "stages" / name

    def _stage(self, recipe: Recipe, folder: Path, start: Any, resume: bool, turn: int = 0) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        stage = Stage(recipe, folder, self._spec(start), self._streams(recipe), self.models, seed_of(recipe.train.seed, folder.name) if turn else recipe.train.seed,
                      turn, self.store, not self.quiet, self.say, self._inner, self.report)  # fmt: skip
        path = stage.run(resume)
        self.store = stage.store
        self.facts.append({"stage": folder.name, **stage.facts})
        self.models["previous"] = self._lazy(path)
        return path

    def _lazy(self, spec: Any) -> Any:
        """A reference model: copied now if it exists in memory only, else loaded when it is asked for."""
        from luthier.core.models import load
        from luthier.core.stage import frozen

        if hasattr(spec, "network"):
            return spec.frozen_copy()
        return lambda: frozen(load(self._spec(spec), device=self.recipe.train.device))

    def _spec(self, model: Any) -> Any:
        return spec_of(model, self.recipe) if isinstance(model, Path) else model

    def _loop(self, number: int, entry: Any, start: Any, resume: bool) -> Path:
        """Stages that repeat, each round from the round before or anew from the loop's start."""
        last = start
        for turn in range(entry.times):
            current = start if entry.start == "base" else last
            self.models["round"] = self._lazy(last)
            for place, recipe in enumerate(entry.recipes):
                folder = self._stage_folder(number, entry, turn)
                if len(entry.recipes) > 1:
                    folder = folder / f"{place:02d}"
                current = self._stage(recipe, folder, current, resume, turn)
            last = current
            with ranks.by_first() as mine:
                reached = bool(mine and entry.until and self._reached(entry.until, last))
            if ranks.from_first(reached):
                break
        return Path(last)

    def _reached(self, condition: str, model: Any) -> bool:
        """Whether a condition such as "task/exact_match >= 0.9" holds for a model, on the validation (else test) rows."""
        match = re.fullmatch(r"\s*([\w./-]+)\s*(>=|<=|>|<)\s*([-+.\deE]+)\s*", condition)
        if match is None:
            raise RecipeError(f"The loop's 'until: {condition}' is not understood; write e.g. 'task/exact_match >= 0.9'.")
        name, sign, bound = match[1], match[2], float(match[3])
        rows = self.streams.get("val", self.streams.get("test"))
        found = {f"{m}/{k}": v for m, part in self._measured(model, rows=rows).items() for k, v in part["numbers"].items()}
        if name not in found:
            raise RecipeError(f"The loop's 'until' names '{name}', which no measure gives. There are: {', '.join(sorted(found))}.")
        value = found[name]
        return value is not None and {">=": value >= bound, "<=": value <= bound, ">": value > bound, "<": value < bound}[sign]

    def _inner(self, recipe: Any) -> Run:
        """A recipe run by a method inside this run."""
        inner = _as_recipe(recipe)
        return tune(inner, self.folder / "inner" / f"{seed_of(inner.to_yaml()):016x}", resume=True, quiet=True, report=False)

    def _adopt(self, path: Path) -> None:
        """The last stage's model is the run's."""
        target, fresh = self.folder / "model", self.folder / ".adopting"
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.copytree(path, fresh)
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)

    # -- measuring -----------------------------------------------------------------------------------------------------
    def _measure(self, when: str, model: Any, resume: bool) -> None:
        path = self.folder / "measures.json"
        known = json.loads(path.read_text()) if resume and path.exists() else dict(self.run.measures)
        with ranks.by_first() as mine:
            if mine and when not in known and self.recipe.measure:
                self.say(f"Measuring the model {when} tuning ...")
                known[when] = self._measured(model, when)
                checkpoint.replace_text(path, json.dumps(known, indent=1))
        self.run.measures = ranks.from_first(known)

    def _measured(self, model: Any, when: str = "after", rows: Rows | None = None) -> dict[str, Any]:
        """What the recipe's measures find, on the test rows or on those given in their place."""
        from luthier.core.models import load
        from luthier.core.stage import plain

        family = model if hasattr(model, "network") else plain(load(self._spec(model), device=self.recipe.train.device))
        streams = dict(self.streams) if rows is None else {**self.streams, "test": rows}
        if when == "after":
            family = _decoded(self.recipe, family, self.models)
        models = {"stage": self.models["base"], **self.models}
        ctx = Context(family, self.recipe.train.seed, streams, models, self.recipe.build_helpers(), self.folder, train_on=self.recipe.data.train_on, tell=self.say)
        found: dict[str, Any] = {}
        for choice in self.recipe.measure:
            method = choice.build()
            if family.kind not in method.families or (when == "before" and method.compares):
                continue
            try:
                with family.evaluating():
                    result = method.measure(family, streams.get("test"), ctx)
            except UserError as refusal:
                if when == "before" or isinstance(refusal, Stopped):
                    raise
                # the tuned model is there; what one measure cannot do is no reason to keep the others from the reader
                result = Measures(notes=[f"{choice.method} was not measured: {refusal}"])
                self.say(result.notes[0])
            found[choice.method] = json.loads(json.dumps(vars(result), default=_jsonable))
        return found

    # -- telling -------------------------------------------------------------------------------------------------------
    def _preflight(self, start: Any) -> None:
        """Before training: one row as the model sees it, and what the run will cost."""
        from luthier.core.preflight import before_training

        for line in before_training(start, self.streams.get("train"), self.recipe):
            self.say(line)

    def _write_about(self, resume: bool) -> None:
        import torch
        import transformers

        import luthier

        _write_recipe(self.folder, self.recipe, self.say if resume else None)
        if resume and (self.folder / "about.json").exists():
            return  # it tells how the run began
        about = {
            "luthier": luthier.__version__, "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(),
            "threads": torch.get_num_threads(), "machine": platform.machine(), "seed": self.recipe.train.seed,
            "data": {name: {"rows": len(rows), "fingerprint": rows.fingerprint, "source": rows.source, "aside": len(rows.aside)} for name, rows in self.streams.items()},
        }  # fmt: skip
        checkpoint.replace_text(self.folder / "about.json", json.dumps(about, indent=1))

    def _report(self, seconds: float) -> None:
        from luthier.report import plain_report

        text, facts = plain_report(self.run, self.facts, seconds)
        (self.folder / "report.txt").write_text(text, encoding="utf-8")
        (self.folder / "report.json").write_text(json.dumps(facts, indent=1, default=_jsonable), encoding="utf-8")
        if self.report:
            from luthier.report.card import write

            write(self.folder)
        self.say("\n" + text)

    def ended(self, error: BaseException) -> None:
        """A run that ended early gets its report as well: how it ended, and what is there. One that never began leaves nothing behind."""
        if not (self.folder / "recipe.yaml").exists():
            return
        stopped = isinstance(error, (KeyboardInterrupt, Stopped))
        why = str(error) if isinstance(error, UserError) else "" if stopped else f"{type(error).__name__}: {error}"
        with contextlib.suppress(Exception):  # a full disk, say; the error itself is what the user must hear
            checkpoint.replace_text(self.folder / "ended.json", json.dumps({"how": "stopped" if stopped else "failed", "why": why}))
            if self.report:
                from luthier.report.card import write

                write(self.folder)


def _write_recipe(folder: Path, recipe: Recipe, tell: Callable[[str], None] | None) -> None:
    """The resolved recipe, in one step. `tell`: hears when a run goes on with another recipe."""
    path, text = folder / "recipe.yaml", recipe.to_yaml()
    if tell is not None and path.exists() and path.read_text(encoding="utf-8") != text:
        earlier = next(p for i in range(1, 1000) if not (p := folder / f"recipe.{i}.yaml").exists())
        path.rename(earlier)
        tell(f"The recipe is not the one that this run began with; that one is kept as {earlier.name}.")
    checkpoint.replace_text(path, text)


def _same(a: Data, b: Data) -> bool:
    """Whether two recipes read the same rows in the same way. Rows in memory are compared by identity."""
    mine, theirs = a.to_dict(), b.to_dict()

    def same(x: Any, y: Any) -> bool:
        if isinstance(x, list) and isinstance(y, list) and len(x) == len(y):
            return all(u is v or (isinstance(u, str) and u == v) for u, v in zip(x, y))
        return x is y or (isinstance(x, (str, int, float, dict)) and type(x) is type(y) and x == y)

    return mine.keys() == theirs.keys() and all(same(mine[k], theirs[k]) for k in mine)


def _decoded(recipe: Recipe, family: Any, models: Mapping[str, Any]) -> Any:
    """The family with the recipe's decoder around it."""
    if not recipe.decode:
        return family
    from luthier.core.models import load

    others = dict(models) or {name: functools.partial(load, recipe.model_spec(name)) for name in recipe.models}
    others.setdefault("base", functools.partial(load, recipe.model_spec()))
    ctx = Context(family, recipe.train.seed, models=others)
    return recipe.decode[0].build().wrap({"model": family}, ctx)


def _as_recipe(recipe: Any) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    return Recipe.load(recipe) if isinstance(recipe, (str, Path)) else Recipe.from_dict(dict(recipe))


def _folder(recipe: Recipe, run: str | Path | None, resume: bool) -> Path:
    """The run's folder, made and writable. An existing run is neither overwritten nor continued by accident."""
    chosen = run or recipe.run
    folder = Path(chosen) if chosen else Path("runs") / f"{recipe.name or 'run'}-{time.strftime('%Y%m%d-%H%M%S')}"
    if (folder / "recipe.yaml").exists() and not resume:
        raise UserError(f"{folder} already holds a run. Continue it with --resume, or choose another folder with --run.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(f"The run folder {folder} cannot be written to: {error.strerror or error}. Choose another with --run.") from error
    return folder


def _jsonable(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)
