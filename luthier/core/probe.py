"""Whether a language model's rows may share their tokens, and whether we read its logits as it does: tried once, when it is loaded."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from luthier.core.batch import Sequence
from luthier.core.families import CausalLM
from luthier.core.quiet import first_line
from luthier.errors import ModelError

TOLERANCE = 1e-4
HALF_TOLERANCE = 0.1
"""In half precision, rounding alone is larger than any mistake that a prefix could hide."""


def probe(family: CausalLM) -> str | None:
    """Score three rows that share a prefix together and apart. If they differ, rows no longer share; the sentence says so."""
    config = family.config.get_text_config()
    longest = int(getattr(config, "max_position_embeddings", None) or 64)
    window = min(int(getattr(config, "sliding_window", None) or 0), 32)
    rows = _probe_rows(int(config.vocab_size), max(1, min(6 + window, longest - 5)))
    family.can_share = False
    with family.evaluating():
        apart = family.score(rows).logp
        _check_head(family, rows[0], apart)
        family.can_share = True
        try:
            together = family.score(rows).logp
        except (RuntimeError, ValueError, TypeError, KeyError, IndexError, NotImplementedError) as error:
            family.can_share = False
            return f"Rows that begin alike are computed apart, because this model cannot share their tokens ({first_line(error)})."
    tolerance = _tolerance(family)
    difference = float((together - apart).abs().max())
    family.can_share = bool(difference <= tolerance * max(1.0, float(apart.abs().max())))
    return None if family.can_share else f"Rows that begin alike are computed apart, because sharing their tokens would change this model's scores (by {difference:.1e})."


def _check_head(family: CausalLM, row: Sequence, found: Tensor) -> None:
    """What we say of a row must be what the network itself says of it."""
    if family.is_prompted:
        return
    logits = family.network(input_ids=torch.from_numpy(row.ids)[None].to(family.device), use_cache=False).logits[0]
    at = torch.from_numpy(row.supervised).to(family.device)
    target = torch.from_numpy(row.labels).to(family.device)[at]
    wanted = torch.log_softmax(logits[at - 1].float(), -1)[torch.arange(len(at), device=at.device), target]
    tolerance = _tolerance(family)
    if not torch.allclose(found[: len(wanted)], wanted, rtol=tolerance, atol=tolerance * 10):
        raise ModelError(f"A {type(family.base_network).__name__} changes its logits in a way that is not known here, so its scores would be wrong.")


def _tolerance(family: CausalLM) -> float:
    return TOLERANCE if family.dtype == torch.float32 else HALF_TOLERANCE


def _probe_rows(vocabulary: int, shared: int) -> list[Sequence]:
    """Three rows with a prefix of `shared` tokens; a window of attention is shorter than they are, where it is small."""
    rng = np.random.default_rng(0)
    prefix = rng.integers(0, vocabulary, shared)
    tails = [rng.integers(0, vocabulary, n) for n in (3, 5, 4)]
    for i, tail in enumerate(tails):
        tail[0] = i % vocabulary
    rows = [np.concatenate([prefix, tail]) for tail in tails]
    return [Sequence(ids, np.arange(len(ids)) > 0, row=i) for i, ids in enumerate(rows)]
