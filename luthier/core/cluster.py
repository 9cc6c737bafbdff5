"""Row-wise work on a Ray cluster: every worker holds the model once and computes the rows it is handed.

No row depends on another, so the values are those of one process. A worker that dies is started again and its rows are computed anew.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.errors import RecipeError

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.rows import Rows

ROWS = 2048
"""Rows that a worker is handed at once."""
AHEAD = 4
"""Parts that wait for each worker; more would only fill the memory."""


def spread(name: str, family: Any, rows: Rows, ctx: Context, options: dict[str, Any], workers: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A signal's parts, as `luthier.core.signals` yields them, in the order in which workers finish."""
    ray = _cluster()
    gpus = min(1.0, ray.cluster_resources().get("GPU", 0.0) / workers) if family.device.type == "cuda" else 0
    model, train_on = ray.put(_portable(family)), ctx.train_on
    actor = ray.remote(max_restarts=3, max_task_retries=3, num_gpus=gpus, num_cpus=1)(_Worker)
    hands = [actor.remote(model, name, options, train_on) for _ in range(workers)]
    waiting: dict[Any, int] = {}
    for place, start in enumerate(range(0, len(rows), ROWS)):
        at = range(start, min(len(rows), start + ROWS))
        waiting[hands[place % workers].values.remote(rows.take(at))] = start
        if len(waiting) >= AHEAD * workers:
            yield from _finished(ray, waiting)
    while waiting:
        yield from _finished(ray, waiting)


def _finished(ray: Any, waiting: dict[Any, int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    done, _ = ray.wait(list(waiting), num_returns=1)
    start = waiting.pop(done[0])
    positions, values = ray.get(done[0])
    yield positions + start, values


class _Worker:
    """One process of the cluster, with its own copy of the model."""

    def __init__(self, family: Any, name: str, options: dict[str, Any], train_on: str) -> None:
        import torch

        self.family, self.name, self.options, self.train_on = family, name, options, train_on
        self.family.network.to("cuda" if torch.cuda.is_available() else "cpu")

    def values(self, rows: Any) -> tuple[np.ndarray, np.ndarray]:
        from luthier.core.context import Context
        from luthier.core.signals import SIGNALS

        ctx = Context(self.family, train_on=self.train_on)
        with self.family.evaluating(grad=self.name == "gradient"):
            positions, values = zip(*SIGNALS[self.name](self.family, rows, ctx, **self.options))
        return np.concatenate(positions), np.concatenate(values)


def _portable(family: Any) -> Any:
    """The family with its weights in main memory, as other processes can receive it."""
    twin = family.frozen_copy()
    twin.network.to("cpu")
    return twin


def _cluster() -> Any:
    """Ray, connected to the cluster at RAY_ADDRESS, or to one on this machine that ends with this process."""
    try:
        import ray
    except ImportError as error:
        raise RecipeError("train.ray computes signals on a Ray cluster: pip install 'luthier[ray]', or leave it out.") from error
    if not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
    return ray
