"""A training loop's checkpoints, and stopping it politely."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from luthier.core import checkpoint
from luthier.errors import TrainingError

if TYPE_CHECKING:
    from luthier.core.engine import Engine


def trained_tensors(engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
    """Trained parameters (active or not) and all buffers."""
    for i, group in enumerate(engine.groups):
        for name, param in group.params.items():
            yield f"{i}/{name}", param
    for name, buffer in engine.model.all_modules().named_buffers():
        yield f"buffer/{name}", buffer


def write(engine: Engine) -> Path:
    """A checkpoint of everything that the rest of the run depends on."""
    assert engine.folder is not None
    state = {
        "identity": engine.identity,
        "weights": dict(trained_tensors(engine)),
        "optimizer": engine.optimizer.state_dict(),
        "plugins": [p.state_dict() for p in engine.plan.plugins],
        "active": [g.active for g in engine.groups],
        "context": engine.ctx.state_dict(),
        "rng": checkpoint.rng_state(),
        "pending": engine.pending,
        "epoch": engine.epoch,
        "tokens": engine.tokens,
        "seconds": engine.seconds,
        "journal": engine.journal.position(),
    }
    return checkpoint.save(engine.folder / "checkpoints", engine.ctx.clock.step, state, engine.train.keep)


def restore(engine: Engine) -> None:
    """Continue from the newest checkpoint, if there is one. Changed rows or another number of threads are refused."""
    newest = checkpoint.latest(engine.folder / "checkpoints") if engine.folder else None
    if newest is None:
        engine.journal.cut(0)
        return
    state = checkpoint.load(newest)
    for key, now in engine.identity.items():
        then = state["identity"].get(key)
        if then != now:
            raise TrainingError(f"This run cannot be continued exactly: {key} was {then} and is {now}. Restore it, or start a new run.")
    for plugin, saved in zip(engine.plan.plugins, state["plugins"]):
        plugin.load_state_dict(saved)
    with torch.no_grad():
        for name, tensor in trained_tensors(engine):
            tensor.copy_(state["weights"][name])
    for group, active in zip(engine.groups, state["active"]):
        group.active = active
    engine.sync_groups()
    engine.optimizer.load_state_dict(state["optimizer"])
    engine.ctx.load_state_dict(state["context"])
    engine.pending, engine.epoch = state["pending"], state["epoch"]
    engine.tokens, engine.seconds = state["tokens"], state["seconds"]
    engine.journal.cut(state["journal"])
    checkpoint.set_rng_state(state["rng"])


@contextmanager
def stop_signals(engine: Engine) -> Iterator[None]:
    """SIGTERM and Ctrl-C let the step finish; the loop then writes a checkpoint and stops."""

    def ask(number: int, _frame: Any) -> None:
        engine.stopping = "Stopped by Ctrl-C" if number == signal.SIGINT else "Stopped by SIGTERM"

    try:
        old = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread, where signals cannot be handled
        old = {}
    try:
        yield
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)
