"""How fast models read and write, measured side by side: the same work for each of them in turn, in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
import torch

from luthier.core.batch import Sequence
from luthier.core.families import Decode

if TYPE_CHECKING:
    from luthier.core.families import Family

ROUNDS = 3


def side_by_side(work: Mapping[str, Callable[[], int]], rounds: int = ROUNDS) -> dict[str, float]:
    """Units a second of each piece of work (a function that does it and says how many units it did): the median of rounds that take turns.

    Every piece runs once before anything is timed; taking turns spreads what else the machine does over all of them."""
    found: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, do in work.items():
            started = time.perf_counter()
            units = do()
            _settled()
            if number:
                found[name].append(units / max(time.perf_counter() - started, 1e-9))
    return {name: median(values) for name, values in found.items()}


def scoring(model: Family, rows: int = 4, tokens: int = 128, seed: int = 0) -> Callable[[], int]:
    """Log-probabilities of random texts: how many tokens were read."""
    texts = _texts(model, rows, tokens, seed)
    sequences = [Sequence(ids, np.arange(len(ids)) > 0) for ids in texts]

    def work() -> int:
        with model.evaluating():
            model.score(sequences)
        return sum(len(ids) for ids in texts)

    return work


def decoding(model: Family, rows: int = 4, prompt: int = 16, tokens: int = 32, seed: int = 0) -> Callable[[], int]:
    """Greedy answers to random prompts, all of the full length, so that every model does the same: how many tokens were written."""
    from transformers.generation.logits_process import SuppressTokensLogitsProcessor

    ends = model.end_ids()  # type: ignore[attr-defined]
    never = [SuppressTokensLogitsProcessor(ends, device=str(model.device))] if ends else []
    prompts, decode = _texts(model, rows, prompt, seed), Decode(max_new_tokens=tokens, processors=never)

    def work() -> int:
        return sum(len(answers[0].ids) for answers in model.generate(prompts, decode))

    return work


def _texts(model: Family, rows: int, tokens: int, seed: int) -> list[np.ndarray]:
    """Random token ids; how fast a model reads does not depend on which."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or tokens
    draw = np.random.default_rng(seed)
    return [draw.integers(0, config.vocab_size, min(tokens, limit)) for _ in range(rows)]


def _settled() -> None:
    """A GPU works on after its functions have returned."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()
