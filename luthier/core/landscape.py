"""The loss of a model at other weights: along a path between checkpoints, with some layers replaced, and in a small ball around a point."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.core.at_weights import at_weights
from luthier.core.context import seed_of
from luthier.core.modelmap import block_index
from luthier.core.source import TensorSource, working
from luthier.errors import ModelError

if TYPE_CHECKING:
    from luthier.core.batch import Batch
    from luthier.core.families import Family

By = Literal["block", "module"]


class Value(NamedTuple):
    """A mean loss and the share of predictions that are right."""

    loss: float
    accuracy: float


class Landscape:
    """A family's loss on fixed batches as a function of its weights, in eval mode.

    Classes: cross-entropy of the labels. Language models: of the supervised tokens. Pairs of texts, or of text and image: the
    symmetric contrastive loss within each batch. `unit_logits` scales every row of logits to length 1, so that the loss does not
    depend on how sure the model is (for language models and classes; of a dual encoder it takes the cosines themselves)."""

    def __init__(self, family: Family, batches: SequenceOf[Batch], unit_logits: bool = False) -> None:
        self.family, self.batches, self.unit_logits = family, list(batches), unit_logits
        if not self.batches:
            raise ModelError("There are no rows to take a loss on.")

    def value(self, tensors: Mapping[str, Tensor] | None = None) -> Value:
        """Loss and accuracy with these tensors in place (and all others as they are)."""
        total = hits = number = 0.0
        with at_weights(self.family.network, tensors or {}, statistics=True), self.family.evaluating():
            for batch in self.batches:
                losses, right = self._items(batch)
                total, hits, number = total + float(losses.double().sum()), hits + float(right.sum()), number + len(losses)
        return Value(total / max(1.0, number), hits / max(1.0, number))

    def loss(self, tensors: Mapping[str, Tensor] | None = None) -> float:
        return self.value(tensors).loss

    def gradient(self, tensors: Mapping[str, Tensor], around: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The gradient of the mean loss with respect to these tensors, at them, with those of `around` in place as well."""
        own = self.family.network.state_dict(keep_vars=True)
        places = [own[name] for name in tensors]
        asked = [p.requires_grad for p in places]
        sums = {name: torch.zeros_like(t) for name, t in tensors.items()}
        number = 0
        try:
            for place in places:
                place.requires_grad_(True)
            net = self.family.network
            with at_weights(net, around or {}, statistics=True), at_weights(net, tensors, statistics=True), self.family.evaluating(grad=True):
                for batch in self.batches:
                    losses, _ = self._items(batch)
                    found = torch.autograd.grad(losses.sum(), places, allow_unused=True)
                    for name, grad in zip(sums, found):
                        sums[name] += 0 if grad is None else grad.to(sums[name])
                    number += len(losses)
        finally:
            for place, before in zip(places, asked):
                place.requires_grad_(before)
        return {name: s / max(1, number) for name, s in sums.items()}

    def _items(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """One loss and one right-or-wrong an item of a batch."""
        family = self.family
        if "labels" in batch.tensors and "classify" in family.verbs:
            return self._classes(family.classify(batch), batch.tensors["labels"])
        if "score" in family.verbs:
            scores = family.score(batch)
            return self._classes(scores.head(scores.hidden), scores.target) if self.unit_logits else (-scores.logp, scores.hit)
        logits = self._pairs(batch)
        losses = (_cross_entropy(logits) + _cross_entropy(logits.T)) / 2
        return losses, logits.argmax(-1) == torch.arange(len(logits), device=logits.device)

    def _classes(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits, labels = logits.float(), labels.to(logits.device)
        logits = F.normalize(logits, dim=-1) if self.unit_logits else logits
        return F.cross_entropy(logits, labels, reduction="none"), logits.argmax(-1) == labels

    def _pairs(self, batch: Batch) -> Tensor:
        branches = {s.branch for s in batch.sequences}
        if "image" in batch.tensors and branches:
            logits = self.family.score_pairs(batch).float()  # type: ignore[attr-defined]
            return logits / self.family.scale.detach() if self.unit_logits else logits  # type: ignore[attr-defined]
        if {"anchor", "positive"} <= branches:
            a, b = (F.normalize(self.family.embed(batch, branch).float(), dim=-1) for branch in ("anchor", "positive"))
            return a @ b.T / (1.0 if self.unit_logits else 0.05)
        raise ModelError("These rows have neither labels nor answers nor pairs, so the model has no loss on them.")


def _cross_entropy(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device), reduction="none")


# paths --------------------------------------------------------------------------------------------------------------------
def between(base: TensorSource, tuned: TensorSource, alpha: float, names: Iterable[str] | None = None) -> TensorSource:
    """(1 - alpha) base + alpha tuned of some tensors (default: all), lazily; exactly the one or the other at 0 and 1. Integer tensors are the base's."""

    def read(name: str) -> Tensor:
        a = base[name]
        if alpha == 0 or not a.is_floating_point():
            return a
        b = tuned[name].to(a.device)
        return b.to(a.dtype) if alpha == 1 else torch.lerp(a.to(working(a.dtype)), b.to(working(a.dtype)), alpha).to(a.dtype)

    return TensorSource(base.distinct if names is None else names, read, base.meta)


def layers(names: Iterable[str], by: By = "block") -> dict[str, list[str]]:
    """Tensors by layer: a block of the network, or a module (its weight and bias); outside the blocks always a module."""
    found: dict[str, list[str]] = {}
    for name in names:
        index = block_index(name)[0] if by == "block" else None
        stack = name.split(f".{index}.", 1)[0] if index is not None else ""
        key = name.rpartition(".")[0] or name if index is None else f"{stack}.{index}"
        found.setdefault(key, []).append(name)
    return found


def barrier(alphas: SequenceOf[float], losses: SequenceOf[float]) -> float:
    """How far a path's loss rises above the straight line between its ends: max_a [L(a) - ((1 - a) L(0) + a L(1))], 0 at least."""
    first, last = losses[0], losses[-1]
    return max(loss - ((1 - a) * first + a * last) for a, loss in zip(alphas, losses))


def grid(points: int) -> list[float]:
    """Evenly spaced places on a path, from 0 to 1."""
    return [i / (points - 1) for i in range(points)]


def layer_barriers(
    base: Any, tuned: Any, loss: Callable[[Mapping[str, Tensor]], float], points: int = 5, by: By = "block"
) -> dict[str, float]:  # fmt: skip
    """g_l = max_a [L(theta^l(a)) - ((1-a) L(theta^l(0)) + a L(theta^l(1)))], theta^l(a) the tuned model with layer l alone at a.

    `loss` runs the tuned model with the given tensors in place. All layers share the end theta^l(1), the tuned model. Layers that
    tuning left as they were have no path and are left out."""
    base, tuned = TensorSource.of(base), TensorSource.of(tuned)
    path, end = grid(points), loss({})
    found: dict[str, float] = {}
    for layer, names in layers(base.distinct, by).items():
        moved = [n for n in names if base[n].is_floating_point() and not torch.equal(base[n], tuned[n].to(base[n]))]
        if moved:
            found[layer] = barrier(path, [*(loss(between(base, tuned, a, moved)) for a in path[:-1]), end])
    return found


def stragglers(barriers: Mapping[str, float], share: float = 0.2) -> list[str]:
    """The `share` of layers (rounded, one at least) with the highest barriers."""
    count = max(1, round(share * len(barriers))) if barriers and share > 0 else 0
    return sorted(barriers, key=lambda layer: -barriers[layer])[:count]


# sharpness ----------------------------------------------------------------------------------------------------------------
def noise(tensors: Mapping[str, Tensor], radius: float, seed: int) -> dict[str, Tensor]:
    """N(0, radius^2 theta^2) for every entry; each tensor's draw depends on its name and the seed alone, whatever else is drawn."""
    made = {}
    for name, tensor in tensors.items():
        g = torch.Generator().manual_seed(seed_of("landscape", seed, name))
        made[name] = radius * tensor.abs() * torch.randn(tensor.shape, generator=g).to(tensor)
    return made


def average_sharpness(loss: Callable[[Mapping[str, Tensor]], float], tensors: Mapping[str, Tensor], radius: float, draws: int = 10, seed: int = 0) -> float:
    """E L(theta + d) - L(theta), d ~ N(0, radius^2 diag(theta^2)) on the given tensors, over `draws` draws that every model shares."""
    if radius == 0 or not tensors:
        return 0.0
    here, total = loss(tensors), 0.0
    for draw in range(draws):
        change = noise(tensors, radius, seed_of(seed, draw))
        total += loss({name: t + change[name] for name, t in tensors.items()}) - here
    return total / draws


def worst_sharpness(
    loss: Callable[[Mapping[str, Tensor]], float], gradient: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]], tensors: Mapping[str, Tensor],
    radius: float, steps: int = 10,
) -> float:  # fmt: skip
    """max L(theta + d) - L(theta) over |d| <= radius |theta| entry by entry, by `steps` steps of radius / 4 along the gradient's sign.

    From d = 0; the best point on the way counts, so it is never negative."""
    if radius == 0 or not tensors:
        return 0.0
    here = best = loss(tensors)
    point = dict(tensors)
    for _ in range(steps):
        grads = gradient(point)
        for name, t in tensors.items():
            bound = radius * t.abs()
            point[name] = (point[name] + bound / 4 * grads[name].sign()).clamp(t - bound, t + bound)
        best = max(best, loss(point))
    return best - here


def collated(family: Family, rows: Any, train_on: str = "completion", limit: int = 256, size: int = 64) -> list[Any]:
    """At most `limit` rows as fixed batches."""
    count = min(limit, len(rows))
    return [family.collate([rows[i] for i in range(at, min(at + size, count))], train_on=train_on) for at in range(0, count, size)]
