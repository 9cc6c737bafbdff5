"""What every task returns, and the rule that keeps its splits apart."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from luthier.errors import DataError, nearest

SIDES = ("train",) * 3 + ("test", "ood")


@dataclass(frozen=True)
class Verdict:
    """The score of one answer in [0, 1], what was read from it, and why it is not 1."""

    score: float
    parsed: Any = None
    reason: str = ""


@dataclass
class Splits:
    """The rows of one task. `verify(row, answer)` is an exact program, never a model."""

    train: list[dict]
    test: list[dict]
    ood: list[dict] = field(default_factory=list)
    general: list[dict] = field(default_factory=list)
    unlabelled: list[dict] = field(default_factory=list)
    name: str = ""
    knobs: dict[str, Any] = field(default_factory=dict)
    verify: Callable[[dict, str], Verdict] | None = None

    def __post_init__(self) -> None:
        for row in (*self.train, *self.test, *self.ood):  # so that a row's own program is found wherever it travels
            if self.name and "meta" in row:
                row["meta"]["task"] = self.name
        assert_disjoint(self.train, self.test, self.ood)


def assert_disjoint(*parts: list[dict]) -> None:
    """No two parts share a prompt string or a source id."""
    for read in (_prompt, lambda row: row["meta"].get("source")):
        seen: dict[str, int] = {}
        for i, part in enumerate(parts):
            for key in {read(row) for row in part} - {None}:
                if seen.setdefault(key, i) != i:
                    raise AssertionError(f"two splits share '{key}'")


def _prompt(row: dict) -> str | None:
    if "image" in row:
        return None
    for key in ("prompt", "anchor", "text"):
        if row.get(key):
            return str(row[key])
    return str(row["messages"][:-1]) if "messages" in row else None


def side(source: str, seed: int) -> str:
    """The split a source belongs to: 60 % train, 20 % test, 20 % ood, by hash, so that no bookkeeping is needed."""
    return SIDES[zlib.crc32(f"{seed}|{source}".encode()) % 5]


def generator(seed: int, purpose: str) -> np.random.Generator:
    """One generator a purpose, so that a knob which draws more numbers never moves the others."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode())])


def pick(rng: np.random.Generator, items: Any) -> Any:
    return items[int(rng.integers(len(items)))]


def chosen(rng: np.random.Generator, n: int, share: float) -> list[int]:
    """`round(share n)` distinct places of n rows; none at share 0."""
    return sorted(int(i) for i in rng.permutation(n)[: round(share * n)])


def as_list(value: Any) -> list[str]:
    """A knob that holds one name, 'a,b', or a list of names."""
    return [str(v) for v in value] if isinstance(value, (list, tuple)) else [v for v in str(value).split(",") if v]


def one_of(task: str, knob: str, value: Any, known: Iterable[Any]) -> Any:
    known = list(known)
    if value not in known:
        raise DataError(
            f"lab:{task}: {knob}={value!r} is not one of {', '.join(map(str, known))}.{nearest(str(value), map(str, known))}"
        )
    return value


def share(task: str, **knobs: float) -> None:
    for knob, value in knobs.items():
        if not 0 <= float(value) <= 1:
            raise DataError(f"lab:{task}: {knob}={value!r} must lie between 0 and 1.")
