"""Losses as named sums with counts, so that any split into micro-batches or ranks gives the same gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Per = Literal["token", "row", "batch"]


@dataclass
class Term:
    """One named loss: the sum of its values and what the sum is divided by."""

    total: Tensor
    count: float | None
    """How many values the sum holds; None: the batch's own tokens or rows."""
    per: Per
    weight: float = 1.0
    report: Tensor | None = None
    size: float = 1.0
    """How many values were added; the denominator outside the engine."""


@dataclass
class Loss:
    """Named terms. The engine divides each by its count over the *whole* effective batch.

    `per` says what a term is a mean over: "token" (the batch's supervised tokens), "row" (its rows) or "batch" (a value that is
    already a mean over the micro-batch's rows). With `count` a term states its own denominator; a batch that is split then needs
    an objective that can tell the counts beforehand (`Objective.counts`)."""

    terms: dict[str, Term] = field(default_factory=dict)

    def add(
        self,
        name: str,
        values: Tensor,
        mask: Tensor | None = None,
        per: Per = "token",
        weight: float = 1.0,
        count: float | Tensor | None = None,
        report: Tensor | None = None,
    ) -> Loss:
        """Add the values where `mask` is true. An empty mask adds 0 to the sum and 0 to the count: nothing, never NaN."""
        size = float(values.numel() if mask is None else mask.bool().sum())
        if mask is not None:
            values = torch.where(mask.bool(), values, torch.zeros_like(values))
        if name in self.terms:
            raise ValueError(f"The loss already has a term '{name}'.")
        total = values.float().sum()
        self.terms[name] = Term(total, None if count is None else float(count), per, weight, report, size)
        return self

    def merge(self, other: Loss, weight: float = 1.0, prefix: str = "") -> Loss:
        """Take in another loss's terms, each times `weight`."""
        for name, term in other.terms.items():
            key = prefix + name
            while key in self.terms:
                key += "'"
            self.terms[key] = Term(term.total, term.count, term.per, term.weight * weight, term.report, term.size)
        return self

    def value(self, counts: Mapping[str, float]) -> Tensor:
        """The number to back-propagate. `counts` holds "token", "row" and the names of terms that count for themselves."""
        parts = []
        for name, term in self.terms.items():
            divisor = counts.get(name, counts.get(term.per, 1.0) if term.count is None else term.count)
            if divisor:
                parts.append(term.weight * term.total / divisor)
        if not parts:
            return torch.zeros((), requires_grad=True)
        return torch.stack([p.float() for p in parts]).sum()

    def mean(self) -> Tensor:
        """The loss of this batch alone, for use outside the engine: each term over its own count or number of values."""
        own = {k: t.size if t.count is None and t.per != "batch" else (t.count if t.count is not None else 1.0) for k, t in self.terms.items()}
        return self.value(own)


def of(value: Tensor | Loss, name: str = "loss") -> Loss:
    """A plain tensor is one term that is already the mean over the batch's rows."""
    if isinstance(value, Loss):
        return value
    return Loss().add(name, value.mean(), per="batch")
