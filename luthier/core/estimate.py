"""What a run will cost, before it starts: memory by counting tensors, time by floating-point operations at a measured rate."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from luthier.core.scores import CHUNK

if TYPE_CHECKING:
    from luthier.core.families import Family

MEASURED_SECONDS = 0.03
"""How long the matrix multiplication rate is measured."""
SHARE_OF_PEAK = 0.5
"""How much of the rate of bare matrix products training reaches (0.46-0.83 on four small Llamas on one busy CPU core); elementwise work
and Python take the rest."""


SHARDED = ("weights", "gradients", "optimizer")
"""What every one of n processes may hold an n-th of; activations and logits are of its own rows."""


@dataclass(frozen=True)
class Estimate:
    """Rough, and said so: a factor of two either way is usual."""

    memory_bytes: int
    seconds: float | None
    """None where the rate was not measured."""
    tokens: int
    """Tokens that pass the model in the whole run."""
    steps: int
    parts: dict[str, int]
    """Bytes of weights, gradients, optimizer, activations and logits."""
    where: str = "cpu"
    processes: int = 1

    def over(self, processes: int, sharded: bool) -> Estimate:
        """What each of several processes holds, and how long they take together: all share the rows, `sharded` ones the weights as well."""
        parts = {name: -(-size // processes) if sharded and name in SHARDED else size for name, size in self.parts.items()}
        return replace(self, memory_bytes=sum(parts.values()), seconds=self.seconds and self.seconds / processes, parts=parts, processes=processes)

    @property
    def sentences(self) -> list[str]:
        parts = ", ".join(f"{name} {_bytes(n)}" for name, n in self.parts.items())
        each, where = ("", self.where) if self.processes == 1 else (f" in each of {self.processes} processes", f"{self.where}, all processes together,")
        said = [f"Memory: about {_bytes(self.memory_bytes)}{each} ({parts})."]
        if self.seconds is not None:
            said.append(f"Time: about {_duration(self.seconds)} on {where} for {self.steps} steps over {_count(self.tokens)} tokens.")
        return said


def estimate(
    family: Family,
    rows: Any,
    batch: int,
    steps: int,
    trainable: int | None = None,
    optimizer_bytes_per_param: float = 8,
    tokens_per_micro_batch: int = 512,
    tokens_per_row: float | None = None,
    checkpointing: bool = False,
    measure: bool = True,
) -> Estimate:
    """Memory and time of `steps` steps of `batch` rows each.

    Memory = weights + one gradient and `optimizer_bytes_per_param` (Adam in fp32: 8) for each of `trainable` parameters (None: all) +
    what the backward pass needs of one micro-batch (about 10 hidden and 4 feed-forward vectors a token and layer) + one chunk of logits.
    Operations a token = 2 P forward, 2 P for the gradient of the activations, 2 `trainable` for that of the weights, and attention; P
    counts what multiplies, not the input embedding, which is looked up."""
    network = family.network
    params = list(network.parameters())
    total = sum(p.numel() for p in params)
    trainable = total if trainable is None else trainable
    shape = _shape(family)
    length = tokens_per_row if tokens_per_row else _mean_tokens(rows, family)
    micro = int(max(min(tokens_per_micro_batch, batch * length), min(length, tokens_per_micro_batch), 1))
    width = params[0].element_size() if params else 4
    kept = shape.hidden * (1 if checkpointing else 10) + (0 if checkpointing else 4 * shape.inner)
    parts = {
        "weights": sum(p.numel() * p.element_size() for p in params) + sum(b.numel() * b.element_size() for b in network.buffers()),
        "gradients": trainable * width,
        "optimizer": int(trainable * optimizer_bytes_per_param),
        "activations": int(micro * shape.layers * kept * width),
        "logits": 3 * 4 * min(micro, CHUNK) * shape.vocabulary,
    }
    tokens = int(steps * batch * length)
    attention = 12 * shape.layers * shape.hidden * length
    multiplying = max(total - _looked_up(network), 1)
    operations = tokens * (4 * multiplying + 2 * min(trainable, multiplying) + attention) * (4 / 3 if checkpointing else 1)
    seconds = operations / (matmul_rate(family, micro, shape) * SHARE_OF_PEAK) if measure and params else None
    return Estimate(sum(parts.values()), seconds, tokens, steps, parts, str(family.device) if params else "cpu")


def _looked_up(network: nn.Module) -> int:
    """Parameters of embeddings that are not also a linear head."""
    heads = {id(m.weight) for m in network.modules() if isinstance(m, nn.Linear)}
    return sum(m.weight.numel() for m in network.modules() if isinstance(m, nn.Embedding) and id(m.weight) not in heads)


@dataclass(frozen=True)
class _Shape:
    layers: int
    hidden: int
    inner: int
    vocabulary: int


def _shape(family: Family) -> _Shape:
    """Sizes from the configuration, with modest guesses where it is silent."""
    config = family.config
    config = getattr(config, "text_config", None) or config

    def known(*names: str, default: int) -> int:
        return next((int(v) for n in names if isinstance(v := getattr(config, n, None), int) and v > 0), default)

    widest = max((p.shape[-1] for p in family.network.parameters() if p.ndim > 1), default=1)
    hidden = known("hidden_size", "n_embd", "d_model", default=int(widest))
    layers = known("num_hidden_layers", "n_layer", "num_layers", default=sum(isinstance(m, nn.Linear) for m in family.network.modules()))
    vocabulary = known("vocab_size", default=0) if "score" in family.verbs else 0
    return _Shape(max(1, layers), hidden, known("intermediate_size", "n_inner", "d_ff", default=4 * hidden), vocabulary)


def _mean_tokens(rows: Any, family: Family) -> float:
    """Mean tokens a row over at most 200 rows, all its sequences together; without a tokenizer one token a row."""
    from luthier.core.columns import kind_of
    from luthier.core.encode import ENCODERS, encode

    tokenizer = getattr(family, "tokenizer", None)
    step = max(1, len(rows) // 200) if len(rows) else 1
    some = [rows[i] for i in range(0, len(rows), step) if kind_of(rows[i]) in ENCODERS]
    if tokenizer is None or not some:
        return float(_patches(family))
    return float(np.mean([sum(len(s) for s in encode(r, tokenizer)) for r in some]))


def _patches(family: Family) -> int:
    """Tokens that an image becomes."""
    config = getattr(family.config, "vision_config", None) or family.config
    image, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    return (image // patch) ** 2 + 1 if isinstance(image, int) and isinstance(patch, int) and patch else 1


def low_rank_size(family: Family, rank: int) -> int:
    """Parameters of two factors of this rank beside every linear layer but the head."""
    head = getattr(family.base_network, "get_output_embeddings", lambda: None)()
    return sum(rank * (m.in_features + m.out_features) for m in family.network.modules() if isinstance(m, nn.Linear) and m is not head)


def matmul_rate(family: Family, tokens: int, shape: _Shape | None = None, seconds: float = MEASURED_SECONDS) -> float:
    """Floating-point operations a second of products of the model's own size, type and device."""
    shape = shape or _shape(family)
    n = max(8, min(tokens, 1024))
    with torch.no_grad():
        a = torch.ones(n, shape.hidden, dtype=family.dtype, device=family.device)
        b = torch.ones(shape.hidden, shape.inner, dtype=family.dtype, device=family.device)
        _synced(a @ b)
        best, started = float("inf"), time.perf_counter()
        while time.perf_counter() - started < seconds or best == float("inf"):
            before = time.perf_counter()
            _synced(a @ b)
            best = min(best, time.perf_counter() - before)
        # the fastest product: others may have shared the processor with somebody else
        return 2.0 * n * shape.hidden * shape.inner / max(best, 1e-9)


def _synced(value: torch.Tensor) -> None:
    if value.device.type == "cuda":
        torch.cuda.synchronize(value.device)


def _bytes(n: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            return f"{n:.0f} {unit}" if unit == "bytes" or n >= 100 else f"{n:.1f} {unit}"
        n /= 1000
    raise AssertionError


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _count(n: float) -> str:
    return f"{n / 1e6:.1f} M" if n >= 1e6 else f"{n / 1e3:.0f} k" if n >= 1e4 else str(int(n))
