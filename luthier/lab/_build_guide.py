"""Guidance of a few attention heads while a text model is built.

Without it a model of this size stays at chance on look-up for tens of millions of tokens: the answer needs three heads to
work together, and none gains anything alone. So for most of a build every third step adds, on look-up rows,
-log a of where to look: in layer 1 one head at the word before and one at the word two before, in layer 2 one head of each
`=` at the value whose key stands before that `=`. With it look-up is right after 0.4 M tokens. Nothing of it stays in the
shipped model but the weights.
"""

from __future__ import annotations

import numpy as np
import torch

from luthier.lab._trace_faults import with_filler
from luthier.lab._trace_skills import SKILLS, table_of
from luthier.lab._trace_text import prompt
from luthier.lab.mixture import Pair, encode, encoded, held
from luthier.lab.splits import pick
from luthier.lab.training import Batch, causal_loss

EVERY, UNTIL, WEIGHT = 3, 0.9, 0.3
ARROW, EQUALS = encode("> =")


def dense_lookup(rng: np.random.Generator, filler: tuple[int, int] | None = None) -> Pair:
    """A look-up row with five practice questions, so that one row holds six answers."""
    while True:
        body = SKILLS["lookup"].draw(rng, int(rng.integers(3, 5)))
        if not held(prompt("lookup", body)):
            break
    tag, (table, query) = "lookup", table_of(body)
    if filler:
        body, tag = with_filler(rng, body, int(rng.integers(*filler))), "kv"
    more = "".join(f" ; {key} = {table[key]}" for key in (pick(rng, list(table)) for _ in range(5)))
    return prompt(tag, body), table[query] + more


def guide_rows(rng: np.random.Generator, count: int = 24, filler: tuple[int, int] | None = None) -> torch.Tensor:
    """Look-up rows of one length: the commonest of those that were drawn."""
    rows = [encoded(dense_lookup(rng, filler))[0] for _ in range(3 * count)]
    width = max({len(row) for row in rows}, key=lambda w: sum(len(row) == w for row in rows))
    return torch.tensor([row for row in rows if len(row) == width][:count])


def looks(ids: torch.Tensor) -> tuple[list[int], list[int], list[int]]:
    """(row, place of `=`, place of the value) for every question of every row."""
    found: tuple[list[int], list[int], list[int]] = ([], [], [])
    for r, row in enumerate(ids.tolist()):
        values = {row[i - 1]: i + 1 for i in range(1, len(row) - 1) if row[i] == ARROW}
        for i in range(1, len(row)):
            if row[i] == EQUALS and row[i - 1] in values:
                for part, place in zip(found, (r, i, values[row[i - 1]])):
                    part.append(place)
    return found


def guide_loss(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the only one that returns its weights
    first, second = model.model(input_ids=ids, use_cache=False, output_attentions=True).attentions[:2]
    model.set_attn_implementation(usual)
    here = torch.arange(2, ids.shape[1])
    rows, questions, values = looks(ids)
    wanted = [first[:, 0, here, here - 1], first[:, 1, here, here - 2], second[rows, 0, questions, values]]
    return sum(-(weights + 1e-6).log().mean() for weights in wanted)


def guided(chunks, seed: int, filler: tuple[int, int] | None = None):
    """The same chunks, with look-up rows for the heads beside every third batch."""

    def chunk(i: int):
        rng = np.random.default_rng([seed, i, 1])
        for step, (batch, units) in enumerate(chunks(i)):
            if step % EVERY == 0:
                batch["guide"] = guide_rows(rng, 8 if filler and step % 2 else 24, filler if step % 2 else None)
            yield batch, units

    return chunk


def guided_loss(model: torch.nn.Module, batch: Batch, progress: float) -> torch.Tensor:
    loss = causal_loss(model, batch, progress)
    return loss + WEIGHT * guide_loss(model, batch["guide"]) if "guide" in batch and progress < UNTIL else loss
