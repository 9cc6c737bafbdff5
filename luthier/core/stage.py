"""One stage of a run: rows are made, curated and chosen; the model is tuned; the result is merged, compressed and written.

Each phase leaves a finished artefact in the stage's folder, so a killed run repeats none of them.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from luthier.core.models import load, load_state, save_network

from luthier.core import checkpoint
from luthier.core.context import Context
from luthier.core.engine import Engine, Outcome, Plan
from luthier.core.journal import Journal
from luthier.core.plugin import defines
from luthier.core.rows import Rows
from luthier.errors import ModelError, RecipeError, UserError

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
        rows = self._rows(ctx, resume)
        plan = self.plan(family, rows)
        outcome = self._train(plan, ctx, resume)
        self._finish(plan, ctx, target)
        self.facts["outcome"] = dict(vars(outcome))
        self._save_end(ctx)
        return target

    def _context(self, family: Family) -> Context:
        models = {**self.models, "stage": self._reference(family)}
        models.setdefault("base", models["stage"])
        ctx = Context(
            family, self.seed, dict(self.streams), models, self.recipe.build_helpers(), self.folder, round=self.round,
            train_on=self.recipe.data.train_on, batch_size=self.recipe.train.batch, tell=self._say, runner=self.runner,
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
        kept = checkpoint.latest(self.folder / "rows") if resume else None
        if kept is not None:
            state = checkpoint.load(kept)
            ctx.load_state_dict(state["context"])
            self.facts |= state["facts"]
            ctx.streams["train"] = rows = Rows(state["rows"], ids=state["ids"], name="train", source=state["source"])
            return rows
        rows = self.streams.get("train")
        if rows is None:
            raise RecipeError("The recipe's data has no 'train' rows; add `data: {train: FILE}`.")
        self.facts["rows"] = [{"step": "given", "rows": len(rows)}]
        for choice in self.recipe.synthesize:
            rows = self._change(choice, "synthesize", rows, ctx)
        for choice in self.recipe.curate:
            rows = self._change(choice, "curate", rows, ctx)
        rows = self._select(rows, ctx)
        if len(rows) == 0:
            raise UserError("No rows are left to train on after curation and selection.")
        ctx.streams["train"] = rows
        state = {"rows": [dict(r) for r in rows], "ids": rows.ids, "source": rows.source, "context": ctx.state_dict(), "facts": self.facts}
        checkpoint.save(self.folder / "rows", 0, state)
        return rows

    def _change(self, choice: Any, verb: str, rows: Rows, ctx: Context) -> Rows:
        method = choice.build()
        with ctx.current.evaluating():  # type: ignore[union-attr]
            changed = Rows.of(getattr(method, verb)(rows, ctx), name="train")
        self.facts["rows"].append({"step": f"{verb} {choice.method}", "rows": len(changed), "report": _plain(getattr(method, "report", {}))})
        return changed

    def _select(self, rows: Rows, ctx: Context) -> Rows:
        from luthier.core.plugin import Plugin
        from luthier.select import Selector

        self.selector = self.recipe.select[0].build() if self.recipe.select else None
        if self.selector is None or type(self.selector).select is Selector.select:
            return rows
        assert isinstance(self.selector, Plugin)
        with ctx.current.evaluating():  # type: ignore[union-attr]
            picks = self.selector.select(rows, self.recipe.budget, ctx)
        chosen = rows.take(picks.indices)
        if picks.weights is not None:
            chosen = Rows([{**r, "weight": float(w)} for r, w in zip(chosen, picks.weights)], ids=chosen.ids, name="train", source=rows.source)
        self.facts["rows"].append({"step": f"select {self.recipe.select[0].method}", "rows": len(chosen), "report": _plain(picks.why)})
        return chosen

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
        journal = Journal(self.folder / "metrics.jsonl", self.show, tuple(recipe.train.tracker), {"recipe": recipe.name or ""})
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
            family = self._combined(plan, ctx)
            try:
                first.export(family, writing) if alone else save_network(merged(family), writing)
            except OSError as error:
                raise checkpoint.disk_error(error, writing, checkpoint.latest(self.folder / "checkpoints")) from error
        shutil.rmtree(target, ignore_errors=True)
        writing.rename(target)

    def _combined(self, plan: Plan, ctx: Context) -> Family:
        """The tuned model after `merge` and `compress`."""
        family = plan.model
        if self.recipe.merge:
            family = merged(family)
            base, tuned = self._merge_inputs(family, ctx)
            load_state(family, dict(self.recipe.merge[0].build().merge(base, tuned, ctx).items()))
        for compressor in plan.others:
            family = compressor.compress(family, ctx) or family
            self.facts.setdefault("compress", []).append(_plain(getattr(compressor, "report", {})))
        return family

    def _merge_inputs(self, family: Family, ctx: Context) -> tuple[Any, list[Any]]:
        """The base's state dict, and those of everything that `of` names: "this", a model of the recipe, a run or a folder."""
        this = {k: v.detach().clone() for k, v in family.network.state_dict().items()}
        names = self.recipe.merge_of or ["base", "this"]
        tuned = [this if name == "this" else self._state_of(name, ctx) for name in names if name != "base"]
        return ctx.model("base").network.state_dict(), tuned or [this]

    def _state_of(self, name: str, ctx: Context) -> Mapping[str, Any]:
        if ctx.has_model(name):
            return ctx.model(name).network.state_dict()
        folder = self.recipe.frame.path(name)
        return plain(load(folder / "model" if (folder / "model").is_dir() else name)).network.state_dict()

    # -- what the next stage continues from ------------------------------------------------------------------------------
    def _save_end(self, ctx: Context) -> None:
        self.store = ctx.store.state_dict()
        checkpoint.save(self.folder / "end", 0, {"store": self.store, "facts": _plain(self.facts)})
        checkpoint.replace_text(self.folder / "done", "done\n")
        ctx.models.clear()
        gc.collect()

    def _load_end(self) -> None:
        newest = checkpoint.latest(self.folder / "end")
        if newest is not None:
            state = checkpoint.load(newest)
            self.store, self.facts = state["store"], state["facts"]

    def _say(self, sentence: str) -> None:
        if self.tell is not None:
            self.tell(sentence)


class Evaluator:
    """The validation score of a state dict: accuracy for classifiers, minus the mean token loss for language models."""

    def __init__(self, stage: Stage, ctx: Context) -> None:
        self.stage, self.ctx, self.scratch = stage, ctx, None

    def __call__(self, source: Any) -> float:
        rows = self.ctx.rows("val")
        family = self.scratch = self.scratch or plain(self.ctx.current.frozen_copy())  # type: ignore[union-attr]
        state: Mapping[str, Any] = source if isinstance(source, Mapping) else source.network.state_dict()
        load_state(family, dict(state.items()))
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
    advice = "leave out `merge`, or choose another value for `adapt`"
    if hasattr(family.network, "merge_and_unload"):
        try:
            family.network = family.network.merge_and_unload()
        except (ValueError, NotImplementedError, TypeError, AttributeError) as error:
            raise ModelError(f"This adapter cannot be merged into the weights ({error}); {advice}.") from error
    if hasattr(family.network, "peft_config"):
        raise ModelError(f"Learned prompts cannot be merged into the weights; {advice}.")
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
