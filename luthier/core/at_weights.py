"""A model at weights that were computed from something else (a mask, coefficients, a sum of updates), with gradients to that.

The network's own parameters hold the computed values during a pass, so every verb works there as it always does, chunks that are
recomputed in the backward pass included. Afterwards the network is as it was, bit for bit; dropout is off and statistics stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from luthier.errors import ModelError

if TYPE_CHECKING:
    from luthier.core.batch import Batch
    from luthier.core.families import Family


@contextmanager
def at_weights(network: nn.Module, tensors: Mapping[str, Tensor], statistics: bool = False) -> Iterator[dict[str, nn.Parameter]]:
    """Other values in the parameters that `tensors` names (a tied one under any of its names); yields these parameters by those names.

    Old values are neither copied nor written to, and come back when it ends; it may be nested. `statistics`: the tensors are of the network's
    own state, so its buffers are replaced as well, and a name that it has not is refused; else such names are passed over."""
    params, seen = {}, set()
    for name, param in network.named_parameters(remove_duplicate=False):
        if name in tensors and id(param) not in seen:
            seen.add(id(param))
            params[name] = param
    buffers = _named_buffers(network, tensors) if statistics else {}
    flags = [(p, p.requires_grad) for p in network.parameters()]
    kept = [(place, place.data) for place, _ in flags] + [(place, place.data) for place in buffers.values()]
    try:
        for name, place in {**params, **buffers}.items():
            value = tensors[name].detach()
            if value.shape != place.shape:
                raise ModelError(f"'{name}' is {list(place.shape)} in the network and {list(value.shape)} in the weights it should run at.")
            place.data = value.to(place.device, place.dtype)
        yield params
    finally:
        for place, data in kept:
            place.data = data
        for param, wanted in flags:
            param.requires_grad_(wanted)


def _named_buffers(network: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The buffers among these names, all of which must be the network's."""
    own = network.state_dict(keep_vars=True)
    strange = next((name for name in tensors if name not in own), None)
    if strange is not None:
        raise ModelError(f"The network has no tensor '{strange}', so it cannot be run at these weights; merge its adapter first.")
    return {name: own[name] for name in tensors if not isinstance(own[name], nn.Parameter)}


def pull_back(network: nn.Module, tensors: Mapping[str, Tensor], losses: Iterable[Callable[[], Tensor]]) -> float:
    """The sum of the losses at computed weights. Their gradient goes on into whatever the weights were computed from, never into the network.

    Each loss is differentiated by the weights before the next is computed; all their gradients pass the computation of the weights once."""
    total = 0.0
    grads: dict[str, Tensor] = {}
    with at_weights(network, tensors) as params:
        wanted = {name: p for name, p in params.items() if tensors[name].requires_grad}
        network.requires_grad_(False)
        for param in wanted.values():
            param.requires_grad_(True)
        for loss in losses:
            with torch.enable_grad():
                value = loss()
            total += float(value.detach())
            if not value.requires_grad:
                continue  # nothing was supervised
            for name, grad in zip(wanted, torch.autograd.grad(value, list(wanted.values()), allow_unused=True)):
                if grad is not None:
                    grads[name] = grads[name] + grad if name in grads else grad
    if grads:
        torch.autograd.backward([tensors[n] for n in grads], [g.to(tensors[n]) for n, g in grads.items()])  # type: ignore[call-overload]
    return total


def log_likelihoods(family: Family, batch: Batch) -> Tensor:
    """log p of every supervised token, or of every row's label."""
    if "score" in family.verbs:
        return family.score(batch).logp
    logits = family.classify(batch).float()
    return logits.log_softmax(-1).gather(-1, batch.tensors["labels"].to(logits.device)[:, None])[:, 0]


def merit(family: Family, batches: Iterable[Batch]) -> float:
    """How good the answers to these rows are: accuracy of a classifier, mean log p a token of a language model. Higher is better."""
    total = number = 0.0
    with family.evaluating():
        for batch in batches:
            if "score" in family.verbs:
                values = family.score(batch).logp
            else:
                values = (family.classify(batch).argmax(-1).cpu() == batch.tensors["labels"].cpu()).float()
            total, number = total + float(values.sum()), number + len(values)
    return total / max(1.0, number)


def covers(network: nn.Module, names: Iterable[str], method: str) -> None:
    """Refuse checkpoints that a network cannot run at, because they lack some of its parameters."""
    have = set(names)
    known = {id(p) for n, p in network.named_parameters(remove_duplicate=False) if n in have}
    lacking = [n for n, p in network.named_parameters() if id(p) not in known]
    if lacking:
        raise ModelError(f"{method} runs the current model at other weights, but {len(lacking)} of its tensors are not in the checkpoints (first '{lacking[0]}'); merge its adapter first.")


def batches_of(family: Family, rows: Any, order: Iterable[int], size: int, train_on: str = "completion") -> list[Batch]:
    """The rows in this order, in batches."""
    listed = list(order)
    return [family.collate([rows[i] for i in listed[at : at + size]], train_on=train_on) for at in range(0, len(listed), size)]
