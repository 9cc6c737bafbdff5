"""A training loop's checkpoints, and stopping it politely."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from luthier.core import checkpoint, ranks, sharding
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
        "rng": ranks.gather(checkpoint.rng_state()),
        "pending": engine.feed.pending,
        "epoch": engine.feed.epoch,
        "ended": engine.ended,
        "tokens": engine.tokens,
        "seconds": engine.seconds,
        "journal": engine.journal.position(),
    }
    return checkpoint.save(engine.folder / "checkpoints", engine.ctx.clock.step, state, engine.train.keep)


def restore(engine: Engine) -> None:
    """Continue from the newest checkpoint, if there is one. Changed rows or another number of threads are refused; another number of
    processes is told, since it changes the order of sums and what dropout draws."""
    newest = checkpoint.latest(engine.folder / "checkpoints") if engine.folder else None
    if newest is None:
        engine.journal.cut(0)
        return
    state = checkpoint.load(newest)
    spread = len(state["rng"])
    if spread != ranks.size():
        engine.ctx.notice(f"The checkpoint was written by {_processes(spread)} and is continued by {_processes(ranks.size())}: the same run, but not bit for bit.")
    for key, now in identity(engine).items():
        then = state["identity"].get(key)
        if then != now and not (key == "threads" and spread != ranks.size()):
            raise _changed(f"{key} was {then} and is {now}")
    for plugin, saved in zip(engine.plan.plugins, state["plugins"]):
        plugin.load_state_dict(checkpoint.assembled(saved))
    tensors = dict(trained_tensors(engine))
    other = {n for n in {*tensors, *state["weights"]} if n not in tensors or n not in state["weights"] or not _fits(state["weights"][n], tensors[n])}
    if other:
        raise _changed(f"other weights are trained than when it began, e.g. '{min(other)}', so a method's options have changed")
    with torch.no_grad():
        for name, tensor in tensors.items():
            sharding.local(tensor).copy_(sharding.local(sharding.like(state["weights"][name], tensor.data)))
    for group, active in zip(engine.groups, state["active"]):
        group.active = active
    engine.sync_groups()
    try:
        engine.optimizer.load_state_dict(_placed(engine.optimizer, state["optimizer"]))
    except ValueError as error:
        raise _changed(f"the optimizer's state does not fit ({error})") from error
    engine.ctx.load_state_dict(state["context"])
    engine.feed.pending, engine.feed.epoch, engine.ended = state["pending"], state["epoch"], state["ended"]
    engine.saved = engine.ctx.clock.step
    engine.tokens, engine.seconds = state["tokens"], state["seconds"]
    engine.journal.cut(state["journal"])
    if spread == ranks.size():
        checkpoint.set_rng_state(state["rng"][ranks.rank()])


def _fits(saved: Any, tensor: torch.Tensor) -> bool:
    return isinstance(saved, checkpoint.Shards) or saved.shape == tensor.shape


def _placed(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's saved state, split as its parameters are."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [i for group in state["param_groups"] for i in group["params"]]
    for number, param in zip(numbers, params):
        mine = state["state"].get(number, {})
        state["state"][number] = {k: sharding.like(v, param.data) if isinstance(v, (torch.Tensor, checkpoint.Shards)) else v for k, v in mine.items()}
        if not mine:
            del state["state"][number]
    return state


def _processes(n: int) -> str:
    return "one process" if n == 1 else f"{n} processes"


def _changed(what: str) -> TrainingError:
    return TrainingError(f"This run cannot be continued exactly: {what}. Restore it, or start a new run.")


@contextmanager
def stop_signals(engine: Engine) -> Iterator[None]:
    """SIGTERM and Ctrl-C let the step finish; the loop then writes a checkpoint and stops. A second one stops at once."""

    def ask(number: int, _frame: Any) -> None:
        if engine.asked is not None:
            raise KeyboardInterrupt
        engine.asked = signal.Signals(number)

    try:
        old = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread, where signals cannot be handled
        old = {}
    try:
        yield
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)
