"""Looking at the model: what it is, what it reads, and what tuning it takes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from luthier.core.estimate import Estimate, estimate, low_rank_size
from luthier.core.preflight import positions

if TYPE_CHECKING:
    from luthier.core.families import Family
    from luthier.core.rows import Rows

RANK, BATCH = 16, 16
ROOM = 0.8
"""The share of free memory that a run may take; estimates are rough."""


@dataclass(frozen=True)
class ModelFacts:
    """What a recipe depends on."""

    source: str
    family: str
    parameters: int
    adapter: int
    """Parameters of a LoRA adapter of rank 16."""
    reads: int | None
    """Tokens."""
    template: bool | None
    """Whether it has a chat template; None: it does not answer."""
    where: str
    free: int | None
    """Bytes a run may take, what the model itself takes now included; None: not known."""
    full: Estimate
    lora: Estimate
    saving: Estimate
    """LoRA with activations recomputed."""

    def fits(self, cost: Estimate) -> bool:
        return self.free is None or cost.memory_bytes <= ROOM * self.free

    @property
    def has_room_for_a_copy(self) -> bool:
        """Whether the model can be tuned while it is also kept as it is."""
        return self.free is None or self.lora.memory_bytes + self.lora.parts["weights"] <= ROOM * self.free

    @property
    def lines(self) -> list[tuple[str, str]]:
        template = {None: "", True: ", with a chat template", False: ", without a chat template"}[self.template]
        reads = f", reads {self.reads:,} tokens" if self.reads else ""
        free = f"{size(self.free)} are free" if self.free is not None else "how much is free is not known"
        return [
            ("model", f"{self.source}: {self.family}, {self.parameters:,} parameters{reads}{template}"),
            ("memory", f"about {size(self.full.memory_bytes)} to tune all weights, {size(self.lora.memory_bytes)} with LoRA of rank {RANK} "
                       f"({self.adapter:,} weights, {self.adapter / self.parameters:.0%} as many as the model has); {free} ({self.where})"),
        ]  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        plain = {k: getattr(self, k) for k in ("source", "family", "parameters", "adapter", "reads", "template", "where", "free")}
        return plain | {f"memory_{k}": asdict(getattr(self, k)) for k in ("full", "lora")}


def look(family: Family, rows: Rows) -> ModelFacts:
    """By counting tensors; nothing is run."""
    adapter = low_rank_size(family, RANK)

    def cost(trainable: int | None, checkpointing: bool = False) -> Estimate:
        return estimate(family, rows, BATCH, 1, trainable, checkpointing=checkpointing, measure=False)

    tokenizer = getattr(family, "tokenizer", None)
    full = cost(None)
    free = free_memory(family.device)
    limit = getattr(family, "max_length", None) or (positions(family) if tokenizer is not None else None)
    return ModelFacts(
        family.source or "a model in memory", family.kind, sum(p.numel() for p in family.network.parameters()), adapter, limit,
        None if tokenizer is None or "generate" not in family.verbs else bool(getattr(tokenizer, "chat_template", None)), str(family.device),
        None if free is None else free + full.parts["weights"], full, cost(adapter), cost(adapter, True),
    )  # fmt: skip


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be had on a device; None where nothing tells."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
