"""Hand-made batches of token sequences for the language-model objectives."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luthier.adapt import Adapter
from luthier.core import checkpoint
from luthier.core.batch import Batch, Sequence
from luthier.core.context import Context
from luthier.core.engine import Engine, Plan
from luthier.core.journal import Journal
from luthier.core.plugin import Group, Parts
from luthier.optimize import Optimizer, torch_groups
from luthier.recipe import Train


def sequence(ids: Any, prompt: int, row: int = 0, branch: str = "completion", **data: Any) -> Sequence:
    """`ids` whose first `prompt` tokens are not supervised."""
    mask = np.arange(len(ids)) >= prompt
    return Sequence(np.asarray(ids), mask, row=row, branch=branch, data=data)


def batch_of(sequences: list[Sequence], rows: list[dict] | None = None, weights: Any = None) -> Batch:
    n = 1 + max(s.row for s in sequences) if sequences else 0
    rows = rows if rows is not None else [{} for _ in range(n)]
    return Batch(rows, np.arange(len(rows)), sequences, weights=None if weights is None else torch.tensor(weights))


def random_batch(rows: int = 3, vocabulary: int = 64, seed: int = 0, prompt: int = 4, weights: Any = None) -> Batch:
    rng = np.random.default_rng(seed)
    made = [sequence(rng.integers(5, vocabulary, prompt + 3 + 2 * i), prompt, row=i) for i in range(rows)]
    return batch_of(made, weights=weights)


def random_pairs(rows: int = 3, vocabulary: int = 64, seed: int = 0, prompt: int = 5, rows_data: list[dict] | None = None) -> Batch:
    rng = np.random.default_rng(seed)
    made = []
    for i in range(rows):
        head = rng.integers(5, vocabulary, prompt)
        made += [sequence(np.concatenate([head, rng.integers(5, vocabulary, 2 + i)]), prompt, i, "chosen"),
                 sequence(np.concatenate([head, rng.integers(5, vocabulary, 4)]), prompt, i, "rejected")]  # fmt: skip
    return batch_of(made, rows_data)


def logits_of(family: Any, s: Sequence) -> Tensor:
    """The network's own logits at each supervised token of one sequence, by its plain forward pass."""
    out = family.network(input_ids=torch.from_numpy(s.ids)[None]).logits[0]
    return out[torch.from_numpy(s.supervised) - 1]


def logps_of(family: Any, s: Sequence) -> Tensor:
    target = torch.from_numpy(s.labels[s.supervised])
    return torch.log_softmax(logits_of(family, s), -1).gather(-1, target[:, None])[:, 0]


def gradients(family: Any, value: Tensor) -> list[Tensor]:
    family.network.zero_grad()
    value.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in family.network.parameters()]


def through_checkpoint(state: Any) -> Any:
    """A plug-in's state as a resumed run gets it back: json and tensors."""
    tensors: dict[str, Tensor] = {}
    return checkpoint.unpack(json.loads(json.dumps(checkpoint.pack(state, tensors))), tensors)


class Everything(Adapter):
    axis, name = "adapt", "everything"

    def attach(self, model: Any, ctx: Any = None) -> Parts:
        return Parts([Group("body", dict(model.network.named_parameters()))])


class Adam(Optimizer):
    axis, name, lr = "optimize", "adam", 3e-3

    def build(self, groups: Any, ctx: Any = None) -> torch.optim.Optimizer:
        return torch.optim.AdamW(torch_groups(groups, self.lr), lr=self.lr)


def engine(family: Any, objectives: list[Any], rows: list[dict], ctx: Context, folder: Any = None, **changes: Any) -> Engine:
    """The training loop over `rows`, all weights moving, a few steps."""
    settings = {"steps": 4, "batch": 4, "tokens_per_micro_batch": 64, "schedule": "constant", "warmup": 0.0, "precision": "fp32", "save_every": 0}
    plan = Plan(family, rows, [(o, 1.0) for o in objectives], Adam(), [Everything()])
    ctx.streams.setdefault("train", rows)
    return Engine(plan, Train(**settings | changes), ctx, folder, Journal(folder / "metrics.jsonl" if folder else None))
