"""One stage of a run: rows are made, curated and chosen; the model is tuned; the result is merged, compressed and written.

Each phase leaves a finished artefact in the stage's folder, so a killed run repeats none of them.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from luthier.core import checkpoint, ranks, sharding
from luthier.core.context import Context
from luthier.core.engine import Engine, Outcome, Plan
from luthier.core.journal import Journal
from luthier.core.models import load, load_state, save_network
from luthier.core.plugin import defines
from luthier.core.preflight import EXAMINED, preflight
from luthier.core.quiet import folded
from luthier.core.rows import Rows, fit_lengths, lengths
from luthier.core.sources import Sources
from luthier.errors import ModelError, RecipeError, TrainingError, UserError

if TYPE_CHECKING:
    from luthier.core.families import Family
    from luthier.recipe import Recipe


@dataclass
class Stage:
    """What a stage starts from and where it writes."""

    recipe: Recipe
    folder: Path
    start: Any
    """A model spec, a path, or a family in memory."""
    streams: dict[str, Rows]
    models: dict[str, Any]
    """Functions or families by name, among them "base", "previous" and "round" where they exist."""
    seed: int
    round: int = 0
    store: dict[str, Any] = field(default_factory=dict)
    show: bool = False
    tell: Callable[[str], None] | None = None
    runner: Callable[..., Any] | None = None
    report: bool = True
    """Whether the rows are described for the run's report."""
    facts: dict[str, Any] = field(default_factory=dict)
    """For the report: what happened to the rows, what was chosen and why, how long it took."""

    # -- the whole stage -------------------------------------------------------------------------------------------------
    def run(self, resume: bool) -> Path:
        """The folder of the stage's model."""
        target = self.folder / "model"
        if resume and (self.folder / "done").exists():
            self._load_end()
            return target
        torch.manual_seed(self.seed)
        family = self.start if hasattr(self.start, "network") else load(self.start, device=self.recipe.train.device)
        for notice in getattr(family, "notices", []):
            self._say(notice)
        ctx = self._context(family)
        with ranks.by_first() as mine:
            rows = self._rows(ctx, resume) if mine else None
        rows = self._rows(ctx, True) if rows is None else rows
        plan = self.plan(family, rows)
        outcome = self._train(plan, ctx, resume)
        if self.engine.mode == "fsdp":
            sharding.unshard(family, self.engine.groups)
        with ranks.by_first() as mine:
            if mine:
                self._finish(plan, ctx, target)
                self.facts["outcome"] = dict(vars(outcome))
                self._save_end(ctx)
        if not ranks.first():
            self._load_end()
        return target

    def _context(self, family: Family) -> Context:
        models = {**self.models, "stage": self._reference(family)}
        models.setdefault("base", models["stage"])
        ctx = Context(
            family, self.seed, dict(self.streams), models, self.recipe.build_helpers(), self.folder, round=self.round,
            train_on=self.recipe.data.train_on, batch_size=self.recipe.train.batch, workers=self.recipe.train.ray or 0, tell=self._say, runner=self.runner,
        )  # fmt: skip
        ctx.store.load_state_dict(self.store)
        ctx.evaluator = Evaluator(self, ctx)
        return ctx

    def _reference(self, family: Family) -> Any:
        """The model at the stage's start: loaded again when asked for, or copied now if it exists in memory only."""
        if hasattr(self.start, "network"):
            return family.frozen_copy()
        start, device = self.start, self.recipe.train.device
        return lambda: frozen(load(start, device=device))

    # -- rows ------------------------------------------------------------------------------------------------------------
    def _rows(self, ctx: Context, resume: bool) -> Rows:
        """Synthesize, then curate, then select. The outcome is kept, with the random states, so that it is never redone."""
        given = self.streams.get("train")
        if given is None:
            raise RecipeError("The recipe's data has no 'train' rows; add `data: {train: FILE}`.")
        self.selector = self.recipe.select[0].build() if self.recipe.select else None
        kept = checkpoint.latest(self.folder / "rows") if resume else None
        rows = self._made_rows(given, ctx) if kept is None else self._kept_rows(checkpoint.load(kept), given, ctx)
        ctx.streams["train"] = rows
        if kept is None:
            # Rows that nothing changed are those of the data, which a resumed run reads again.
            whole = None if rows is given else {"rows": [dict(r) for r in rows], "ids": rows.ids, "source": rows.source, "kind": rows.kind}
            state = {"rows": whole, "given": self._given(), "context": ctx.state_dict(), "facts": self.facts}
            checkpoint.save(self.folder / "rows", 0, state | ({"selector": self.selector.state_dict()} if self.selector else {}))
        return rows

    def _kept_rows(self, state: dict[str, Any], given: Rows, ctx: Context) -> Rows:
        self._same_data(state["given"])
        ctx.load_state_dict(state["context"])
        self.facts |= state["facts"]
        if self.selector is not None:
            self.selector.load_state_dict(state["selector"])
        return given if state["rows"] is None else Rows(name="train", **state["rows"])

    def _made_rows(self, given: Rows, ctx: Context) -> Rows:
        rows, aside = given, len(given.aside)
        self.facts["rows"] = [{"step": "given", "rows": len(rows) + aside}]
        if aside:
            self.facts["rows"].append({"step": f"{aside} bad ones were set aside", "rows": len(rows)})
        rows = self._fitted(rows, ctx)
        for choice in self.recipe.synthesize:
            rows = self._change(choice, "synthesize", rows, ctx)
        for choice in self.recipe.curate:
            rows = self._change(choice, "curate", rows, ctx)
        if self.recipe.synthesize or self.recipe.curate:
            rows = self._fitted(rows, ctx)
        chosen, scores = self._select(rows, ctx)
        if len(chosen) == 0:
            raise UserError("No rows are left to train on after curation and selection.")
        if self.report:
            self._describe(given, rows, chosen, scores)
        return chosen

    def _describe(self, given: Rows, rows: Rows, chosen: Rows, scores: Any) -> None:
        """What the report shows of the data: the pool, what was learned from, what looks wrong."""
        from luthier.report.pool import pool

        changed = bool(self.recipe.synthesize or self.recipe.curate)
        why = None if scores is None or changed else {int(i): float(s) for i, s in zip(rows.ids, scores) if s == s}
        checkpoint.replace_text(self.folder / "pool.json", json.dumps(pool(given, chosen, changed, why, self.seed)))

    def _fitted(self, rows: Rows, ctx: Context) -> Rows:
        """The rows that the model reads whole: longer ones are refused, left out or marked to be cut, as `data.too_long` says."""
        family, data = ctx.current, self.recipe.data
        assert family is not None
        tokenizer, limit = getattr(family, "tokenizer", None), data.max_length
        if not len(rows) or tokenizer is None:
            return rows
        if "score" in family.verbs:
            fitted = preflight(rows, family, data.train_on, limit, data.too_long).rows
        elif limit is not None and data.too_long == "cut":
            family.cut = min(limit, family.max_length or limit)  # type: ignore[attr-defined]
            return rows
        elif limit is not None:
            fitted = fit_lengths(rows, tokenizer, limit, data.too_long, data.train_on)
        else:
            self._tell_cut(rows, family)
            return rows
        for notice in fitted.notices[len(rows.notices) :]:
            self._say(notice)
        if len(fitted) < len(rows):
            self.facts["rows"].append({"step": f"{len(rows) - len(fitted)} too long ones were set aside", "rows": len(fitted)})
        return fitted

    def _tell_cut(self, rows: Rows, family: Any) -> None:
        """An encoder reads so many tokens of a text; its user should know when there are more."""
        part = rows.take(range(min(len(rows), EXAMINED)))
        if family.max_length and rows.kind in ("text", "text-label", "pairs", "image-text"):
            over = int((lengths(part, family.tokenizer) > family.max_length).sum())
            if over:
                self._say(f"{over} of {len(part)} rows are longer than the {family.max_length} tokens that this model reads at once; set `data: {{too_long: skip, max_length: {family.max_length}}}` to leave them out.")

    def _given(self) -> dict[str, str]:
        return {name: rows.fingerprint for name, rows in self.streams.items()}

    def _same_data(self, then: Mapping[str, str]) -> None:
        now = self._given()
        changed = next((name for name in then if now.get(name) != then[name]), None)
        if changed is not None:
            raise TrainingError(f"This run cannot be continued exactly: its '{changed}' rows are not those it began with. Restore them, or start a new run.")

    def _change(self, choice: Any, verb: str, rows: Rows, ctx: Context) -> Rows:
        method = choice.build()
        with ctx.current.evaluating():  # type: ignore[union-attr]
            changed = Rows.of(getattr(method, verb)(rows, ctx), name="train")
        self.facts["rows"].append({"step": f"{verb} {choice.method}", "rows": len(changed), "report": _plain(getattr(method, "report", {}))})
        return changed

    def _select(self, rows: Rows, ctx: Context) -> tuple[Rows, Any]:
        """The rows to learn from, and the selector's score of every row where it gives one."""
        from luthier.select import Selector

        if self.selector is None or type(self.selector).select is Selector.select:
            return rows, None
        assert isinstance(self.selector, Selector)
        with ctx.current.evaluating():  # type: ignore[union-attr]
            picks = self.selector.select(rows, self.recipe.budget, ctx)  # type: ignore[arg-type]  # `budget_of` refuses a missing budget
        chosen = rows.take(picks.indices)
        if picks.weights is not None:
            chosen = Rows([{**r, "weight": float(w)} for r, w in zip(chosen, picks.weights)], ids=chosen.ids, name="train", source=rows.source)
        self.facts["rows"].append({"step": f"select {self.recipe.select[0].method}", "rows": len(chosen), "report": _plain(picks.why)})
        return chosen, picks.scores if picks.scores is not None and len(picks.scores) == len(rows) else None

    # -- training --------------------------------------------------------------------------------------------------------
    def plan(self, family: Family, rows: Rows) -> Plan:
        """The plug-ins of the recipe, built."""
        recipe = self.recipe
        if not hasattr(self, "selector"):
            self.selector = recipe.select[0].build() if recipe.select else None
        if hasattr(family, "fit_to"):
            family.fit_to(rows, recipe.train.seed)
        objectives = [(c.build(), c.weight) for c in recipe.objective_for(family.kind, rows.kind)]
        for objective, _ in objectives:
            self._fits(objective, family, rows)
        measures = [c.build() for c in recipe.measure]
        return Plan(
            family, rows, objectives, recipe.optimize[0].build(), [c.build() for c in recipe.adapt], self.selector,
            [c.build() for c in recipe.compress], [m for m in measures if m.every],
        )  # fmt: skip

    def _fits(self, objective: Any, family: Family, rows: Rows) -> None:
        if family.kind not in objective.families:
            raise RecipeError(
                f"The objective '{objective.name}' serves {', '.join(sorted(objective.families))}; the model is of the family '{family.kind}'."
            )
        if objective.columns and not any(need <= set(rows.columns) for need in objective.columns):
            wanted = " or ".join(" + ".join(sorted(need)) for need in objective.columns)
            raise RecipeError(f"The objective '{objective.name}' needs the columns {wanted}; the training rows have {', '.join(sorted(rows.columns))}.")

    def _train(self, plan: Plan, ctx: Context, resume: bool) -> Outcome:
        recipe = self.recipe
        where, trackers = (self.folder / "metrics.jsonl", tuple(recipe.train.tracker)) if ranks.first() else (None, ())
        journal = Journal(where, self.show, trackers, {"recipe": recipe.name or ""})
        identity = {"the training rows' fingerprint": plan.rows.fingerprint}
        engine = Engine(plan, recipe.train, ctx, self.folder, journal, identity)
        if not resume:
            journal.cut(0)
        try:
            outcome = engine.run(resume)
        finally:
            journal.finish()
        self.engine = engine
        return outcome

    # -- the result ------------------------------------------------------------------------------------------------------
    def _finish(self, plan: Plan, ctx: Context, target: Path) -> None:
        """Merge and compress where asked, then write what plain transformers or peft loads."""
        recipe, first = self.recipe, plan.adapters[0]
        ctx.clock.step = ctx.clock.steps
        # One adapter with nothing to combine writes itself; in all other cases the network is written as it will be used.
        alone = len(plan.adapters) == 1 and not recipe.merge and not (plan.others and defines(first, "folded"))
        writing = target.with_name(".writing-model")
        shutil.rmtree(writing, ignore_errors=True)
        with ExitStack() as stack:
            for plugin in plan.plugins:
                if not (alone and plugin is first):
                    stack.enter_context(plugin.folded(plan.model))
            adapted = hasattr(plan.model.network, "peft_config")
            family = self._combined(plan, ctx)
            alone &= hasattr(family.network, "peft_config") == adapted  # a compressor may have merged the adapter into the weights
            with checkpoint.disk_errors(self.folder, "model", tuple(checkpoint.REASONS)):
                first.export(family, writing) if alone else save_network(merged(family), writing)
        shutil.rmtree(target, ignore_errors=True)
        writing.rename(target)

    def _combined(self, plan: Plan, ctx: Context) -> Family:
        """The tuned model after `merge` and `compress`."""
        family = plan.model
        if self.recipe.merge:
            family = self._merged(merged(family), ctx)
        for compressor in plan.others:
            family = compressor.compress(family, ctx) or family
            self.facts.setdefault("compress", []).append(_plain(getattr(compressor, "report", {})))
        return family

    def _merged(self, family: Family, ctx: Context) -> Family:
        """What `merge` makes of the base and of everything that `of` names: "this", a model of the recipe, a run or a folder.

        All of them are read from their folders tensor by tensor, and so is the result."""
        ctx.current, ctx.switch = family, None
        this, sources = self.folder / ".this-model", Sources(family)
        with checkpoint.disk_errors(self.folder, "model", tuple(checkpoint.REASONS)):
            save_network(family, this)
        names = [n for n in self.recipe.merge_of or ["this"] if n != "base"] or ["this"]
        tuned = [sources.of(this if name == "this" else self._spec_of(name, ctx)) for name in names]
        merger = self.recipe.merge[0].build()
        load_state(family, merger.merge(sources.of(self._spec_of("base", ctx)), tuned, ctx))
        self.facts["merge"] = _plain(getattr(merger, "report", {}))
        shutil.rmtree(this)
        return family

    def _spec_of(self, name: str, ctx: Context) -> Any:
        if name in self.recipe.models or name == "base":
            spec = self.recipe.model_spec(None if name == "base" else name)
            return ctx.model(name) if hasattr(spec, "network") else spec  # one in memory has been tuned in place; its copy was not
        return ctx.model(name) if ctx.has_model(name) else name

    # -- what the next stage continues from ------------------------------------------------------------------------------
    def _save_end(self, ctx: Context) -> None:
        self.store = ctx.store.state_dict()
        checkpoint.save(self.folder / "end", 0, {"store": self.store, "facts": _plain(self.facts), "given": self._given()})
        checkpoint.replace_text(self.folder / "done", "done\n")
        ctx.models.clear()
        gc.collect()

    def _load_end(self) -> None:
        newest = checkpoint.latest(self.folder / "end")
        if newest is not None:
            state = checkpoint.load(newest)
            self._same_data(state["given"])
            self.store, self.facts = state["store"], state["facts"]

    def _say(self, sentence: str) -> None:
        if self.tell is not None:
            self.tell(sentence)


class Evaluator:
    """The validation score of a state dict: accuracy for classifiers, minus the mean token loss for language models."""

    def __init__(self, stage: Stage, ctx: Context) -> None:
        self.stage, self.ctx = stage, ctx
        self.scratch: Family | None = None

    def __call__(self, source: Any) -> float:
        rows = self.ctx.rows("val")
        family = self.scratch = self.scratch or plain(self.ctx.current.frozen_copy())  # type: ignore[union-attr]
        load_state(family, source if isinstance(source, Mapping) else source.network.state_dict())
        total = number = 0.0
        with family.evaluating():
            for start in range(0, len(rows), 64):
                batch = family.collate([rows[i] for i in range(start, min(len(rows), start + 64))], train_on=self.ctx.train_on)
                if "score" in family.verbs:
                    logp = family.score(batch).logp
                    total, number = total + float(logp.sum()), number + len(logp)
                else:
                    hit = family.classify(batch).argmax(-1).cpu() == batch.tensors["labels"].cpu()
                    total, number = total + float(hit.sum()), number + len(hit)
        return total / max(1.0, number)


def frozen(family: Family) -> Family:
    """A model that was just loaded, as a reference: eval mode, no gradients."""
    for module in (family.network, *family.modules.values()):
        module.eval().requires_grad_(False)
    return family


def plain(family: Family) -> Family:
    """The same model as a plain transformers network where its adapters can be merged in, else as it is."""
    try:
        return merged(family)
    except ModelError:
        return family


def merged(family: Family) -> Family:
    """The same model as a plain transformers network. An adapter that cannot be merged into the weights is refused."""
    if hasattr(family.network, "peft_config"):
        family.network = folded(family.network, "leave out `merge`, or choose another value for `adapt`")
    return family


def _plain(value: Any) -> Any:
    """Only what goes into json."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
