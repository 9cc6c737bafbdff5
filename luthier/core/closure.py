"""What a two-pass optimizer is handed: a function that evaluates the step's micro-batches as often as it likes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

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

    def log_probs(self) -> list[Tensor]:
        """[n, classes] log-probabilities of every prediction. Large for long texts: prefer `divergence`."""
        return [torch.log_softmax(s.float(), -1) if isinstance(s, Tensor) else s.map(lambda z, at: torch.log_softmax(z, -1)) for s in self.scores]

    def divergence(self, other: Outputs) -> float:
        """KL(this || other), summed over classes and averaged over predictions, in chunks."""
        from luthier.core.scores import kl

        total, number = 0.0, 0
        with torch.no_grad():
            for mine, theirs in zip(self.scores, other.scores):
                values = kl(mine, theirs) if isinstance(mine, Tensor) else theirs.kl(mine)
                total, number = total + float(values.sum()), number + values.numel()
        return total / max(1, number)


class Closure:
    """`closure(rng, edit, grad)` evaluates the same micro-batches again; `finish()` hands the final gradient to the plug-ins and clips."""

    def __init__(self, model: Family, optimizer: torch.optim.Optimizer, passes: Callable[[bool], dict[str, float]], finish: Callable[[], None]) -> None:
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
    """Collect, detached, what `score` and `classify` return inside."""
    seen: list[Any] = []

    def listen(verb: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            out = verb(*args, **kwargs)
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
