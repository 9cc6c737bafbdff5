"""TokenScores: what a language model says about the supervised tokens, without ever holding [tokens x vocabulary] logits.

The body of the network runs once; logits exist only at positions whose next token is supervised, in chunks, in fp32. With
gradients a chunk is recomputed in the backward pass. Plain log-probabilities under a linear head need no rows of logits at all (`head_logp`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from luthier.core.head_logp import head_logp
from luthier.core.lean import plain_linear, watched

CHUNK = 1024


@dataclass
class Head:
    """Hidden states to logits, with what some architectures do after the projection."""

    projection: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.projection(hidden).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    @property
    def linear(self) -> bool:
        """A plain linear projection in which nobody is interested."""
        return self.softcap is None and plain_linear(self.projection) and not watched()


class TokenScores:
    """Scores of the supervised tokens of some sequences, in their order. Everything is computed on demand.

    `target` and `sequence` say which token of which sequence each entry is; `sequences` how many sequences there are."""

    def __init__(self, hidden: Tensor, head: Head, target: Tensor, sequence: Tensor, sequences: int, chunk: int = CHUNK) -> None:
        self.hidden, self.head, self.chunk = hidden, head, chunk
        self.target, self.sequence, self.sequences = target, sequence, sequences
        self._logp: Tensor | None = None

    def __len__(self) -> int:
        return len(self.target)

    def detach(self) -> TokenScores:
        """The same scores without their graph."""
        return TokenScores(self.hidden.detach(), self.head, self.target, self.sequence, self.sequences, self.chunk)

    def slices(self) -> Iterator[slice]:
        """Chunks of the supervised tokens; where there are none, one empty chunk, so that results keep their shape and graph."""
        for start in range(0, max(1, len(self)), self.chunk):
            yield slice(start, min(start + self.chunk, len(self)))

    def map(self, function: Callable[..., Any], *others: TokenScores) -> Any:
        """`function(logits, at, *other_logits)` over chunks, the results joined.

        `at` is the chunk's slice; the function returns one tensor or a tuple of tensors whose first dimension runs over tokens.
        Draw random numbers before, not inside: a chunk may run twice."""
        grad = torch.is_grad_enabled() and (
            self.hidden.requires_grad or any(w.requires_grad for w in self.head.projection.parameters())
        )
        pieces = []
        for at in self.slices():

            def run(hidden: Tensor, at: slice = at) -> Any:
                with torch.no_grad():
                    rest = [other.head(other.hidden[at]) for other in others]
                return function(self.head(hidden), at, *rest)

            h = self.hidden[at]
            pieces.append(checkpoint(run, h, use_reentrant=False, preserve_rng_state=False) if grad else run(h))
        if isinstance(pieces[0], tuple):
            return tuple(torch.cat(column) for column in zip(*pieces))
        return torch.cat(pieces)

    @property
    def logp(self) -> Tensor:
        """log p of each supervised token."""
        if self._logp is None:
            if self.head.linear:
                linear: Any = self.head.projection
                self._logp = torch.cat([head_logp(self.hidden[at], linear.weight, linear.bias, self.target[at], self.head.scale) for at in self.slices()])
            else:
                self._logp = self.map(lambda logits, at: log_prob(logits, self.target[at]))
        return self._logp

    @property
    def entropy(self) -> Tensor:
        """Entropy of the distribution at each supervised position, in nats."""
        return self.map(lambda logits, at: entropy(logits))

    @property
    def hit(self) -> Tensor:
        """Whether the most likely token is the target."""
        with torch.no_grad():
            return self.map(lambda logits, at: logits.argmax(-1) == self.target[at])

    def kl(self, reference: TokenScores, direction: Literal["forward", "reverse"] = "forward") -> Tensor:
        """forward: KL(reference || this); reverse: KL(this || reference). Per token; no gradient into the reference."""
        return self.map(lambda logits, at, ref: kl(ref, logits) if direction == "forward" else kl(logits, ref), reference)

    def rows(self, how: Literal["sum", "mean"], values: Tensor | None = None) -> Tensor:
        """One value a sequence: the sum or mean of `values` (default: log p) over its supervised tokens. Papers differ: say which."""
        values = self.logp if values is None else values
        total = torch.zeros(self.sequences, dtype=values.dtype, device=values.device).index_add(0, self.sequence, values)
        if how == "sum":
            return total
        number = torch.bincount(self.sequence, minlength=self.sequences).clamp(min=1)
        return total / number


def log_prob(logits: Tensor, target: Tensor) -> Tensor:
    """log softmax(logits)[target], in fp32."""
    logits = logits.float()
    return logits.gather(-1, target[..., None])[..., 0] - logits.logsumexp(-1)


def entropy(logits: Tensor) -> Tensor:
    """-sum p log p, in nats; entries of -inf count 0."""
    logp = torch.log_softmax(logits.float(), -1)
    return -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0)).sum(-1)


def kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) over the last dimension; 0 log 0 = 0.

    Where one model has more tokens: those that only q has are impossible for p, those that only p has are left out."""
    shared = min(p_logits.shape[-1], q_logits.shape[-1])
    logp, logq = torch.log_softmax(p_logits[..., :shared].float(), -1), torch.log_softmax(q_logits.float(), -1)[..., :shared]
    p = logp.exp()
    # masked before the product, else an impossible token (-inf in both) would make the gradient NaN
    return (p * (logp - logq).masked_fill(p == 0, 0)).sum(-1)
