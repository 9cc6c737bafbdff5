"""A closure as the engine hands it to two-pass optimizers, around any loss of a small module."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import torch


class FakeClosure:
    """`loss(network)` returns the loss and the class logits; dropout is replayed for rng="same"."""

    def __init__(self, network, optimizer, loss, family=None):
        self.network, self.optimizer, self.loss = network, optimizer, loss
        self.model = family or SimpleNamespace(base_network=network)
        self.calls, self.finished, self.go = [], 0, None
        self.start = torch.get_rng_state()

    def __call__(self, rng="same", edit=None, grad=True):
        if rng == "same":
            torch.set_rng_state(self.start)
        self.calls.append({"grad": grad, "edited": edit is not None, "weights": [p.detach().clone() for p in self.network.parameters()]})
        if grad:
            self.optimizer.zero_grad(set_to_none=True)
        with edit() if edit else nullcontext(), torch.set_grad_enabled(grad):
            value, logits = self.loss(self.network)
            if grad:
                value.backward()
        scores = [] if logits is None else [x.detach() for x in (logits if isinstance(logits, list) else [logits])]
        return SimpleNamespace(loss=float(value.detach()), losses={"loss": float(value.detach())}, scores=scores)

    def finish(self):
        self.finished += 1
        return self.go
