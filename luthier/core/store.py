"""What a run remembers between steps and stages: a keyed store, feature queues and per-row tables. All of it checkpoints."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


class Queue:
    """The newest `size` features in FIFO order, with the ids of the rows they came from."""

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError("A queue needs room for at least one entry.")
        self.size = size
        self.fields: dict[str, Tensor] = {}
        self.ids = torch.zeros(0, dtype=torch.long)

    def __len__(self) -> int:
        return len(self.ids)

    def push(self, ids: Any, **fields: Tensor) -> None:
        """Append detached features (first dimension: entries); the oldest fall out."""
        ids = torch.as_tensor(np.array(ids), dtype=torch.long).flatten()
        for name, value in fields.items():
            value = value.detach()
            old = self.fields.get(name, value[:0])
            self.fields[name] = torch.cat([old.to(value), value])[-self.size :]
        self.ids = torch.cat([self.ids, ids])[-self.size :]

    def __getitem__(self, name: str) -> Tensor:
        return self.fields[name]

    def other_than(self, ids: Any) -> Tensor:
        """[len(ids), len(self)] bool: the entry does not come from that row."""
        return torch.as_tensor(ids, dtype=torch.long).flatten()[:, None] != self.ids[None]

    def state_dict(self) -> dict[str, Any]:
        return {"kind": "queue", "size": self.size, "ids": self.ids, "fields": dict(self.fields)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Queue:
        queue = cls(int(state["size"]))
        queue.ids, queue.fields = state["ids"], dict(state["fields"])
        return queue


class RowTable:
    """One tensor of `shape` a row id, with the step that wrote it."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = tuple(shape)
        self.values: dict[int, Tensor] = {}
        self.written: dict[int, int] = {}

    def write(self, ids: Any, values: Tensor, step: int) -> None:
        for i, value in zip(torch.as_tensor(ids).flatten().tolist(), values.detach().cpu()):
            self.values[i], self.written[i] = value.clone(), step

    def read(self, ids: Any) -> tuple[Tensor, Tensor]:
        """Values (zeros where a row was never written) and whether each row has one."""
        index = torch.as_tensor(ids).flatten().tolist()
        empty = torch.zeros(self.shape)
        found = torch.stack([self.values.get(i, empty) for i in index]) if index else torch.zeros(0, *self.shape)
        return found, torch.tensor([i in self.values for i in index])

    def state_dict(self) -> dict[str, Any]:
        ids = sorted(self.values)
        stacked = torch.stack([self.values[i] for i in ids]) if ids else torch.zeros(0, *self.shape)
        return {
            "kind": "table", "shape": list(self.shape), "ids": torch.tensor(ids, dtype=torch.long), "values": stacked,
            "written": torch.tensor([self.written[i] for i in ids], dtype=torch.long),
        }  # fmt: skip

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> RowTable:
        table = cls(tuple(state["shape"]))
        for i, value, step in zip(state["ids"].tolist(), state["values"], state["written"].tolist()):
            table.values[i], table.written[i] = value, step
        return table


class Store(dict[str, Any]):
    """A dict of plain values, arrays, tensors, queues and tables that goes through checkpoints."""

    def state_dict(self) -> dict[str, Any]:
        return {k: v.state_dict() if isinstance(v, (Queue, RowTable)) else v for k, v in self.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        kinds: dict[str, type[Queue] | type[RowTable]] = {"queue": Queue, "table": RowTable}
        self.clear()
        for key, value in state.items():
            kind = kinds.get(value.get("kind", "")) if isinstance(value, dict) else None
            self[key] = kind.from_state(value) if kind else value
