"""Three puzzles of the trace language with a solver and a verifier that accepts every valid solution."""

from __future__ import annotations

import itertools
from collections import deque

import numpy as np

MOVES = {"u": (-1, 0), "d": (1, 0), "l": (0, -1), "r": (0, 1)}
Grid = list[list[str]]


def _grid(body: str) -> Grid:
    return [row.split() for row in body.split(" / ")]


def _text(grid: Grid) -> str:
    return " / ".join(" ".join(row) for row in grid)


def draw_latin(rng: np.random.Generator, holes: int) -> str:
    """A 4x4 Latin square with `holes` cells hidden as `_`."""
    rows, columns, names = rng.permutation(4), rng.permutation(4), rng.permutation(4) + 1
    grid = [[str(names[(r + c) % 4]) for c in columns] for r in rows]
    for cell in rng.permutation(16)[:holes]:
        grid[cell // 4][cell % 4] = "_"
    return _text(grid)


def _latin_fits(grid: Grid, r: int, c: int, value: str) -> bool:
    return value not in grid[r] and all(row[c] != value for row in grid)


def solve_latin(body: str) -> tuple[list[str], str]:
    grid = _grid(body)
    holes = [(r, c) for r in range(4) for c in range(4) if grid[r][c] == "_"]

    def fill(i: int) -> bool:
        if i == len(holes):
            return True
        r, c = holes[i]
        for value in "1234":
            if _latin_fits(grid, r, c, value):
                grid[r][c] = value
                if fill(i + 1):
                    return True
                grid[r][c] = "_"
        return False

    fill(0)
    return [], " ".join(grid[r][c] for r, c in holes)


def valid_latin(body: str, answer: str) -> bool:
    grid, values = _grid(body), answer.split()
    holes = [(r, c) for r in range(4) for c in range(4) if grid[r][c] == "_"]
    if len(values) != len(holes):
        return False
    for (r, c), value in zip(holes, values):
        if value not in "1234" or not _latin_fits(grid, r, c, value):
            return False
        grid[r][c] = value
    return True


def draw_maze(rng: np.random.Generator, n: int) -> str:
    """An n x n maze with walls `x`, start `s` and goal `g`; drawn again until the goal can be reached."""
    while True:
        grid = [["x" if rng.random() < 0.3 else "." for _ in range(n)] for _ in range(n)]
        start, goal = rng.permutation(n * n)[:2]
        grid[start // n][start % n], grid[goal // n][goal % n] = "s", "g"
        if solve_maze(_text(grid))[1]:
            return _text(grid)


def _find(grid: Grid, what: str) -> tuple[int, int]:
    return next((r, row.index(what)) for r, row in enumerate(grid) if what in row)


def _free(grid: Grid, r: int, c: int) -> bool:
    return 0 <= r < len(grid) and 0 <= c < len(grid[0]) and grid[r][c] != "x"


def solve_maze(body: str) -> tuple[list[str], str]:
    """The shortest path as moves, first in the order u, d, l, r; empty if there is none."""
    grid = _grid(body)
    start, goal = _find(grid, "s"), _find(grid, "g")
    queue, paths = deque([start]), {start: ""}
    while queue:
        here = queue.popleft()
        for move, (dr, dc) in MOVES.items():
            there = (here[0] + dr, here[1] + dc)
            if there not in paths and _free(grid, *there):
                paths[there] = paths[here] + move
                queue.append(there)
    return [], " ".join(paths.get(goal, ""))


def valid_maze(body: str, answer: str) -> bool:
    grid, moves = _grid(body), answer.split()
    (r, c), goal = _find(grid, "s"), _find(grid, "g")
    for move in moves:
        if move not in MOVES:
            return False
        r, c = r + MOVES[move][0], c + MOVES[move][1]
        if not _free(grid, r, c):
            return False
    return (r, c) == goal


def _value(digits: list[int], operations: tuple[str, ...] | list[str]) -> int:
    value = digits[0]
    for operation, digit in zip(operations, digits[1:]):
        value = (value + digit if operation == "+" else value - digit if operation == "-" else value * digit) % 10
    return value


def _reach_parts(body: str) -> tuple[list[int], int]:
    digits, target = body.split(" > ")
    return [int(d) for d in digits.split()], int(target)


def draw_reach(rng: np.random.Generator, n: int) -> str:
    """Digits and a target that some choice of operations reaches, from left to right, mod 10."""
    digits = [int(d) for d in rng.integers(0, 10, n)]
    operations = ["+-*"[int(i)] for i in rng.integers(0, 3, n - 1)]
    return " ".join(map(str, digits)) + f" > {_value(digits, operations)}"


def solve_reach(body: str) -> tuple[list[str], str]:
    """Trial and error: the states are the failed trials, the answer the first operations that fit."""
    digits, target = _reach_parts(body)
    trials = []
    for operations in itertools.product("+-*", repeat=len(digits) - 1):
        value = _value(digits, operations)
        if value == target:
            return trials, " ".join(operations)
        trials.append(f"{' '.join(operations)} = {value}")
    raise ValueError(f"no operations reach the target of '{body}'")


def valid_reach(body: str, answer: str) -> bool:
    digits, target = _reach_parts(body)
    operations = answer.split()
    known = all(operation in ("+", "-", "*") for operation in operations)
    return known and len(operations) == len(digits) - 1 and _value(digits, operations) == target


def true_trial(body: str, step: str) -> bool:
    """Is `+ - = 3` what these operations give for the digits of the body?"""
    operations, _, value = step.partition(" = ")
    digits, _ = _reach_parts(body)
    parts = operations.split()
    known = len(parts) == len(digits) - 1 and all(part in ("+", "-", "*") for part in parts)
    return known and value == str(_value(digits, parts))
