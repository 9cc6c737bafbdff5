"""How our seconds grow: with the length of rows, their number in a step, rollouts of a prompt, and rows to choose from."""

from __future__ import annotations

import statistics
from typing import Any

from bench import texts
from bench.ours_train import GivenAnswers
from bench.worker import Job, Memory, main, start_adapter, timed
from luthier.adapt.lora import Lora
from luthier.core.context import Context
from luthier.core.lean import lean
from luthier.core.models import load
from luthier.objective.sft import SFT
from luthier.select.mig import mig


class Steps:
    """Forward and backward passes of one model with LoRA, in micro-batches as the engine makes them."""

    def __init__(self, job: Job) -> None:
        self.family = load(job["model"])
        self.ctx = Context(self.family)
        Lora(rank=job["rank"], alpha=2.0 * job["rank"]).attach(self.family, self.ctx)
        start_adapter(self.family.network)
        self.writer = texts.Writer(texts.words_of(self.family.tokenizer))  # type: ignore[attr-defined]
        self.steps = job["steps"]

    def seconds(self, objective: Any, rows: texts.Rows) -> float:
        batch = objective.collate([{**row, "plain": True} for row in rows], range(len(rows)), self.ctx)
        if isinstance(objective, GivenAnswers):
            batch = objective.rollout(batch, self.ctx)

        def step() -> None:
            for part in batch.split(512, objective.together, self.family.shares):
                objective.loss(self.family, part, self.ctx).value(batch.counts()).backward()

        with lean(self.family.network):
            return statistics.median(timed(step, 1, self.steps)["seconds"])

    def completions(self, rows: int, length: int) -> float:
        return self.seconds(SFT(), texts.completions(self.writer, rows, round(0.7 * length), round(0.3 * length)))

    def rollouts(self, number: int) -> float:
        return self.seconds(GivenAnswers(group_size=number, max_new_tokens=50), texts.rollouts(self.writer, 1, 200, 50, number))


def choosing(rows: int) -> float:
    lists, quality = texts.tags(rows, 1000)
    return timed(lambda: mig(lists, quality, rows // 20), 0, 1)["seconds"][0]


def grow(job: Job) -> Job:
    """A curve for every kind of size."""
    steps = Steps(job)
    with Memory():
        found = {
            "length": ("SFT step of 2 rows over their length", "tokens a row", "tokens", 2, [(n, steps.completions(2, n)) for n in job["lengths"]]),
            "batch": ("SFT step over its rows of 64 tokens", "rows a step", "rows", 1, [(n, steps.completions(n, 64)) for n in job["batches"]]),
            "rollouts": ("GRPO update over the rollouts of one prompt", "rollouts of 50 tokens on a prompt of 200", "rollouts", 1, [(n, steps.rollouts(n)) for n in job["rollouts"]]),
            "rows": ("MIG, 5 % of the rows", "rows", "rows", 1, [(n, choosing(n)) for n in job["rows"]]),
        }
    return {
        name: {"title": title, "x": x, "y": "seconds", "points": points, "unit": unit, "rate": [(n, times * n / seconds) for n, seconds in points]}
        for name, (title, x, unit, times, points) in found.items()
    }


if __name__ == "__main__":
    main(grow)
