"""What a two-pass optimizer is handed: a function that evaluates the step's micro-batches as often as it likes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from luthier.core import checkpoint

if TYPE_CHECKING:
    from luthier.core.families import Family


@dataclass
class Outputs:
    """What one evaluation of the micro-batches computed."""

    loss: float
    losses: dict[str, float] = field(default_factory=dict)
    scores: list[Any] = field(default_factory=list)
    """Detached TokenScores or class logits, in the order in which the objectives asked for them."""


class Closure:
    """`closure(rng, edit, grad)` evaluates the same micro-batches again; `finish()` hands the final gradient to the
    plug-ins and clips; it is False when a plug-in drops the step."""

    def __init__(self, model: Family, optimizer: torch.optim.Optimizer, passes: Callable[[bool], dict[str, float]], finish: Callable[[], bool]) -> None:
        self.model, self.optimizer, self.passes, self.finish = model, optimizer, passes, finish
        self.first_losses: dict[str, float] = {}
        self.check: Callable[[dict[str, float]], None] = lambda losses: None
        self._start = checkpoint.rng_state()

    def __call__(self, rng: Literal["same", "fresh"] = "same", edit: Callable[[], AbstractContextManager[Any]] | None = None, grad: bool = True) -> Outputs:
        """Zero the gradients (with `grad`), evaluate, leave the normalised gradient in `.grad`.

        rng "same" replays the first call's randomness, so that ascent and descent see the same dropout. Batch-norm statistics
        are frozen from the second call on. `edit` is a context manager around the pass."""
        first = not self.first_losses
        if first:
            self._start = checkpoint.rng_state()
        after = checkpoint.rng_state()
        if rng == "same" and not first:
            checkpoint.set_rng_state(self._start)
        if grad:
            self.optimizer.zero_grad(set_to_none=True)
        with recording(self.model) as seen, (edit() if edit else nullcontext()), nullcontext() if first else _norms_frozen(self.model), torch.set_grad_enabled(grad):
            losses = self.passes(grad)
        if rng == "same" and not first:
            checkpoint.set_rng_state(after)
        if first:
            self.first_losses = losses
        self.check(losses)
        return Outputs(losses.get("loss", 0.0), losses, seen)


@contextmanager
def recording(model: Family) -> Iterator[list[Any]]:
    """Collect, detached, what `score` and `classify` return inside, but not what a reference says."""
    seen: list[Any] = []

    def listen(verb: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            out = verb(*args, **kwargs)
            if not model.referring:
                seen.append(out.detach())
            return out

        return wrapped

    for name in ("score", "classify"):
        setattr(model, name, listen(getattr(model, name)))
    try:
        yield seen
    finally:
        for name in ("score", "classify"):
            delattr(model, name)


@contextmanager
def _norms_frozen(model: Family) -> Iterator[None]:
    norms = [m for m in model.network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    for m in norms:
        m.eval()
    try:
        yield
    finally:
        for m in norms:
            m.train()
