"""EVA: LoRA started from the principal directions of its inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from luthier.adapt._shared import LoraLike, calibration_rows
from luthier.catalog import register
from luthier.errors import ModelError

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("eva", wraps="peft.initialize_lora_eva_weights")
@dataclass
class Eva(LoraLike):
    """Start LoRA's A from the main directions of what really enters each layer, and give ranks to the layers that need them.

    A = the leading right singular vectors of the layer's inputs over some batches (incremental SVD until they settle); the rank
    budget is spread by explained variance, up to `spread` x rank in one layer; B = 0 (explained variance adaptation). Needs rows:
    the stream `calibration`, else training rows; only supervised tokens count."""

    samples: int = 128
    """Rows looked at."""
    spread: float = 2.0
    """No layer gets more than this many times the rank; 1: the same rank everywhere."""
    settled: float = 0.99
    """Cosine between successive singular vectors at which a layer is done."""
    whiten: bool = False
    """Divide by the singular values (for images)."""

    families = frozenset({"causal-lm"})
    positive = ("rank", "alpha", "samples", "spread")
    toy = {"rank": 4}

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft.tuners.lora import EvaConfig

        return self.lora(model, init_lora_weights="eva", eva_config=EvaConfig(rho=self.spread, tau=self.settled, whiten=self.whiten))

    def after(self, model: Family, ctx: Context | None) -> None:
        from peft import initialize_lora_eva_weights

        size = ctx.batch_size if ctx is not None else 16
        rows = calibration_rows(ctx, self.samples, self.name)
        needed = math.ceil(self.rank * self.spread)
        batches = _batches(model, rows, size, needed)
        if not batches:
            raise ModelError(f"EVA needs {needed} supervised tokens (rank x spread) to begin with and these {len(rows)} rows hold fewer; give it more rows or a smaller rank.")
        with model.evaluating():
            try:
                initialize_lora_eva_weights(model.network, batches, show_progress_bar=False)
            except ValueError as error:
                raise ModelError(f"EVA's decomposition did not work on these rows ({error}); give it more rows or a smaller rank.") from error


def _batches(model: Family, rows: list[Any], size: int, needed: int) -> list[dict[str, torch.Tensor]]:
    """Batches of at least `needed` supervised tokens, which peft would otherwise wait for for ever; larger ones where rows are short."""
    while True:
        made = [_padded(model, rows[i : i + size]) for i in range(0, len(rows), size)]
        fit = [b for b in made if int((b["labels"] != -100).sum()) >= needed]
        if fit or size >= len(rows):
            return fit
        size *= 2


def _padded(model: Family, rows: list[Any]) -> dict[str, torch.Tensor]:
    """Right-padded inputs with labels of -100 where nothing is predicted."""
    sequences = model.collate(rows).sequences
    width = max(len(s) for s in sequences)
    ids, mask, labels = (torch.full((len(sequences), width), fill) for fill in (0, 0, -100))
    for i, s in enumerate(sequences):
        at = torch.from_numpy(s.ids)
        ids[i, : len(s)], mask[i, : len(s)] = at, 1
        labels[i, : len(s)] = torch.where(torch.from_numpy(s.mask), at, -100)
    return {k: v.to(model.device) for k, v in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))}
