"""Depth pruning as in Self-Data Distillation for Recovering Quality in Pruned Large Language Models (paper 110)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from luthier.adapt._shared import calibration_rows, validate
from luthier.catalog import register
from luthier.compress import Compressor
from luthier.core.collect import passes
from luthier.core.depth import drop_blocks, without_blocks
from luthier.core.hooks import tap
from luthier.core.modelmap import ModelMap, block_index
from luthier.errors import RecipeError

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


def depth_prune(a: Tensor, b: Tensor) -> Tensor:
    """The angular distance of vectors (last dimension), in [0, 1]: arccos(<a, b> / (|a| |b|)) / pi."""
    a, b = a.double(), b.double()
    cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp_min(1e-30)
    return torch.arccos(cosine.clamp(-1, 1)) / math.pi


def distances(model: Family, rows: SequenceOf[Mapping[str, Any]], number: int, tokens: Literal["last", "mean"] = "last", batch: int = 16) -> list[float]:
    """For each first block l the mean angular distance d(l, n) between what enters block l and what enters block l + n (or leaves the last).

    last: at each row's last token; mean: averaged over all its tokens, then over rows."""
    paths = [path for path, _ in ModelMap(model.network).blocks]
    total, count = torch.zeros(len(paths) - number + 1, dtype=torch.float64), 0
    with model.evaluating(), tap(model, paths, at="in") as entering, tap(model, paths[-1:]) as leaving:
        for run, mask in passes(model, rows, batch):
            run()
            states = [entering[p] for p in paths] + [leaving[paths[-1]]]
            real = torch.ones(states[0].shape[:2], dtype=torch.bool, device=states[0].device) if mask is None else mask
            for first in range(len(total)):
                apart = depth_prune(states[first], states[first + number])
                total[first] += float(_over_tokens(apart, real, tokens).sum())
            count += len(real)
    return (total / max(1, count)).tolist()


def _over_tokens(values: Tensor, real: Tensor, tokens: str) -> Tensor:
    """[rows] from [rows, tokens]."""
    if tokens == "mean":
        return (values * real).sum(1) / real.sum(1).clamp_min(1)
    last = (real * torch.arange(1, real.shape[1] + 1, device=real.device)).argmax(1)
    return values.gather(1, last[:, None])[:, 0]


@register("depth-prune", paper=110)
@dataclass
class DepthPrune(Compressor):
    """Take out the run of consecutive blocks that changes the hidden states least: a shallower, plain model that is faster everywhere.

    d(l, n) = mean over calibration rows of arccos(cos(h_l, h_{l+n})) / pi, where h_l enters block l; the n blocks from l* = argmin d on are
    deleted. Calibration rows are the stream `calibration`, else training rows. Quality falls: tune the pruned model afterwards, best on targets in
    the original's own words (`synthesize: self-data-distillation`). Published: 2 to 10 of 32 blocks; 6 of 32 of Llama-3.1-8B keep 91 % of the
    quality after such tuning and save 16 % of the FLOPs. Compression comes at a stage's end, so prune in a stage before the one that tunes.
    The published text leaves open which token counts; here it is the last one, `mean` takes all. An adapter is merged in first. Of a plain
    state dict the blocks from `start` on are left out (no blocks: nothing changes)."""

    drop: int = 2
    """How many consecutive blocks go."""
    start: int | None = None
    """The first block that goes; default: where the distance is least."""
    tokens: Literal["last", "mean"] = "last"
    """Hidden states of each row's last token, or of all its tokens."""
    samples: int = 128
    """Calibration rows."""
    report: dict[str, Any] = field(default_factory=dict, init=False)

    families = frozenset({"causal-lm"})
    toy = {"drop": 1, "samples": 4}

    def __post_init__(self) -> None:
        validate(self, ("drop", "samples"))
        if self.start is not None and self.start < 0:
            raise RecipeError(f"'start' is {self.start}; it is the index of a block, counted from 0.")

    def compress(self, model: Any, ctx: Context | None = None) -> Any:
        if isinstance(model, Mapping):
            return self._tensors(model)
        from luthier.core.stage import merged

        lighter = merged(model.frozen_copy())
        depth = len(ModelMap(lighter.network).blocks)
        self._fits(depth)
        found = [] if self.start is not None else distances(lighter, calibration_rows(ctx, self.samples, self.name), self.drop, self.tokens)
        first = min(range(len(found)), key=found.__getitem__) if self.start is None else self.start
        before = _size(lighter)
        drop_blocks(lighter.network, first, self.drop)
        after = _size(lighter)
        self.report = {"first": first, "dropped": self.drop, "blocks": depth - self.drop, "distances": found,
                       "parameters_before": before[0], "parameters_after": after[0], "bytes_before": before[1], "bytes_after": after[1]}  # fmt: skip
        return lighter

    def _fits(self, depth: int) -> None:
        if self.drop >= depth or (self.start or 0) + self.drop > depth:
            raise RecipeError(f"depth-prune cannot take {self.drop} blocks from block {self.start or 0} on out of a model of {depth}; lower `drop` or `start`.")

    def _tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        given = {n: tensors[n] for n in tensors}
        blocks = {i for n in given if (i := block_index(n)[0]) is not None}
        if not blocks:
            return given
        if self.start is None:
            raise RecipeError("depth-prune needs a model to measure which blocks matter least; for bare tensors set `start`.")
        self._fits(max(blocks) + 1)
        return without_blocks(given, self.start, self.drop)


def _size(model: Family) -> tuple[int, int]:
    """Parameters and their bytes."""
    return sum(p.numel() for p in model.network.parameters()), sum(p.numel() * p.element_size() for p in model.network.parameters())
