"""Masks that are learned: gates between 0 and 1 on the entries of an update, trained through the model's weights, then rounded.

Two relaxations: `sigmoid_gate` starts from a given binary mask and may leave it, `concrete_gate` draws random gates that are nearly
binary. `learn` is the loop; what the weights are, given the gates, is the method's own affair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any

import torch
from torch import Tensor, nn

from luthier.core.at_weights import pull_back
from luthier.core.sparse import cut

SMALLEST_MEAN = 1e-6
"""A mask's mean is not taken to be below this when something is divided by it."""


def sigmoid_gate(scores: Tensor, start: Tensor, bias: float = 0.0) -> Tensor:
    """start (1 - s) + (1 - start) s with s = sigmoid(scores - bias): scores far below the bias give the binary mask `start`, far above its opposite."""
    s = torch.sigmoid(scores - bias)
    return torch.where(start, 1 - s, s)


def concrete_gate(logits: Tensor, uniform: Tensor, temperature: float = 0.5) -> Tensor:
    """A relaxed Bernoulli sample with these logits: sigmoid((logits + log u - log(1 - u)) / temperature), u uniform on (0, 1)."""
    return torch.sigmoid((logits + torch.logit(uniform)) / temperature)


def uniform_like(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Uniform on (0, 1), the ends excluded, drawn on the CPU so that every device draws the same."""
    tiny = torch.finfo(torch.float32).eps
    return torch.rand(logits.shape, generator=generator).clamp_(tiny, 1 - tiny).to(logits.device)


def rescaled(gate: Tensor) -> Tensor:
    """gate / mean(gate): keeps an update's size on average. An empty mask stays empty."""
    return gate / gate.mean().clamp(min=SMALLEST_MEAN)


def largest(scores: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    """Masks of exactly the k largest scores of all tensors together; equal ones by index."""
    chosen = cut(scores, k)
    return {name: chosen.mask(name, scores[name]) for name in scores}


def density(masks: Mapping[str, Tensor]) -> float:
    """The share of entries that are in."""
    size = sum(m.numel() for m in masks.values())
    return sum(int(m.sum()) for m in masks.values()) / max(1, size)


def learn(
    scores: Mapping[str, Tensor], weights: Callable[[], Mapping[str, Tensor]], network: nn.Module, steps: Iterable[SequenceOf[Callable[[], Tensor]]],
    optimizer: torch.optim.Optimizer, before: Callable[[int], Any] | None = None, after: Callable[[int], Any] | None = None,
) -> list[float]:  # fmt: skip
    """Descend on the scores: each step takes the mean of its losses, computed with the network at `weights()`. Returns every step's loss.

    `before(i)` runs when step i's gradient is there and the scores have not moved yet, `after(i)` when they have."""
    found = []
    for i, losses in enumerate(steps):
        optimizer.zero_grad(set_to_none=True)
        number = max(1, len(losses))
        found.append(pull_back(network, weights(), losses) / number)
        for score in scores.values():
            score.grad = torch.zeros_like(score) if score.grad is None else score.grad / number
        if before is not None:
            before(i)
        optimizer.step()
        if after is not None:
            after(i)
    return found
