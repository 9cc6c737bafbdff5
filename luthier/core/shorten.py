"""Cutting token sequences that are too long: a prompt loses its beginning, a text without an answer its end."""

from __future__ import annotations

from typing import Any

import numpy as np

from luthier.errors import DataError


def without_beginning(ids: np.ndarray, mask: np.ndarray, cut: int, room: int, tokenizer: Any, where: str = "the row") -> tuple[np.ndarray, np.ndarray]:
    """Without `cut` of the first `room` tokens, which are the prompt; a token that begins every sequence stays."""
    if cut <= 0:
        return ids, mask
    start = int(len(ids) > 0 and ids[0] == tokenizer.bos_token_id)
    if room - start - cut < 1:
        raise DataError(f"In {where} the answer of {len(ids) - room} tokens leaves no room for a prompt; raise max_length or drop the row.")
    keep = np.r_[:start, start + cut : len(ids)]
    return ids[keep], mask[keep]


def without_end(ids: np.ndarray, mask: np.ndarray, limit: int, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """The first tokens, and the special tokens that end the sequence."""
    if len(ids) <= limit:
        return ids, mask
    tail = 0
    while tail < len(ids) - 1 and int(ids[-1 - tail]) in tokenizer.all_special_ids:
        tail += 1
    keep = np.r_[: max(0, limit - tail), len(ids) - tail : len(ids)][:limit]
    return ids[keep], mask[keep]
