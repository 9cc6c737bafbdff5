"""Looking into a forward pass: `tap` records or rewrites activations, `forward_scope` carries a batch to wrapped modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from luthier.errors import ModelError, nearest


@contextmanager
def tap(
    model: Any,
    sites: Sequence[str],
    at: Literal["in", "out"] = "out",
    edit: Callable[[Tensor, str], Tensor | None] | None = None,
    positions: Tensor | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Record what enters or leaves modules, by their paths; `edit(value, site)` may return something else to go on with.

    Yields a dict that each forward pass fills anew, with graph and as it was before the edit. The input of a module is its first
    tensor; of a tuple that a module returns, its first entry. `positions` holds one token position a row (counted from the row's
    begin, so padding does not move it): then the values are [rows, d], at these positions only, and only they are edited.
    In front of an attention's output projection (`at="in"`) the last dimension is the query heads side by side.
    The last hidden state of Llama-type models is already normalised; tap the last block for what it was before."""
    network: nn.Module = getattr(model, "network", model)
    modules = dict(network.named_modules())
    for site in sites:
        if site not in modules:
            raise ModelError(f"The model has no module '{site}'.{nearest(site, modules)}")
    seen: dict[str, Tensor] = {}

    def changed(value: Tensor, site: str) -> Tensor | None:
        """Record; the new value, or None to leave it."""
        if positions is None:
            seen[site] = value
            return None if edit is None else edit(value, site)
        row = torch.arange(len(value), device=value.device)
        place = positions.to(value.device)
        seen[site] = value[row, place]
        new = None if edit is None else edit(seen[site], site)
        return None if new is None else value.index_put((row, place), new.to(value.dtype))

    def before(site: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            place = next((i for i, a in enumerate(args) if isinstance(a, Tensor)), None)
            key = None if place is not None else next((k for k, v in kwargs.items() if isinstance(v, Tensor)), None)
            if place is None and key is None:
                raise ModelError(f"No tensor enters '{site}'.")
            new = changed(args[place] if place is not None else kwargs[key], site)  # type: ignore[index]
            if new is None:
                return None
            if place is None:
                return args, {**kwargs, key: new}  # type: ignore[misc]
            return (*args[:place], new, *args[place + 1 :]), kwargs

        return hook

    def after(site: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
            first = out if isinstance(out, Tensor) else out[0]
            new = changed(first, site)
            if new is None:
                return None
            if isinstance(out, Tensor):
                return new
            if isinstance(out, tuple):
                return (new, *out[1:])
            out[next(iter(out))] = new
            return out

        return hook

    handles = [
        modules[s].register_forward_pre_hook(before(s), with_kwargs=True) if at == "in" else modules[s].register_forward_hook(after(s))
        for s in sites
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Scope:
    """What modules of one forward pass share: the batch's metadata in, named tensors and auxiliary losses out."""

    batch: Any = None
    values: dict[str, Any] = field(default_factory=dict)
    losses: dict[str, list[Tensor]] = field(default_factory=dict)
    sealed: bool = False
    """The forward pass has returned; reading goes on, writing does nothing."""

    def put(self, name: str, value: Any) -> None:
        if not self.sealed:
            self.values[name] = value

    def get(self, name: str, default: Any = None) -> Any:
        return self.values.get(name, default)

    def add_loss(self, name: str, value: Tensor) -> None:
        """One more entry of a named auxiliary loss, e.g. one from every layer."""
        if not self.sealed:
            self.losses.setdefault(name, []).append(value)


_scope: ContextVar[Scope | None] = ContextVar("luthier_forward_scope", default=None)


def current_scope() -> Scope | None:
    """The scope of the forward pass that is running; None outside one, where a module must have a declared fallback."""
    return _scope.get()


@contextmanager
def forward_scope(model: Any, batch: Any = None, **values: Any) -> Iterator[Scope]:
    """Open a scope round one forward pass of `model`. It is sealed when the block ends, and then still holds what was left in it.

    Scopes nest: the inner one counts. Give `values` to name metadata at once, e.g. `forward_scope(model, batch, task=tasks)`."""
    scope = Scope(batch, dict(values))
    token = _scope.set(scope)
    try:
        yield scope
    finally:
        scope.sealed = True
        _scope.reset(token)


def checkpoint_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """`context_fn` for torch's checkpointing: what is recomputed in the backward pass sees the scope of its own forward pass.

    By then the scope is sealed, so nothing is added twice:
    `network.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": checkpoint_contexts})`."""
    return nullcontext(), _again(_scope.get())


@contextmanager
def _again(scope: Scope | None) -> Iterator[None]:
    # The recomputation may even begin while the forward pass is still open; it must write nothing then either.
    read_only = None if scope is None else Scope(scope.batch, scope.values, {}, sealed=True)
    token = _scope.set(read_only)
    try:
        yield
    finally:
        _scope.reset(token)
