"""What is connected before the first step of a training: listeners to gradients, and the switch that takes the adapters off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from luthier.core.plugin import Group, Parts, Plugin, defines

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


def hook_gradients(plugins: Sequence[Plugin], groups: Sequence[Group], ctx: Context) -> None:
    """Call `on_grad` of the plug-ins that define it as soon as a parameter's gradient is there."""
    listeners = [p for p in plugins if defines(p, "on_grad")]
    if not listeners:
        return
    for group in groups:
        for name, param in group.params.items():

            def ready(p: torch.Tensor, name: str = name) -> None:
                for plugin in listeners:
                    plugin.on_grad(name, p, ctx)  # type: ignore[arg-type]

            param.register_post_accumulate_grad_hook(ready)


def adapters_off(model: Family, adapters: Sequence[Any], parts: Mapping[str, Parts]) -> Callable[[], AbstractContextManager[None]] | None:
    """The model as it was before its adapters, as a context; None where taking them off would not give it back exactly."""
    if not adapters or not all(getattr(a, "switchable", False) for a in adapters) or any(p.modules for p in parts.values()):
        return None

    @contextmanager
    def off() -> Iterator[None]:
        with ExitStack() as stack:
            for adapter in adapters:
                stack.enter_context(adapter.disabled(model))
            yield

    return off
