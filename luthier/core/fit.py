"""Training a few tensors of a plug-in's own: masks, coefficients, probes, small regressors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from luthier.core.context import seed_of
from luthier.core.one_pass import one_pass

if TYPE_CHECKING:
    from luthier.core.context import Context


def fit(parameters: Iterable[torch.Tensor], loss: Callable[[list[Any]], torch.Tensor], rows: Any, ctx: Context | None = None,
        steps: int = 100, batch: int = 32, lr: float = 1e-3, weight_decay: float = 0.0, name: str = "fit") -> float:  # fmt: skip
    """Train a few tensors of a plug-in's own with AdamW: `loss(rows)` is the mean loss of some rows. Returns the last loss."""
    tensors = list(parameters)
    optimizer = one_pass(torch.optim.AdamW(tensors, lr=lr, weight_decay=weight_decay))
    seed, value = (ctx.seed if ctx else 0), float("nan")
    for step in range(steps):
        lap, at = divmod(step * batch, max(1, len(rows)))
        order = np.random.default_rng(seed_of(seed, name, lap)).permutation(len(rows))
        optimizer.zero_grad(set_to_none=True)
        result = loss([rows[int(i)] for i in order[at : at + batch]])
        result.backward()
        optimizer.step()
        value = float(result.detach())
    return value
