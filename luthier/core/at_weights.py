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
def at_weights(network: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[dict[str, nn.Parameter]]:
    """Other values in the parameters that `tensors` names (a tied one under any of its names); yields these parameters by those names."""
    params, seen = {}, set()
    for name, param in network.named_parameters(remove_duplicate=False):
        if name in tensors and id(param) not in seen:
            seen.add(id(param))
            params[name] = param
    kept = [(p, p.data, p.requires_grad) for p in network.parameters()]
    try:
        for name, param in params.items():
            value = tensors[name].detach()
            if value.shape != param.shape:
                raise ModelError(f"'{name}' is {list(param.shape)} in the network and {list(value.shape)} in the weights it should run at.")
            param.data = value.to(param.device, param.dtype)
        yield params
    finally:
        for param, data, wanted in kept:
            param.data = data
            param.requires_grad_(wanted)


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
