"""For those who write methods: the conformance battery, tiny models and rows, skeletons, and the table of pairs.

    from luthier.testing import check_method
    check_method(MyLoss)
"""

from __future__ import annotations

from typing import Any


def check_method(method: Any, skip: tuple[str, ...] = (), **options: Any) -> list[str]:
    """Run the battery of the method's axis. Returns what was checked; raises `NotConforming` with one sentence at the first failure.

    `method` is a class, "axis/name", or a file such as "./mine.py:MyLoss"; `options` are fields to try it with;
    `skip` names checks to leave out."""
    from luthier.testing.battery import check_method as run

    return run(method, skip, **options)


def new(axis: str, name: str, directory: str | None = None) -> list[Any]:
    """Write a skeleton method file and its test."""
    from luthier.testing.skeleton import new as run

    return run(axis, name, directory)


def matrix(axes: tuple[str, ...] = (), tell: Any = None, cores: int = 1) -> list[dict[str, Any]]:
    """Run every pair of methods on two axes at toy size; one entry a pair: runs, or refused and why."""
    from luthier.testing.matrix import matrix as run

    return run(axes, tell, cores)
