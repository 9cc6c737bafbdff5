"""What contrastive objectives share: pooled embeddings of a branch, multi-positive InfoNCE, exact gradient caching."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.core.loss import Loss
from luthier.errors import DataError

if TYPE_CHECKING:
    from luthier.core.batch import Batch
    from luthier.core.families import Family


def nce_rows(logits: Tensor, positive: Tensor, exclude: Tensor | None = None, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """-log of the positives' share of the softmax, one value a query: (values, has a positive).

    `positive` and `exclude` are bool like `logits`. With several positives the value is the mean over them of -log p, each against
    all that is not excluded. `weight` multiplies each pair's term."""
    logits = logits.float()
    if exclude is not None:
        logits = logits.masked_fill(exclude & ~positive, -torch.inf)
    logp = logits - logits.logsumexp(-1, keepdim=True)
    terms = torch.where(positive, logp if weight is None else weight * logp, torch.zeros_like(logp))
    number = positive.sum(-1)
    return -terms.sum(-1) / number.clamp(min=1), number > 0


def same(values: list[str]) -> Tensor:
    """[n, n] bool: equal texts."""
    numbers: dict[str, int] = {}
    index = torch.tensor([numbers.setdefault(v, len(numbers)) for v in values])
    return index[:, None] == index[None]


def cached(embed: Callable[[Batch], list[Tensor]], batch: Batch, chunk: int, loss: Callable[..., Loss]) -> Iterator[Loss]:
    """Exact gradients of a loss over the whole batch with the memory of one chunk.

    All embeddings are computed without gradient; the loss's gradient with respect to them is formed once; then each chunk is
    embedded again with gradient and yields the surrogate <embedding, gradient>, whose backward pass is the chunk's share.
    Dropout must be the same in both passes, so each chunk's random state is replayed."""
    pieces = [batch.take(range(i, min(len(batch), i + chunk))) for i in range(0, len(batch), chunk)]
    states, found = [], []
    with torch.no_grad():
        for piece in pieces:
            states.append(torch.get_rng_state())
            found.append(embed(piece))
    columns = [torch.cat(c).detach().requires_grad_() for c in zip(*found)]
    with torch.enable_grad():
        whole = loss(*columns)
        # the term's own normalisation is applied by the engine to the surrogates, so the gradient is of the plain sum
        (term,) = whole.terms.values()
        grads = torch.autograd.grad(term.total, columns)
    start = 0
    after = torch.get_rng_state()
    for number, (piece, state) in enumerate(zip(pieces, states)):
        torch.set_rng_state(state)
        columns_here = embed(piece)
        size = len(columns_here[0])
        surrogate: Any = sum((c * g[start : start + size]).sum() for c, g in zip(columns_here, grads))
        start += size
        shown = term.total.detach() if number == 0 else torch.zeros(())
        name = next(iter(whole.terms))
        yield Loss().add(name, surrogate, per=term.per, weight=term.weight, count=term.count, report=shown)
    torch.set_rng_state(after)


def branches(model: Family, batch: Batch, names: tuple[str, ...], normalise: bool) -> list[Tensor]:
    """The embeddings of some branches, in their order."""
    found = []
    for name in names:
        if any(s.branch == name for s in batch.sequences) or name in batch.tensors:
            vectors = model.embed(batch, name).float()
            found.append(F.normalize(vectors, dim=-1) if normalise else vectors)
    if len(found) < 2:
        have = ", ".join(sorted(batch.rows[0])) if batch.rows else "no columns"
        raise DataError(f"Contrastive learning needs rows read as pairs, with the columns {names[0]} and {names[1]}; these have {have}. Leave out columns that make them rows of another kind, such as prompt and completion.")
    return found
