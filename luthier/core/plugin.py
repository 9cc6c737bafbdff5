"""The life cycle that all training-time plug-ins share: hooks with empty defaults, and the small types they exchange.

The loop (`core/engine.py`) calls every hook in the order of the recipe's axes and knows no method by name. One step is

    turn -> batches/collate -> rollout -> pick -> prepare -> before_step
    -> (loss, penalty, on_grad) for each micro-batch -> after_backward -> clip -> optimizer step -> after_step

with `attach` before the first step and `folded` around every evaluation, save and export.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch
    from torch import nn

    from luthier.core.batch import Batch
    from luthier.core.context import Context
    from luthier.core.families import Family
    from luthier.core.loss import Loss

ANY_FAMILY = frozenset({"causal-lm", "text-encoder", "image-classifier", "dual-encoder"})
SINGLE_DEFINER = ("turn", "rollout", "pick", "batches", "build")
"""Hooks that give one answer: at most one plug-in of a stage may define each."""


@dataclass
class Group:
    """Parameters that move together. `role` is what an optimizer may read: body, head, adapter, prompt, router, codes ..."""

    role: str
    params: dict[str, nn.Parameter]
    lr_scale: float = 1.0
    weight_decay: float | None = None
    active: bool = True
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Parts:
    """What `attach` returns: the groups that train, and the modules the plug-in itself owns (saved apart from the model)."""

    groups: list[Group] = field(default_factory=list)
    modules: dict[str, nn.Module] = field(default_factory=dict)


@dataclass
class Turn:
    """Whose turn a step is: the row stream it draws, the roles that may move, the loss branch."""

    stream: str = "train"
    roles: frozenset[str] | None = None
    branch: str = "main"


@dataclass
class Step:
    """One optimiser step, as hooks see it."""

    number: int
    epoch: int
    model: Family
    groups: list[Group]
    optimizer: torch.optim.Optimizer
    rows: list[Mapping[str, Any]] = field(default_factory=list)
    micro_batches: list[Batch] = field(default_factory=list)
    losses: dict[str, float] = field(default_factory=dict)
    grad_norm: float = float("nan")
    """Norm of the accumulated gradient before clipping."""
    samples: int = 0
    lr: float = 0.0
    turn: Turn = field(default_factory=Turn)
    skip: bool = False
    """Set by a hook to drop this step's update."""


class Plugin:
    """A method's life cycle. Every hook has an empty default, so a plain method stays short."""

    axis: ClassVar[str]
    name: ClassVar[str]
    papers: ClassVar[tuple[int, ...]] = ()
    wraps: ClassVar[str | None] = None
    needs: ClassVar[frozenset[str]] = frozenset()
    """What the context must supply: reference, embedder, generation, test, val, helpers by role ..."""
    families: ClassVar[frozenset[str]] = ANY_FAMILY
    parallel: ClassVar[frozenset[str]] = frozenset({"single", "ddp", "fsdp"})
    toy: ClassVar[dict[str, Any]] = {}
    """Field values at which the method runs in well under a second on a tiny model; for the conformance battery and the matrix."""
    columns: ClassVar[tuple[frozenset[str], ...]] = ()
    """Alternatives of columns a row must have, e.g. ({prompt, completion}, {messages}); empty: any row."""

    def check(self, recipe: Any) -> str | None:
        """A sentence when this method cannot work in this recipe (which two values clash, what to use instead), else None."""
        return None

    # H1 -------------------------------------------------------------------------------------------------------------
    def attach(self, model: Family, ctx: Context) -> Parts | None:
        """Calibrate, wrap, freeze, add modules. Once a stage, before the optimizer exists. Nothing trains that no group names."""
        return None

    # H2 -------------------------------------------------------------------------------------------------------------
    def batches(self, rows: Any, size: int, epoch: int, ctx: Context) -> Iterable[list[int]]:
        """The index lists of one epoch's batches (default: a fresh shuffle)."""
        raise NotImplementedError

    # H3 -------------------------------------------------------------------------------------------------------------
    def turn(self, ctx: Context) -> Turn:
        raise NotImplementedError

    # H4 -------------------------------------------------------------------------------------------------------------
    def rollout(self, batch: Batch, ctx: Context) -> Batch:
        """Replace a batch of prompts by the policy's own answers, scored and with advantages."""
        raise NotImplementedError

    # H5 -------------------------------------------------------------------------------------------------------------
    oversample: float = 1.0
    """How many times the batch's rows `pick` is shown."""

    def pick(self, batch: Batch, row_scores: Mapping[str, Any], ctx: Context) -> Any:
        """A weight for every row; rows of weight 0 leave the batch before the backward pass.

        `row_scores` computes what is asked for on demand, without gradient, in eval mode: "loss", "entropy", "logits" ..."""
        raise NotImplementedError

    # H6, H7 ---------------------------------------------------------------------------------------------------------
    def prepare(self, batch: Batch, ctx: Context) -> Batch:
        """Corrupt inputs, add views, change masks. Sees training rows only."""
        return batch

    def before_step(self, step: Step, ctx: Context) -> None:
        """May set weights, buffers, requires_grad; must not touch gradients."""

    # H8 -------------------------------------------------------------------------------------------------------------
    def penalty(self, model: Family, ctx: Context) -> Loss | None:
        """A loss of the weights or of what the forward pass left in the scope, added to every micro-batch's loss."""
        return None

    # H9 -------------------------------------------------------------------------------------------------------------
    def on_grad(self, name: str, param: nn.Parameter, ctx: Context) -> None:
        """Called when a parameter's gradient of one micro-batch is ready; may reduce it and set it to None."""

    def after_backward(self, step: Step, ctx: Context) -> None:
        """Gradients are accumulated, unscaled, summed over ranks, not yet clipped. May edit them or set `step.skip`."""

    # H11 ------------------------------------------------------------------------------------------------------------
    def after_step(self, step: Step, ctx: Context) -> None:
        """May change weights, optimizer state, active groups, shadows, queues."""

    def after_epoch(self, step: Step, ctx: Context) -> None: ...

    # H12 ------------------------------------------------------------------------------------------------------------
    @contextmanager
    def folded(self, model: Family) -> Iterator[Family]:
        """The model as it will be used: merged, masked, averaged. Must be undone on exit."""
        yield model

    def stop(self, ctx: Context) -> str | None:
        """A reason to end training early."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs: nested dicts, lists, numbers, strings, arrays and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def defines(plugin: Plugin | type[Plugin], hook: str) -> bool:
    """Whether a plug-in, or its class, gives its own version of a hook."""
    base = getattr(Plugin, hook, None)
    return getattr(plugin if isinstance(plugin, type) else type(plugin), hook, base) is not base


def give_up(groups: Iterable[Group], newer: Iterable[Group]) -> None:
    """What a later plug-in names again is its own: it leaves the earlier groups, so that no parameter is in two."""
    named = {id(p) for group in newer for p in group.params.values()}
    for group in groups:
        if any(id(p) in named for p in group.params.values()):
            group.params = {n: p for n, p in group.params.items() if id(p) not in named}
