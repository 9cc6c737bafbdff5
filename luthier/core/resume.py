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


def identity(engine: Engine) -> dict[str, Any]:
    """What must be the same for a run to continue to the same weights."""
    methods = [f"{p.axis} {p.name}" for p in engine.plan.plugins]
    return {**engine.identity, "the list of methods": methods, "the number of steps": engine.ctx.clock.steps}


def write(engine: Engine) -> Path:
    """A checkpoint of everything that the rest of the run depends on."""
    assert engine.folder is not None
    state = {
        "identity": identity(engine),
        "weights": dict(trained_tensors(engine)),
        "optimizer": engine.optimizer.state_dict(),
        "plugins": [p.state_dict() for p in engine.plan.plugins],
        "active": [g.active for g in engine.groups],
        "context": engine.ctx.state_dict(),
        "rng": checkpoint.rng_state(),
        "pending": engine.feed.pending,
        "epoch": engine.feed.epoch,
        "ended": engine.ended,
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
    for key, now in identity(engine).items():
        then = state["identity"].get(key)
        if then != now:
            raise _changed(f"{key} was {then} and is {now}")
    for plugin, saved in zip(engine.plan.plugins, state["plugins"]):
        plugin.load_state_dict(saved)
    tensors = dict(trained_tensors(engine))
    other = {n for n in {*tensors, *state["weights"]} if n not in tensors or n not in state["weights"] or tensors[n].shape != state["weights"][n].shape}
    if other:
        raise _changed(f"other weights are trained than when it began, e.g. '{min(other)}', so a method's options have changed")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(state["weights"][name])
    for group, active in zip(engine.groups, state["active"]):
        group.active = active
    engine.sync_groups()
    try:
        engine.optimizer.load_state_dict(state["optimizer"])
    except ValueError as error:
        raise _changed(f"the optimizer's state does not fit ({error})") from error
    engine.ctx.load_state_dict(state["context"])
    engine.feed.pending, engine.feed.epoch, engine.ended = state["pending"], state["epoch"], state["ended"]
    engine.saved = engine.ctx.clock.step
    engine.tokens, engine.seconds = state["tokens"], state["seconds"]
    engine.journal.cut(state["journal"])
    checkpoint.set_rng_state(state["rng"])


def _changed(what: str) -> TrainingError:
    return TrainingError(f"This run cannot be continued exactly: {what}. Restore it, or start a new run.")


@contextmanager
def stop_signals(engine: Engine) -> Iterator[None]:
    """SIGTERM and Ctrl-C let the step finish; the loop then writes a checkpoint and stops. A second one stops at once."""

    def ask(number: int, _frame: Any) -> None:
        if engine.stopping is not None:
            raise KeyboardInterrupt
        engine.stopping = signal.Signals(number)

    try:
        old = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread, where signals cannot be handled
        old = {}
    try:
        yield
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)
