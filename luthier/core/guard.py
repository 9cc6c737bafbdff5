"""When training cannot go on: what the user is told, and what is kept."""

from __future__ import annotations

import math
import signal
from typing import TYPE_CHECKING

import torch

from luthier.core import checkpoint, ranks, sharding
from luthier.errors import Stopped, TrainingError

if TYPE_CHECKING:
    from luthier.core.engine import Engine
    from luthier.core.plugin import Step


def losses(engine: Engine, values: dict[str, float], step: Step) -> None:
    """Refuse losses that are no numbers, naming the step and the rows."""
    if not all(math.isfinite(v) for v in values.values()):
        which = ", ".join(f"{k} = {v}" for k, v in values.items() if not math.isfinite(v))
        raise broken(engine, "The loss is not a number", step, f" ({which})")


def broken(engine: Engine, what: str, step: Step, which: str = "") -> TrainingError:
    """Training cannot go on; nothing is written of the weights that gave this."""
    engine.optimizer.zero_grad(set_to_none=True)
    rows = ", ".join(str(i) for b in step.micro_batches for i in b.ids.tolist())
    return TrainingError(
        f"{what} at step {step.number}{which}, on rows {rows}. {_good_checkpoint(engine)} "
        f"Look at these rows, lower optimize.lr (now {step.lr:.2g}) or set train.clip, then run again with --resume."
    )


def weights(engine: Engine) -> None:
    """Refuse to write a checkpoint or a model of weights that overflowed."""
    bad = (name for group in engine.groups for name, param in group.params.items() if not bool(torch.isfinite(sharding.local(param)).all()))
    name = next(filter(None, ranks.gather(next(bad, None))), None)
    if name is not None:
        raise TrainingError(
            f"After step {engine.ctx.clock.step} the weights are no longer finite numbers (the first is '{name}'). {_good_checkpoint(engine)} "
            f"Lower optimize.lr (now {engine.base_lr:.2g}) or set train.clip, then run again with --resume."
        )


def stopped(engine: Engine) -> Stopped:
    """What a run says that was stopped politely."""
    clock = engine.ctx.clock
    by = "Ctrl-C" if engine.stopping == signal.SIGINT else "SIGTERM"
    kept = "The checkpoint is written" if engine.saved == clock.step else "No checkpoint was written, as train.save_every is 0"
    error = Stopped(f"Stopped by {by} after step {clock.step} of {clock.steps}. {kept}; continue with --resume.")
    error.exit_code = 143 if engine.stopping == signal.SIGTERM else 2
    return error


def _good_checkpoint(engine: Engine) -> str:
    kept = None
    if engine.folder:
        with ranks.by_first() as mine:
            kept = checkpoint.before(engine.folder / "checkpoints", engine.ctx.clock.step) if mine else checkpoint.latest(engine.folder / "checkpoints")
    return f"The last good checkpoint is {kept.name}." if kept else "There is no good checkpoint yet."
