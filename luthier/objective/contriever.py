"""Unsupervised Dense Information Retrieval with Contrastive Learning (paper 154)."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.catalog import register
from luthier.core.batch import Batch, Sequence
from luthier.core.loss import Loss
from luthier.errors import RecipeError
from luthier.objective import Objective

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family
    from luthier.core.plugin import Step


def crop(ids: np.ndarray, rng: np.random.Generator, low: float = 0.05, high: float = 0.5, delete: float = 0.1) -> np.ndarray:
    """A contiguous span of floor(r * n) tokens, r ~ U(low, high), uniform start; then each token is deleted with probability `delete`.
    At least one token stays."""
    size = max(1, int(rng.uniform(low, high) * len(ids)))
    start = int(rng.integers(0, len(ids) - size + 1))
    span = ids[start : start + size]
    kept = span[rng.random(size) >= delete]
    return kept if len(kept) else span[:1]


def contriever(query: Tensor, key: Tensor, queue: Tensor | None = None, temperature: float = 0.05, label_smoothing: float = 0.0, exclude: Tensor | None = None) -> Tensor:
    """One value a query: cross-entropy of its own key against the queue, logits [q.k, q.queue] / temperature.

    Without a queue the other keys of the batch are the negatives. `exclude` [queries, queue] masks entries of the same passage."""
    query, key = query.float(), key.float()
    if queue is None:
        logits = query @ key.T / temperature
        return F.cross_entropy(logits, torch.arange(len(query), device=logits.device), reduction="none", label_smoothing=label_smoothing)
    own = (query * key).sum(-1, keepdim=True)
    others = query @ queue.float().T
    if exclude is not None:
        others = others.masked_fill(exclude, torch.finfo(others.dtype).min)
    logits = torch.cat([own, others], 1) / temperature
    target = torch.zeros(len(query), dtype=torch.long, device=logits.device)
    return F.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing)


@register("contriever", paper=154)
@dataclass
class Contriever(Objective):
    """Train a retriever without labels: two random crops of a passage are a pair, and a long queue of momentum-encoded crops gives the negatives.

    Each visit draws two independent views of a passage of at most `chunk` tokens (`crop`). MoCo: the key encoder follows,
    theta_k <- m theta_k + (1 - m) theta_q, before keys are encoded without gradient in eval mode; L = cross-entropy of q.k / t against the
    queue; then the keys are pushed. Mean pooling, dot product, no normalisation by default. `variant: in-batch` takes the other keys of
    the batch, both encoders with gradient. The paper's m 0.9995 and queue of 131,072 are for 500,000 steps: in a run of hundreds the keys would
    stay at the start, so `momentum: auto` is min(0.9995, 1 - 5 / steps) and the default queue is small (ours). Entries of the query's own passage
    are left out of its negatives (ours: small corpora meet a passage twice)."""

    variant: Literal["moco", "in-batch"] = "moco"
    """Where negatives come from: the queue, or the batch."""
    temperature: float = 0.05
    """Divides the similarities."""
    momentum: float | Literal["auto"] = "auto"
    """m of the key encoder."""
    queue: int = 4096
    """Entries of the queue."""
    queue_start: Literal["empty", "random"] = "empty"
    """`random` fills the queue with unit vectors, as the release does; `empty` begins with the batch's own keys as negatives."""
    normalise: bool = False
    """L2-normalise embeddings."""
    chunk: int = 256
    """Tokens of a passage; a longer one is read at a random offset."""
    low: float = 0.05
    """Shortest crop, as a share of the chunk."""
    high: float = 0.5
    """Longest crop."""
    delete: float = 0.1
    """Probability that a token of a crop is deleted."""
    label_smoothing: float = 0.0
    """Of the cross-entropy."""
    key_dropout: bool = False
    """Encode keys in train mode."""
    _keys: Any = field(default=None, init=False, repr=False)
    _waiting: Any = field(default=None, init=False, repr=False)

    columns = (frozenset({"text"}),)
    families = frozenset({"text-encoder", "causal-lm"})
    whole_batch = True
    parallel = frozenset({"single", "ddp"})

    def __post_init__(self) -> None:
        if self.temperature <= 0 or not 0 < self.low <= self.high <= 1 or not 0 <= self.delete < 1 or self.queue < 1:
            raise RecipeError(
                f"contriever needs temperature > 0, 0 < low <= high <= 1, 0 <= delete < 1 and queue >= 1; "
                f"got {self.temperature}, {self.low}, {self.high}, {self.delete} and {self.queue}."
            )
        if self.momentum != "auto" and not 0 <= float(self.momentum) <= 1:
            raise RecipeError(f"contriever.momentum is between 0 and 1 or 'auto', not {self.momentum}.")

    def collate(self, rows: SequenceOf[Mapping[str, Any]], ids: Any, ctx: Context) -> Batch:
        """Two fresh views of every passage."""
        model: Any = ctx.current
        rng, sequences = ctx.numpy("contriever"), []
        for i, row in enumerate(rows):
            tokens = np.asarray(model.processor(row["text"], add_special_tokens=False)["input_ids"], dtype=np.int64)
            if not len(tokens):
                tokens = np.asarray(model.processor(row["text"])["input_ids"], dtype=np.int64)
            at = int(rng.integers(0, max(1, len(tokens) - self.chunk + 1)))
            for branch in ("anchor", "positive"):
                view = framed(crop(tokens[at : at + self.chunk], rng, self.low, self.high, self.delete), model.processor)
                sequences.append(Sequence(view, np.zeros(len(view), bool), row=i, branch=branch))
        return Batch(list(rows), np.asarray(ids, np.int64), sequences, touched=True)

    def before_step(self, step: Step, ctx: Context) -> None:
        """The key encoder follows the query encoder, before this step's keys are encoded."""
        if self.variant == "moco":
            self._follow(step.model, self._momentum(ctx))

    def _momentum(self, ctx: Context | None) -> float:
        if self.momentum != "auto":
            return float(self.momentum)
        return 0.999 if ctx is None else max(0.0, min(0.9995, 1 - 5 / max(1, ctx.clock.steps)))

    def _follow(self, model: Family, m: float) -> None:
        if self._keys is None:
            self._keys = model.frozen_copy()
            if self._waiting is None:
                return
            self._keys.network.load_state_dict(self._waiting)
            self._waiting = None
        with torch.no_grad():
            for mine, theirs in zip(self._keys.network.parameters(), model.network.parameters()):
                mine.mul_(m).add_(theirs.detach(), alpha=1 - m)
            for mine, theirs in zip(self._keys.network.buffers(), model.network.buffers()):
                mine.copy_(theirs)

    def loss(self, model: Family, batch: Batch, ctx: Context | None = None) -> Loss:
        query = self._embed(model, batch, "anchor")
        if self.variant == "in-batch":
            values = contriever(query, self._embed(model, batch, "positive"), None, self.temperature, self.label_smoothing)
            return Loss().add("contriever", values * batch.row_weights.to(values), per="row")
        if self._keys is None:
            self._follow(model, 1.0)
        with torch.no_grad():
            self._keys.train(self.key_dropout)
            keys = self._embed(self._keys, batch, "positive")
        values = self._against_queue(query, keys, batch, ctx)
        return Loss().add("contriever", values * batch.row_weights.to(values), per="row")

    def _against_queue(self, query: Tensor, keys: Tensor, batch: Batch, ctx: Context | None) -> Tensor:
        memory = None if ctx is None else ctx.queue("contriever", self.queue)
        if memory is not None and not len(memory) and self.queue_start == "random":
            start = F.normalize(torch.randn(self.queue, keys.shape[1], generator=ctx.rng("contriever-queue")), dim=-1)  # type: ignore[union-attr]
            memory.push(torch.full((self.queue,), -1), keys=start)
        if memory is None or not len(memory):
            values = contriever(query, keys, None, self.temperature, self.label_smoothing)
        else:
            exclude = ~memory.other_than(batch.ids).to(query.device)
            values = contriever(query, keys, memory["keys"].to(query.device), self.temperature, self.label_smoothing, exclude)
        if memory is not None and torch.is_grad_enabled():
            memory.push(batch.ids, keys=keys.cpu())
        return values

    def _embed(self, model: Family, batch: Batch, branch: str) -> Tensor:
        vectors = model.embed(batch, branch).float()
        return F.normalize(vectors, dim=-1) if self.normalise else vectors

    def state_dict(self) -> dict[str, Any]:
        return {} if self._keys is None else {"keys": dict(self._keys.network.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._keys, self._waiting = None, state.get("keys")


def framed(ids: np.ndarray, tokenizer: Any) -> np.ndarray:
    """The ids between the tokenizer's own special tokens ([CLS] ... [SEP])."""
    before = [tokenizer.cls_token_id] if getattr(tokenizer, "cls_token_id", None) is not None else []
    after = [tokenizer.sep_token_id] if getattr(tokenizer, "sep_token_id", None) is not None else []
    return np.concatenate([np.asarray(before, np.int64), ids, np.asarray(after, np.int64)])
