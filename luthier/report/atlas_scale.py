"""What a large run takes, before anyone rents a machine: memory by counting tensors, time by counting operations.

The counts are those of `luthier.core.estimate`, made for a model that is nowhere loaded.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from luthier.core.estimate import Estimate, _bytes, _duration, estimate, low_rank_size
from luthier.report.atlas import plain, table

if TYPE_CHECKING:
    from luthier.core.families import Family

SEVEN_B = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
"""The shape of Llama-2-7B."""
PEAK, SHARE = 9.89e14, 0.4
"""Operations a second in bf16 that NVIDIA states for an H100, and the share that training is taken to reach."""
RATE = PEAK * SHARE
MIG_BYTES = 52
"""Bytes at MIG's peak for every tag of every row, input included: 48 to 58 measured with 1, 4 and 16 million rows of 5 tags."""
MIG_SECONDS = 6e-6
"""Seconds of one CPU core for every row at a budget of 1 %: 6.0e-6 measured with 16 million rows, less with fewer."""
ROW_BYTES = 900
"""What a row takes in memory besides its text when a recipe reads it, measured with 200,000 rows."""


@dataclass(frozen=True)
class Selection:
    """A choice among many rows."""

    rows: int
    texts: float
    """Bytes of the rows as a recipe reads them: all at once."""
    pool: float
    """Bytes at MIG's peak, where only the tags are read."""
    seconds: float
    """One CPU core, choosing 1 %."""
    vectors: float
    """Bytes of one fp32 vector a row."""
    embedding: float
    """Seconds of one GPU to make the vectors."""


def selection(rows: int, text: int = 1200, tags: int = 5, tokens: int = 300, width: int = 384, parameters: float = 2.2e7, rate: float = RATE) -> Selection:
    """`text`: bytes of a row; `tags` and `tokens`: of a row; `width`, `parameters`: of the embedder (MiniLM's); a forward pass is 2 operations
    a parameter and token."""
    return Selection(rows, rows * (text + ROW_BYTES), rows * tags * MIG_BYTES, rows * MIG_SECONDS, rows * width * 4.0, 2 * parameters * tokens * rows / rate)


def shapeless(dtype: str, **shape: int) -> Family:
    """A language model of this shape without its weights: sizes can be counted, nothing is allocated."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from luthier.core.families import CausalLM

    with torch.device("meta"):
        network = LlamaForCausalLM(LlamaConfig(**shape)).to(getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[dtype]))  # type: ignore[call-arg, arg-type]
    return CausalLM(network, None, "a model that is not loaded")


def training_seconds(parameters: float, tokens: float, processes: int = 1, rate: float = RATE, recomputed: bool = True) -> float:
    """6 operations a parameter and token, 8 where activations are recomputed; attention, a few per cent at 512 tokens a row, left out."""
    return (8 if recomputed else 6) * parameters * tokens / (processes * rate)


@functools.cache
def _plans() -> tuple[tuple[str, Estimate], ...]:
    """Ways to tune the 7B model: micro-batches of 4,096 tokens, activations recomputed. AdamW keeps two numbers a weight, of the weight's type."""
    made = []
    for name, dtype, rank in (("full, fp32 weights", "fp32", 0), ("full, bf16 weights", "bf16", 0), ("LoRA of rank 16, bf16 weights", "bf16", 16)):
        family = shapeless(dtype, **SEVEN_B)
        made.append((name, _counted(family, dtype, rank)))
    return tuple(made)


def _counted(family: Family, dtype: str, rank: int) -> Estimate:
    trained = low_rank_size(family, rank) if rank else None
    width = {"fp32": 4, "bf16": 2}[dtype]
    return estimate(family, [], 64, 1, trained, 2 * width, 4096, 512, checkpointing=True, measure=False)


def memory_table() -> str:
    """What the plans hold on one GPU, and what each of eight holds with FSDP."""
    head = ("tuning", *_plans()[0][1].parts, "one GPU", "each of 8, FSDP")
    return table(head, [[name, *(_bytes(v) for v in cost.parts.values()), f"**{_bytes(cost.memory_bytes)}**", _bytes(cost.over(8, sharded=True).memory_bytes)] for name, cost in _plans()])


def time_table() -> str:
    rows = []
    for millions in (10, 100, 1000):
        times = [_duration(training_seconds(6.7e9, millions * 1e6, n)) for n in (1, 8)]
        rows.append([f"{millions:,} M", f"{millions * 1_000_000 // 512:,}", *times])
    return table(("tokens", "rows of 512 tokens", "one GPU", "8 GPUs"), rows)


def selection_table() -> str:
    rows = []
    for n in (1_000_000, 10_000_000, 100_000_000):
        s = selection(n)
        rows.append([f"{n // 1_000_000} M", _bytes(s.texts), _bytes(s.pool), _duration(s.seconds), _bytes(s.vectors), _duration(s.embedding)])
    return table(("rows", "rows in a recipe", "MIG on tags alone", "its time, one core", "vectors on disk", "making them, one GPU"), rows)


def constants() -> str:
    """What the arithmetic rests on, in words."""
    said = [
        f"A GPU is an H100, whose maker states {PEAK / 1e12:.0f} TFLOP/s in bf16; training is taken to reach {SHARE:.0%} of it.",
        f"MIG holds {MIG_BYTES} bytes for every tag of every row and takes {MIG_SECONDS * 1e6:.0f} microseconds a row on one core when it chooses 1 %: measured with 16 million rows.",
        f"A row that a recipe reads takes its text and {ROW_BYTES} bytes: measured with 200,000 rows.",
    ]
    return "\n".join(f"- {plain(s)}" for s in said)
