"""`Rows`: a data set in memory, its rows as dicts with stable ids; and what makes two rows equal."""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np

from luthier.core.columns import kind_of
from luthier.errors import DataError

MEDIA = ("image", "images", "audio")
BESIDE = frozenset({"id", "meta", "weight"})
"""Columns that are about a row and not part of what is learned from it."""


@dataclass(frozen=True)
class Aside:
    """A row that was set aside: where it stands and what is wrong with it."""

    where: str
    reason: str


class Rows(Sequence[dict[str, Any]]):
    """Rows in a fixed order. `ids` are their positions in the source and stay with them through `take`.

    Nothing here changes a row, and nobody else should: a method that wants other rows makes new dicts and a new `Rows`."""

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        ids: Any = None,
        name: str = "rows",
        source: str = "memory",
        kind: str | None = None,
        aside: Iterable[Aside] = (),
        notices: Iterable[str] = (),
    ) -> None:
        self._rows: list[dict[str, Any]] = [dict(r) for r in rows]
        self.ids = np.arange(len(self._rows)) if ids is None else np.array(ids, dtype=np.int64)
        if self.ids.shape != (len(self._rows),):
            raise ValueError(f"{len(self._rows)} rows were given {len(self.ids)} ids.")
        self.ids.setflags(write=False)
        self.name, self.source = name, source
        self.aside: list[Aside] = list(aside)
        self.notices: list[str] = list(notices)
        """What a user should know about how the source was read."""
        self._kind = kind

    @classmethod
    def of(cls, x: Any, name: str = "rows") -> Rows:
        """Rows from Rows, a list of dicts, a dict of columns, a datasets.Dataset or a pandas frame."""
        if isinstance(x, Rows):
            return x if name in ("rows", x.name) else x._like(x._rows, x.ids, name)
        if isinstance(x, Mapping):
            return cls(_from_columns(x), name=name)
        if hasattr(x, "to_dict") and hasattr(x, "columns"):
            return cls(x.to_dict("records"), name=name)
        if hasattr(x, "column_names") and not isinstance(x.column_names, Mapping):
            return cls((x[i] for i in range(len(x))), name=name, source=str(getattr(getattr(x, "info", None), "dataset_name", None) or "datasets"))
        if isinstance(x, str) or not isinstance(x, Iterable):
            raise DataError(f"Rows are a list of dicts, a dict of columns or a datasets.Dataset, not {type(x).__name__}.")
        rows = list(x)
        for i, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise DataError(f"{name}, row {i + 1}: a row is an object with named columns, not {type(row).__name__}.")
        return cls(rows, name=name)

    # reading ------------------------------------------------------------------------------------------------------------
    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.take(range(*index.indices(len(self))))
        return self._rows[operator.index(index)]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._rows)

    def __repr__(self) -> str:
        return f"Rows({self.name!r}, {len(self)} x {self.kind}, from {self.source})"

    def take(self, indices: Iterable[int]) -> Rows:
        """Some of the rows, in the given order, with their ids."""
        index = [int(i) for i in indices]
        return self._like([self._rows[i] for i in index], self.ids[index] if index else [], self.name)

    def _like(self, rows: list[dict[str, Any]], ids: Any, name: str) -> Rows:
        made = Rows((), name=name, source=self.source, kind=self._kind, aside=self.aside, notices=self.notices)
        made._rows, made.ids = rows, np.array(ids, dtype=np.int64)
        made.ids.setflags(write=False)
        return made

    def column(self, name: str, default: Any = None) -> list[Any]:
        """One value a row."""
        return [row.get(name, default) for row in self._rows]

    def where(self, index: int) -> str:
        """A row's place, for messages."""
        return f"{self.source if self.source != 'memory' else self.name}, row {int(self.ids[index]) + 1}"

    # facts --------------------------------------------------------------------------------------------------------------
    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The columns that every row has, in the first row's order."""
        if not self._rows:
            return ()
        shared = set(self._rows[0]).intersection(*map(set, self._rows[1:]))
        return tuple(c for c in self._rows[0] if c in shared)

    @cached_property
    def kind(self) -> str:
        """What sort of rows these are, by their columns (`luthier.core.columns.KINDS`); "other" if none fits."""
        return self._kind or kind_of(self.columns)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the content of all rows in order: the same rows, the same fingerprint, on every machine."""
        total = hashlib.sha256(str(len(self)).encode())
        for row in self._rows:
            total.update(row_digest(row))
        return total.hexdigest()

    def contents(self) -> list[bytes]:
        """One digest a row over what is learned from it: rows with equal digests are duplicates, whatever their id or weight."""
        return [row_digest({k: v for k, v in row.items() if k not in BESIDE}) for row in self._rows]


def _from_columns(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    sizes = {k: len(v) for k, v in columns.items()}
    if len(set(sizes.values())) > 1:
        raise DataError(f"The columns differ in length: {', '.join(f'{k} has {n}' for k, n in sizes.items())}.")
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def row_digest(row: Mapping[str, Any]) -> bytes:
    """sha256 of a row in canonical form: keys sorted, lists and tuples alike, arrays, images and media files by their bytes."""
    if any(isinstance(row.get(c), str) for c in MEDIA):
        row = {k: _file_digest(v) if k in MEDIA and isinstance(v, str) else v for k, v in row.items()}
    try:
        text = json.dumps(row, sort_keys=True, default=_stand_in)
    except TypeError:  # keys of several types cannot be sorted
        text = json.dumps(_string_keys(row), sort_keys=True, default=_stand_in)
    return hashlib.sha256(text.encode()).digest()


def _string_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {f"{type(k).__name__} {k}": _string_keys(v) for k, v in value.items()}
    return [_string_keys(v) for v in value] if isinstance(value, (list, tuple)) else value


def _file_digest(path: str) -> Any:
    try:
        with open(path, "rb") as file:
            return {"@file": hashlib.file_digest(file, "sha256").hexdigest()}
    except (OSError, ValueError):
        return path


def _stand_in(value: Any) -> Any:
    """What json writes for a value it does not know."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype != object:
        return {"@array": [value.dtype.str, list(value.shape), hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()]}
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {"@bytes": hashlib.sha256(value).hexdigest()}
    if hasattr(value, "detach") and hasattr(value, "element_size"):
        import torch

        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return {"@tensor": [str(value.dtype), list(value.shape), hashlib.sha256(raw).hexdigest()]}
    if hasattr(value, "tobytes") and hasattr(value, "mode") and hasattr(value, "size"):
        return {"@image": [value.mode, list(value.size), hashlib.sha256(value.tobytes()).hexdigest()]}
    if isinstance(value, (set, frozenset)):
        return {"@set": sorted(map(str, value))}
    if isinstance(value, (Mapping, np.ndarray, Iterable)):
        return dict(value) if isinstance(value, Mapping) else list(value)
    if hasattr(value, "__dict__") and not isinstance(value, (type, Path)):
        return {"@object": [type(value).__name__, vars(value)]}
    return {"@text": [type(value).__name__, str(value)]}
