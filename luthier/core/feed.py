"""Which rows each step learns from: epochs of batches, side streams, and what is left of the epoch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from luthier.core.context import Context, seed_of
from luthier.core.plugin import Plugin, Turn
from luthier.errors import TrainingError

if TYPE_CHECKING:
    from luthier.core.batch import Batch
    from luthier.core.plan import Plan
    from luthier.recipe import Train

Collated = dict[Any, tuple[list[tuple[Any, float]], "Batch"]]
"""For every distinct way of collating, the objectives that read it with their weights, and the batch."""


class Feed:
    """The order of rows is a function of (seed, epoch); `epoch` and `pending` are all that a checkpoint needs."""

    def __init__(self, plan: Plan, train: Train, ctx: Context, composer: Plugin | None, picker: Plugin | None) -> None:
        self.plan, self.train, self.ctx, self.composer = plan, train, ctx, composer
        self.size = max(1, round(train.batch * (picker.oversample if picker is not None else 1.0)))
        """Rows that are drawn for a step; an online selector is shown more than are learned from."""
        self.epoch = -1
        self.pending: list[list[int]] = []

    def batches_an_epoch(self) -> int:
        return len(self._batches(0)) if self.composer is not None else math.ceil(len(self.plan.rows) / self.size)

    def _batches(self, epoch: int) -> list[list[int]]:
        if self.composer is not None:
            return [list(map(int, b)) for b in self.composer.batches(self.plan.rows, self.size, epoch, self.ctx)]
        order = np.random.default_rng(seed_of(self.train.seed, "order", epoch)).permutation(len(self.plan.rows)).tolist()
        return [order[i : i + self.size] for i in range(0, len(order), self.size)]

    def next(self, turn: Turn) -> tuple[list[Any], np.ndarray]:
        """The rows of a step and their ids."""
        if turn.stream != "train":
            picked = self.ctx.draw(turn.stream, self.train.batch)
            return picked, np.arange(len(picked))
        while not self.pending:
            self.epoch += 1
            self.ctx.clock.epoch = self.epoch
            self.pending = self._batches(self.epoch)
            if not self.pending:
                raise TrainingError("There are no rows to train on.")
        index = self.pending.pop(0)
        ids = getattr(self.plan.rows, "ids", None)
        return [self.plan.rows[i] for i in index], np.asarray(index if ids is None else ids[index], dtype=np.int64)

    def collate(self, rows: list[Any], ids: np.ndarray) -> Collated:
        """One batch for every distinct way of collating. A default loss speaks once, and only if no objective brings its own."""
        made: Collated = {}
        own = any(not o.default_loss for o, _ in self.plan.objectives)
        default_used = False
        for objective, weight in self.plan.objectives:
            key = type(objective).collate
            if key not in made:
                batch = objective.collate(rows, ids, self.ctx)
                if batch.weights is None and any("weight" in r for r in rows):
                    batch.weights = torch.tensor([float(r.get("weight", 1.0)) for r in batch.rows])
                made[key] = ([], batch)
            speaks = not objective.default_loss or (not own and not default_used)
            default_used |= objective.default_loss
            if speaks:
                made[key][0].append((objective, weight))
        return made
