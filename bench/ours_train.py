"""Our side of the training rows: the engine as a recipe uses it, on given rows in a given order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from bench.parts import Parts
from bench.worker import Clock, Job, Memory, main, matmul_rate, start_adapter, without_dropout
from luthier.adapt.full import Full
from luthier.adapt.lora import Lora
from luthier.core.context import Context
from luthier.core.engine import Engine
from luthier.core.models import load
from luthier.core.plan import Plan
from luthier.core.plugin import Plugin
from luthier.objective import _rollout
from luthier.objective.dpo import DPO
from luthier.objective.grpo import GRPO
from luthier.objective.info_nce import InfoNCE
from luthier.objective.sft import SFT
from luthier.optimize.adamw import AdamW
from luthier.recipe import Train
from luthier.select import Selector


class InOrder(Selector):
    """The rows as they come: the other side gets them in the same order."""

    axis, name = "select", "in-order"

    def batches(self, rows: Any, size: int, epoch: int, ctx: Context) -> Iterator[list[int]]:
        return (list(range(at, min(len(rows), at + size))) for at in range(0, len(rows), size))


class Watch(Plugin):
    """Sets the adapter's start, notes each step's end, loss and gradient, and then looks closely at the first batch once more."""

    axis, name = "measure", "watch"

    memory: Memory

    def __init__(self, steps: int, warmup: int) -> None:
        self.clock, self.steps = Clock(warmup, matmul_rate), steps
        self.seen: list[float] = []
        self.parts, self.extra = Parts(), 0

    def attach(self, model: Any, ctx: Context) -> None:
        start_adapter(model.network)
        without_dropout(model.network)

    def after_step(self, step: Any, ctx: Context) -> None:
        if len(self.clock.ends) == self.steps:
            self.parts.stop()
            return
        self.clock.tick()
        self.seen += [step.losses["loss"], step.grad_norm]
        if len(self.clock.ends) == self.steps:
            self.extra = self.memory.extra  # the profiler's own is not counted
            self.parts.start()


class GivenAnswers(GRPO):
    """GRPO's update alone: the answers and their advantages come with the rows."""

    def rollout(self, batch: Any, ctx: Context) -> Any:
        given = []
        for i, row in enumerate(batch.rows):
            head = np.asarray(ctx.current.tokenizer(row["prompt"])["input_ids"])  # type: ignore[union-attr]
            for answer, advantage in zip(row["answers"], row["advantages"]):
                ids = np.asarray(ctx.current.tokenizer(answer)["input_ids"])  # type: ignore[union-attr]
                given.append(_rollout.Rollout(i, head, ids, answer, True, data={"advantage": advantage}))
        return _rollout.assemble(given, batch)


def objective_of(job: Job) -> Any:
    if job["objective"] == "grpo":
        return GivenAnswers(group_size=job["group"], max_new_tokens=job["answer"], beta=0.0, loss_type="dapo")
    if job["objective"] == "info-nce":
        return InfoNCE(temperature=0.05, chunk=job["chunk"])
    return {"sft": SFT, "dpo": DPO}[job["objective"]]()


def train(job: Job) -> Job:
    """Seconds, losses, gradients and memory of some steps."""
    family = load(job["model"])
    watch = Watch(job["warmup"] + job["steps"], job["warmup"])
    adapter = Lora(rank=job["rank"], alpha=2.0 * job["rank"]) if job["rank"] else Full()
    rows = [*job["rows"], *job["rows"][: job["batch"]]]  # the first batch again, as rows of their own: nothing that was computed for it serves twice
    if job["objective"] != "info-nce":
        rows = [{**row, "plain": True} for row in rows]
    plan = Plan(family, rows, [(objective_of(job), 1.0)], AdamW(lr=job["lr"]), adapters=[adapter], selector=InOrder(), others=[watch])
    settings = Train(steps=watch.steps + 1, batch=job["batch"], tokens_per_micro_batch=job["tokens_per_micro_batch"], schedule="constant", warmup=0,
                     clip=1.0, precision="fp32", save_every=0, device="cpu")  # fmt: skip
    engine = Engine(plan, settings, Context(family))
    with Memory() as watch.memory:
        engine.run()
    return {**watch.clock.result, "check": watch.seen, "extra_bytes": watch.extra, "flops_per_second": watch.clock.found, "parts": watch.parts.found}


if __name__ == "__main__":
    main(train)
