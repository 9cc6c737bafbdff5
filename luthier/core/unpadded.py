"""Texts through a bidirectional encoder one after the other, without padding.

All layers of such an encoder but attention work on tokens alone, so texts of unequal length can stand in one row, each with its own positions;
attention takes texts of equal length together, which need no mask. What would be padding is
not computed. Only architectures are served that say by `position_ids` where a token stands and nowhere else, and only where nobody
looks on: hooks and layers of other kinds get the padded batch that they expect.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.core.batch import Sequence
from luthier.core.lean import hooked, watched
from luthier.core.tree_attention import carry

FIRST = {"bert": False, "albert": False, "distilbert": False, "electra": False, "roberta": True, "xlm-roberta": True, "camembert": True}
"""The architectures, and whether positions begin behind the padding id."""
TOKENS = 2048
"""The most tokens in a row: the mask for those who read it has their square."""
ORIGINS = ("torch.nn.modules.", "transformers.models.", "transformers.activations", "peft.tuners.")


@dataclass(frozen=True)
class Groups:
    """How many texts of which length follow each other: attention among the tokens of each text."""

    sizes: tuple[tuple[int, int], ...]
    """(texts, length)"""

    def parts(self, row: Tensor) -> Iterator[Tensor]:
        """[tokens, ...] as [texts, length, ...] of each group."""
        return (part.unflatten(0, size) for part, size in zip(row.split([n * length for n, length in self.sizes]), self.sizes))

    def mask(self, device: torch.device) -> Tensor:
        """[1, 1, tokens, tokens]: the same for those who do not know groups."""
        owner = torch.arange(sum(n for n, _ in self.sizes)).repeat_interleave(torch.tensor([length for n, length in self.sizes for _ in range(n)]))
        return carry((owner[:, None] == owner[None]).to(device)[None, None], self)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, dropout: float, scale: float | None) -> Tensor:
        """[1, heads, tokens, d] each to [1, tokens, heads, d]."""
        rows = (self.parts(t.squeeze(0).transpose(0, 1)) for t in (query, key, value))
        found = []
        for part in zip(*rows):
            q, k, v = (t.transpose(1, 2) for t in part)
            found.append(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale).transpose(1, 2).flatten(0, 1))
        return torch.cat(found)[None]


def fits(encoder: nn.Module) -> bool:
    """Whether a network computes the same on texts that stand in one row."""
    config: Any = encoder.config
    return (
        next(encoder.parameters()).device.type == "cpu"  # elsewhere every group's own kernel would cost more than padding does
        and config.model_type in FIRST and config._attn_implementation == "sdpa" and not getattr(config, "is_decoder", False)
        and getattr(config, "position_embedding_type", "absolute") in ("absolute", None)
        and not watched() and all(_plain(module) for module in encoder.modules())
    )  # fmt: skip


def _plain(module: nn.Module) -> bool:
    return type(module).__module__.startswith(ORIGINS) and "forward" not in vars(module) and not hooked(module)


def rows_of(sequences: SequenceOf[Sequence], most: int, packed: bool = True) -> Iterator[list[int]]:
    """Indices of the texts that run together: sorted by length, at most so many, and in one row of at most `TOKENS` tokens if they are packed."""
    row: list[int] = []
    tokens = 0
    for i in sorted(range(len(sequences)), key=lambda i: len(sequences[i])):
        if row and (len(row) == most or (packed and tokens + len(sequences[i]) > TOKENS)):
            yield row
            row, tokens = [], 0
        row.append(i)
        tokens += len(sequences[i])
    yield row


def inputs(encoder: nn.Module, sequences: SequenceOf[Sequence], device: torch.device) -> tuple[Groups, dict[str, Tensor]]:
    """What the encoder reads of texts sorted by length."""
    config: Any = encoder.config
    groups = Groups(tuple((n, length) for length, n in Counter(len(s) for s in sequences).items()))
    start = config.pad_token_id + 1 if FIRST[config.model_type] else 0
    made = {"input_ids": np.concatenate([s.ids for s in sequences]), "position_ids": np.concatenate([np.arange(start, start + len(s)) for s in sequences])}
    if any("token_types" in s.data for s in sequences):
        made["token_type_ids"] = np.concatenate([s.data.get("token_types", np.zeros(len(s), np.int64)) for s in sequences])
    return groups, {k: torch.from_numpy(v.astype(np.int64))[None].to(device) for k, v in made.items()} | {"attention_mask": groups.mask(device)}
