"""The one training loop. It knows hooks, groups and counts, and no method by name.

A run can be killed at any moment and continues to the same weights: the order of rows is a function of (seed, epoch), schedules are
functions of the step, and a checkpoint holds trained weights, optimizer, plug-in states, random states and what is left of the epoch.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from luthier.core import guard, memory, ranks, sharding
from luthier.core.closure import Closure
from luthier.core.context import Clock, Context, seed_of
from luthier.core.feed import Feed
from luthier.core.hooks import checkpoint_contexts
from luthier.core.journal import Journal
from luthier.core.lean import lean
from luthier.core.loss import Loss, of
from luthier.core.one_pass import one_pass
from luthier.core.plan import Learned, Micro, Outcome, Plan, rate
from luthier.core.plugin import Group, Parts, Plugin, Step, Turn, defines, give_up
from luthier.core.resume import restore, stop_signals, write
from luthier.core.rowscores import RowScores
from luthier.core.wiring import adapters_off, hook_gradients
from luthier.errors import RecipeError

if TYPE_CHECKING:
    from luthier.core.batch import Batch
    from luthier.core.families import Family
    from luthier.recipe import Train


class Engine:
    """Trains `plan` under `train` settings, logging and checkpointing below `folder`."""

    def __init__(self, plan: Plan, train: Train, ctx: Context, folder: Path | None = None, journal: Journal | None = None, identity: dict[str, Any] | None = None) -> None:
        self.plan, self.train, self.ctx, self.folder = plan, train, ctx, folder
        self.model = plan.model
        self.journal = journal or Journal(None)
        self.identity = {"threads": torch.get_num_threads(), **(identity or {})}
        self.groups: list[Group] = []
        self.parts: dict[str, Parts] = {}
        self.mode = ranks.mode(getattr(train, "parallel", "auto"))
        self.tokens, self.seconds = 0, 0.0
        self.asked: signal.Signals | None = None
        """The signal that asked this process to stop."""
        self.stopping: signal.Signals | None = None
        """The one that all processes have agreed to stop for."""
        self.ended: str | None = None
        """Why a plug-in ended the training before its last step."""
        self.saved = -1
        """The step of the newest checkpoint."""
        self.saved_at = time.monotonic()
        self.lead = {hook: self._only(hook) for hook in ("turn", "rollout", "pick", "batches")}
        self.feed = Feed(plan, train, ctx, self.lead["batches"], self.lead["pick"])
        self.counts_rows = True
        """Whether the rows before this process are its own; False where there were fewer rows than processes."""
        self.whole = any(o.whole_batch for o, _ in plan.objectives)
        """Whether a loss couples the rows of a batch: then every process has all of them, and the work on them is spread."""

    def _only(self, hook: str) -> Plugin | None:
        found = [p for p in self.plan.plugins if defines(p, hook)]
        if len(found) > 1:
            raise RecipeError(f"Both {found[0].axis} '{found[0].name}' and {found[1].axis} '{found[1].name}' decide '{hook}'; keep one of them.")
        return found[0] if found else None

    # before the first step ------------------------------------------------------------------------------------------
    def prepare(self) -> None:
        """Attach the plug-ins, freeze what no group names, build the optimizer, plan the length."""
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        precision = {"fp32": "no", "auto": "no"}.get(self.train.precision, self.train.precision)
        cpu = self.model.device.type == "cpu"
        if self.train.precision == "auto" and not cpu:
            precision = "bf16"
        AcceleratorState._reset_state()  # an earlier run in this Python process may have had another precision
        self.accelerator = Accelerator(cpu=cpu, mixed_precision=precision)
        self.ctx.current = self.model
        self.ctx.batch_size = self.train.batch
        attached: list[Plugin] = [*self.plan.adapters, *self.plan.others, *(o for o, _ in self.plan.objectives)]
        for plugin in attached:
            parts = plugin.attach(self.model, self.ctx)
            if parts is not None:
                self._take(plugin, parts)
        trained = {id(p) for g in self.groups for p in g.params.values()}
        if not trained:
            raise RecipeError("Nothing trains: no adapter or objective named a parameter. Choose another value for 'adapt'.")
        for _, param in self.model.all_modules().named_parameters():
            if id(param) not in trained:
                param.requires_grad_(False)
        self.sync_groups()
        self._spread()
        if self.train.gradient_checkpointing:
            self.model.network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": checkpoint_contexts})
            if hasattr(self.model.network, "enable_input_require_grads"):
                self.model.network.enable_input_require_grads()
        self.optimizer = one_pass(self.plan.optimizer.build(self.groups, self.ctx))
        self.base_lr = float(self.plan.optimizer.lr)
        hook_gradients(self.plan.plugins, self.groups, self.ctx)
        off = adapters_off(self.model, self.plan.adapters, self.parts)
        if off is not None:
            self.ctx.switch = off
        self._plan_length()

    def _spread(self) -> None:
        """Make the processes of a run begin alike, and split the weights over them where that is asked for."""
        if self.mode == "single":
            return
        ranks.refuse(self.mode, self.plan.plugins)
        ranks.same_weights(p for g in self.groups for p in g.params.values())
        if self.mode == "fsdp":
            sharding.shard(self.model, self.groups)

    def _take(self, plugin: Plugin, parts: Parts) -> None:
        for group in parts.groups:
            group.options.setdefault("owner", f"{plugin.axis}/{plugin.name}")
        give_up(self.groups, parts.groups)
        self.groups += parts.groups
        self.parts[f"{plugin.axis}/{plugin.name}"] = parts
        for name, module in parts.modules.items():
            self.model.modules[name] = module.to(self.model.device)

    def sync_groups(self) -> None:
        """Let gradients flow into active groups only; inactive ones have no gradient at all, so no optimizer moves them."""
        for group in self.groups:
            for param in group.params.values():
                if not group.active:
                    param.grad = None
                param.requires_grad_(group.active)

    def _plan_length(self) -> None:
        steps = self.train.steps
        if steps is None:
            steps = max(1, round(self.feed.batches_an_epoch() * self.train.epochs)) * max(1, self.train.reuse)
        self.ctx.clock = Clock(steps=steps, epochs=self.train.epochs)

    # one step ---------------------------------------------------------------------------------------------------------
    def run(self, resume: bool = False) -> Outcome:
        """The loop. With `resume` it continues from the newest checkpoint below the folder, if there is one."""
        torch.manual_seed(seed_of(self.train.seed, "engine"))
        np.random.seed(seed_of(self.train.seed, "engine") % 2**32)
        self.prepare()
        if ranks.rank():
            torch.manual_seed(seed_of(self.train.seed, "engine", ranks.rank()))  # another dropout for other rows
        if resume:
            restore(self)
        started, clock = time.monotonic(), self.ctx.clock
        last = Step(clock.step, self.feed.epoch, self.model, self.groups, self.optimizer)
        with stop_signals(self), self.journal.progress(clock.steps, clock.step), lean(self.model.network):
            while clock.step < clock.steps and not self.ended and not self.stopping:
                epoch_before = self.feed.epoch
                for step in self._draw_and_step():
                    last = step
                if not self.feed.pending and self.feed.epoch >= epoch_before:
                    self._each("after_epoch", last, self.ctx)
                if self._agree() and not self.ended and not self.stopping:
                    self.save()
        self.seconds += time.monotonic() - started
        guard.weights(self)
        if self.folder is not None and self.train.save_every != 0 and self.saved != clock.step:
            self.save()
        if self.stopping:
            raise guard.stopped(self)
        trained = sum(p.numel() for g in self.groups for p in g.params.values())
        return Outcome(clock.step, self.seconds, self.tokens, self.ended or "all steps done", last.losses, memory.peak(self.model.device), trained)

    def _agree(self) -> bool:
        """What all processes do next: stop, end, or (True) write a checkpoint. Clocks and signals differ between them."""
        ended = next((r for p in self.plan.plugins if (r := p.stop(self.ctx))), None)
        asked, endings, due = zip(*ranks.gather((self.asked, ended, self._save_is_due())))
        self.stopping, self.ended = (next(filter(None, found), None) for found in (asked, endings))
        return bool(due[0])

    def _draw_and_step(self) -> Iterator[Step]:
        """Draw rows once and take one optimiser step on them, or `reuse` steps on one set of rollouts."""
        self.model.train()
        turn = self.lead["turn"].turn(self.ctx) if self.lead["turn"] else Turn()
        rows, ids = self.feed.next(turn)
        if self.lead["pick"] is None:
            mine = self._share(len(rows))
            rows, ids = [rows[i] for i in mine], ids[mine]
        batches = self.feed.collate(rows, ids)
        for key, (objectives, batch) in batches.items():
            lead: Any = self.lead["rollout"]  # an objective: it has `collate`
            if lead is not None and key is type(lead).collate:
                with self.model.evaluating():
                    batch = lead.rollout(batch, self.ctx)
            batches[key] = (objectives, batch if self.lead["pick"] is None else self._pick(batch))
        for _ in range(max(1, self.train.reuse) if self.lead["rollout"] else 1):
            yield self._step(turn, rows, batches)
            if self.ctx.clock.step >= self.ctx.clock.steps:
                break

    def _pick(self, batch: Batch) -> Batch:
        """The rows that an online selector keeps; all processes look at all of the batch, then take their shares."""
        lead: Any = self.lead["pick"]
        if self.ctx.clock.step < getattr(lead, "start", 0):
            batch = batch.take(range(min(len(batch), self.train.batch)))
        else:
            with self.model.evaluating():
                batch = batch.with_weights(lead.pick(batch, RowScores(self.model, batch), self.ctx))
        return batch if ranks.size() == 1 else batch.take(self._share(len(batch)))

    def _share(self, n: int) -> list[int]:
        """This process's rows of `n`; all of them where the loss is the whole batch's. One that gets none passes a row that does not count."""
        mine = list(range(n) if self.whole else ranks.share(n))
        self.counts_rows = bool(mine)
        return mine or list(range(min(n, 1)))

    def _step(self, turn: Turn, rows: list[Any], batches: dict[Any, tuple[list[tuple[Any, float]], Batch]]) -> Step:
        clock, began = self.ctx.clock, time.monotonic()
        lr = self.base_lr * rate(self.train, clock.step, clock.steps)
        step = Step(clock.step, self.feed.epoch, self.model, self.groups, self.optimizer, rows, lr=lr, turn=turn, samples=clock.samples)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        micro = self._micro_batches(batches)
        step.micro_batches = [m.batch for m in micro]
        self._each("before_step", step, self.ctx)
        self.sync_groups()
        learned = self._learned(micro)
        self._descend(step, micro, learned)
        self._each("after_step", step, self.ctx)
        clock.step += 1
        clock.samples += learned.rows
        self.tokens += learned.tokens
        self._record(step, learned, time.monotonic() - began)
        return step

    def _micro_batches(self, batches: dict[Any, tuple[list[tuple[Any, float]], Batch]], prepare: bool = True) -> list[Micro]:
        made = []
        for number, (key, (objectives, batch)) in enumerate(batches.items()):
            if not objectives or not len(batch):
                continue
            for plugin in self.plan.plugins:
                if prepare and getattr(type(plugin), "collate", key) is key:
                    batch = plugin.prepare(batch, self.ctx)
            whole = any(o.whole_batch for o, _ in objectives)
            tokens = None if whole else self.train.tokens_per_micro_batch
            made += [Micro(objectives, part, number) for part in batch.split(tokens, objectives[0][0].together, self.model.shares)]
        return made

    def _learned(self, micro: list[Micro]) -> Learned:
        """What all processes together learn from in this step."""
        own = Learned(len(micro))
        for objectives, batch, number in micro if self.counts_rows else []:
            own.add(number, (batch.counts(), *(o.counts(batch) for o, _ in objectives)))
            own.rows += len(batch)
            own.tokens += sum(len(s) for s in batch.sequences)
        return Learned.together([own] if self.whole else ranks.gather(own))

    def _descend(self, step: Step, micro: list[Micro], learned: Learned) -> None:
        counts = [learned.counts(m) for m in micro]
        # Sharded layers are gathered by all processes together, so all pass through them equally often.
        idle = learned.passes - len(micro) if self.mode == "fsdp" else 0

        def passes(grad: bool = True) -> dict[str, float]:
            losses: dict[str, float] = {}
            part = float(self.counts_rows) / (ranks.size() if self.whole else 1)
            for m, count in zip(micro, counts):
                with ranks.spreading(self.whole):
                    self._one_pass(m, count, losses if self.counts_rows else {}, grad, part)
            for _ in range(idle):
                self._one_pass(micro[0], counts[0], {}, grad, 0.0)
            if grad:
                ranks.sum_gradients([p for g in self.groups if g.active for p in g.params.values() if not sharding.is_sharded(p)])
            return ranks.summed(losses)

        if not learned.passes:
            step.skip = True
            return
        if self.plan.optimizer.two_pass:
            closure = Closure(self.model, self.optimizer, passes, self._finish_gradient(step))
            closure.check = lambda losses: guard.losses(self, losses, step)
            self.plan.optimizer.step(self.optimizer, closure, self.ctx)
            step.losses = closure.first_losses
            return
        self.optimizer.zero_grad(set_to_none=True)
        step.losses = passes()
        guard.losses(self, step.losses, step)
        if self._finish_gradient(step)():
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _one_pass(self, micro: Micro, count: dict[str, float], losses: dict[str, float], grad: bool, part: float = 1.0) -> None:
        """Forward and, with `grad`, backward of one micro-batch; each yielded loss before the next is computed.

        `part`: what this process's pass counts in the sum over all. One that counts 0 goes through the layers and leaves no gradient."""
        for loss in self._losses(micro.objectives, micro.batch):
            value = loss.value(count) * part
            for name, term in loss.terms.items():
                shown = term.total if term.report is None else term.report
                divisor = count.get(name, count.get(term.per, 1.0) if term.count is None else term.count)
                told = part * float(shown.detach()) / (divisor or 1.0)
                losses[name] = losses.get(name, 0.0) + told
                losses["loss"] = losses.get("loss", 0.0) + term.weight * told
            if grad and value.requires_grad:
                self.accelerator.backward(value)
            losses["loss"] = losses["loss"] if bool(value.detach().isfinite()) else float("nan")

    def _losses(self, objectives: list[tuple[Any, float]], batch: Batch) -> Iterator[Loss]:
        total = Loss()
        with self.accelerator.autocast():
            for objective, weight in objectives:
                given = objective.loss(self.model, batch, self.ctx)
                if isinstance(given, Iterator):
                    for part in given:
                        yield Loss().merge(of(part, objective.name), weight)
                else:
                    total.merge(of(given, objective.name), weight)
            for plugin in self.plan.plugins:
                extra = plugin.penalty(self.model, self.ctx)
                if extra is not None:
                    total.merge(extra)
        if total.terms:
            yield total

    def _finish_gradient(self, step: Step) -> Callable[[], bool]:
        """Let the plug-ins read and edit the gradient, clip it. Returned as a function: a two-pass optimizer calls it at its end."""
        scaler = self.accelerator.scaler

        def finish() -> bool:
            if scaler is not None:
                scaler.unscale_(self.optimizer)
            self._each("after_backward", step, self.ctx)
            params = [p for g in self.groups for p in g.params.values() if p.grad is not None]
            norm = sharding.gradient_norm([p.grad for p in params if p.grad is not None])
            step.grad_norm = float(norm)
            if scaler is not None:
                step.skip |= not math.isfinite(step.grad_norm)  # half precision overflowed: a smaller scale, and the next step
                scaler.update()
            if not step.skip and not math.isfinite(step.grad_norm):
                raise guard.broken(self, "The gradient is not a number", step)
            if self.train.clip:
                sharding.clip(params, self.train.clip, norm)
            return not step.skip

        return finish

    def _each(self, hook: str, *args: Any) -> None:
        for plugin in self.plan.plugins:
            getattr(plugin, hook)(*args)

    # records and checkpoints --------------------------------------------------------------------------------------------
    def _record(self, step: Step, learned: Learned, seconds: float) -> None:
        line = {"step": self.ctx.clock.step, "epoch": self.feed.epoch, **step.losses, "grad_norm": step.grad_norm, "lr": step.lr,
                "rows": learned.rows, "tokens_per_second": learned.tokens / max(seconds, 1e-9), "memory_gib": memory.held(self.model.device) / 2**30, **self.ctx.logged}  # fmt: skip
        for measure in self.plan.measures:
            if measure.every and self.ctx.clock.step % measure.every == 0:
                with self.folded(), self.model.evaluating():
                    found = measure.measure(self.model, self.ctx.streams.get("test"), self.ctx)
                line |= {f"{measure.name}/{k}": v for k, v in found.numbers.items()}
        if self.train.eval_every and self.ctx.clock.step % self.train.eval_every == 0 and self.ctx.has_rows("val"):
            line["val_loss"] = self.validate()
        self.journal.write(line, every=self.train.log_every)
        self.ctx.logged.clear()

    def validate(self) -> float:
        """The objectives' loss on the validation rows, without gradient."""
        rows, total, number = self.ctx.rows("val"), 0.0, 0
        with self.folded(), self.model.evaluating():
            for start in range(0, len(rows), self.train.batch):
                part = [rows[i] for i in range(start, min(len(rows), start + self.train.batch))]
                losses: dict[str, float] = {}
                micro, whole = self._micro_batches(self.feed.collate(part, np.arange(len(part))), prepare=False), Learned()
                for objectives, batch, n in micro:
                    whole.add(n, (batch.counts(), *(o.counts(batch) for o, _ in objectives)))
                for m in micro:
                    self._one_pass(m, whole.counts(m), losses, grad=False)
                total, number = total + losses.get("loss", 0.0) * len(part), number + len(part)
        return total / max(1, number)

    @contextmanager
    def folded(self, adapters: bool = True) -> Iterator[Family]:
        """The model as it will be used, around evaluation, measures and export. `adapters`: with what the adapters fold, too."""
        with ExitStack() as stack:
            for plugin in self.plan.plugins:
                if adapters or plugin not in self.plan.adapters:
                    stack.enter_context(plugin.folded(self.model))
            yield self.model

    def _save_is_due(self) -> bool:
        every = self.train.save_every
        due = self.ctx.clock.step % every == 0 if every else time.monotonic() - self.saved_at > 60
        return self.folder is not None and every != 0 and due

    def save(self) -> Path:
        """A checkpoint of everything that the rest of the run depends on."""
        guard.weights(self)
        path = write(self)
        self.saved, self.saved_at = self.ctx.clock.step, time.monotonic()
        return path
