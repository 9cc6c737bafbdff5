"""The skills of the integer-trace language: each draws the body of a question and solves any body it is given.

A body is the text between the task tag and `=`. Solving reads only the body, so the verifier replays a trace from the
question itself: `chain` with the body `4 : 3 + 4 * 7 - 2` has the states 7, 9, 7 and the answer 7.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from luthier.lab import _trace_puzzles as puzzles
from luthier.lab.splits import pick

LETTERS = string.ascii_lowercase
OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
LIST_OPS: dict[str, Callable[[list[int]], list[int]]] = {
    "reverse": lambda x: x[::-1],
    "sort": sorted,
    "sortd": lambda x: sorted(x, reverse=True),
    "succ": lambda x: [(v + 1) % 10 for v in x],
    "pred": lambda x: [(v - 1) % 10 for v in x],
    "rotl": lambda x: x[1:] + x[:1],
    "rotr": lambda x: x[-1:] + x[:-1],
    "dropf": lambda x: x[1:],
    "dropl": lambda x: x[:-1],
    "swap": lambda x: [x[-1], *x[1:-1], x[0]],
    "double": lambda x: [2 * v % 10 for v in x],
    "comp": lambda x: [9 - v for v in x],
}
Solved = tuple[list[str], str]
"""The intermediate states and the answer."""


@dataclass(frozen=True)
class Skill:
    """`sizes` is the range of operands or list lengths in train and test, `longer` the one of ood."""

    draw: Callable[[np.random.Generator, int], str]
    solve: Callable[[str], Solved]
    sizes: tuple[int, int]
    longer: tuple[int, int]
    base: bool = False
    valid: Callable[[str, str], bool] | None = None


def digits(rng: np.random.Generator, n: int) -> list[str]:
    return [str(v) for v in rng.integers(0, 10, n)]


def spaced(values: list[int]) -> str:
    return " ".join(map(str, values))


def numbers(body: str) -> list[int]:
    return [int(v) for v in body.split()]


def draw_list(rng: np.random.Generator, n: int) -> str:
    return " ".join(digits(rng, n))


def draw_chain(rng: np.random.Generator, n: int) -> str:
    parts = digits(rng, 1)
    for digit in digits(rng, n - 1):
        parts += [pick(rng, "+-*"), digit]
    return f"{n} : " + " ".join(parts)


def solve_chain(body: str) -> Solved:
    parts = body.split(" : ")[1].split()
    value, states = int(parts[0]), []
    for operation, digit in zip(parts[1::2], parts[2::2]):
        value = OPERATIONS[operation](value, int(digit)) % 10
        states.append(str(value))
    return states, str(value)


def on_list(function: Callable[[list[int]], list[int]]) -> Callable[[str], Solved]:
    return lambda body: ([], spaced(function(numbers(body))))


def draw_count(rng: np.random.Generator, n: int) -> str:
    pool = digits(rng, 3)
    items = [pick(rng, pool) for _ in range(n)]
    return " ".join(items) + " : " + pick(rng, items)


def draw_contains(rng: np.random.Generator, n: int) -> str:
    items = digits(rng, n)
    return " ".join(items) + " : " + (pick(rng, items) if rng.random() < 0.5 else pick(rng, string.digits))


def draw_palindrome(rng: np.random.Generator, n: int) -> str:
    half = digits(rng, (n + 1) // 2)
    items = half + half[: n // 2][::-1]
    if rng.random() < 0.5:
        place = int(rng.integers(n))
        items[place] = str((int(items[place]) + int(rng.integers(1, 10))) % 10)
    return " ".join(items)


def solve_count(body: str) -> Solved:
    items, query = body.split(" : ")
    return [], str(items.split().count(query))


def solve_contains(body: str) -> Solved:
    items, query = body.split(" : ")
    return [], "yes" if query in items.split() else "no"


def draw_lookup(rng: np.random.Generator, n: int) -> str:
    keys, values = rng.permutation(26)[:n], rng.integers(0, 26, n)
    pairs = [f"{LETTERS[k]} > {LETTERS[v]}" for k, v in zip(keys, values)]
    return " , ".join(pairs) + " : " + LETTERS[keys[int(rng.integers(n))]]


def table_of(body: str) -> tuple[dict[str, str], str]:
    """The pairs of a look-up body (filler words around them are skipped) and the question."""
    pairs, query = body.rsplit(" : ", 1)
    parts = pairs.split()
    return {parts[i - 1]: parts[i + 1] for i, part in enumerate(parts) if part == ">"}, query


def solve_lookup(body: str) -> Solved:
    table, query = table_of(body)
    return [], table[query]


def draw_hop2(rng: np.random.Generator, n: int) -> str:
    names = [LETTERS[i] for i in rng.permutation(26)[: 2 * n]]
    starts, middles, ends = names[: n - n // 2], names[n - n // 2 : n], names[n:]
    middles = (middles * 2)[: len(starts)]
    table = list(zip(starts, middles)) + list(zip(dict.fromkeys(middles), ends))
    pairs = [f"{table[i][0]} > {table[i][1]}" for i in rng.permutation(len(table))]
    return " , ".join(pairs) + " : " + pick(rng, starts)


def solve_hop2(body: str) -> Solved:
    table, query = table_of(body)
    return [table[query]], table[table[query]]


def draw_number(rng: np.random.Generator, n: int) -> int:
    return int(rng.integers(10 ** (n - 1) if n > 1 else 0, 10**n))


def draw_add(rng: np.random.Generator, n: int) -> str:
    return f"{' '.join(str(draw_number(rng, n)))} + {' '.join(str(draw_number(rng, n)))}"


def draw_sub(rng: np.random.Generator, n: int) -> str:
    large, small = sorted((draw_number(rng, n), draw_number(rng, n)), reverse=True)
    return f"{' '.join(str(large))} - {' '.join(str(small))}"


def _sides(body: str, operation: str) -> list[int]:
    return [int(part.replace(" ", "")) for part in body.split(f" {operation} ")]


def solve_add(body: str) -> Solved:
    return [], " ".join(str(sum(_sides(body, "+"))))


def solve_sub(body: str) -> Solved:
    left, right = _sides(body, "-")
    return [], " ".join(str(left - right))


def draw_modsub(rng: np.random.Generator, n: int) -> str:
    """`n` is the modulus: 53 and 31 are the ones the claims use."""
    left, right = rng.integers(0, n, 2)
    return " : ".join(" ".join(f"{v:02d}") for v in (n, left)) + " - " + " ".join(f"{right:02d}")


def solve_modsub(body: str) -> Solved:
    modulus, question = body.split(" : ")
    left, right = _sides(question, "-")
    return [], " ".join(f"{(left - right) % int(modulus.replace(' ', '')):02d}")


def draw_compose(rng: np.random.Generator, n: int) -> str:
    names = list(LIST_OPS)
    return f"{pick(rng, names)} {pick(rng, names)} : " + draw_list(rng, n)


def solve_compose(body: str) -> Solved:
    operations, items = body.split(" : ")
    first, second = operations.split()
    middle = LIST_OPS[first](numbers(items))
    return [spaced(middle)], spaced(LIST_OPS[second](middle))


def running(function: Callable[[int, int], int]) -> Callable[[str], Solved]:
    def solve(body: str) -> Solved:
        values, so_far = numbers(body), []
        for value in values:
            so_far.append(function(so_far[-1], value) if so_far else value)
        return [], spaced(so_far)

    return solve


# Risk: eight factors a-h with four levels; every level adds a fixed signed integer to the score.
EFFECTS = np.random.default_rng(109).integers(-3, 4, (8, 4)).tolist()


def draw_risk(rng: np.random.Generator, n: int) -> str:
    return " ".join(f"{LETTERS[i]} {int(rng.integers(4))}" for i in range(n))


def solve_risk(body: str) -> Solved:
    parts, score, states = body.split(), 0, []
    for factor, level in zip(parts[::2], parts[1::2]):
        effect = EFFECTS[LETTERS.index(factor)][int(level)]
        score += effect
        states.append(f"{factor} {_signed(effect)} = {_signed(score)}")
    months = min(60, max(0, 30 - 3 * score))
    return states, f"{'yes' if score > 0 else 'no'} {' '.join(f'{months:02d}')}"


def _signed(value: int) -> str:
    return f"{'-' if value < 0 else '+'} {' '.join(str(abs(value)))}"


SKILLS: dict[str, Skill] = {
    "chain": Skill(draw_chain, solve_chain, (2, 4), (5, 6), base=True),
    "copy": Skill(draw_list, on_list(lambda x: x), (3, 6), (7, 8), base=True),
    "reverse": Skill(draw_list, on_list(lambda x: x[::-1]), (3, 6), (7, 8), base=True),
    "max": Skill(draw_list, on_list(lambda x: [max(x)]), (3, 6), (7, 8), base=True),
    "succ": Skill(draw_list, on_list(LIST_OPS["succ"]), (3, 6), (7, 8), base=True),
    "count": Skill(draw_count, solve_count, (3, 6), (7, 8), base=True),
    "lookup": Skill(draw_lookup, solve_lookup, (3, 4), (5, 6), base=True),
    "add": Skill(draw_add, solve_add, (2, 2), (3, 3), base=True),
    "sort": Skill(draw_list, on_list(sorted), (3, 6), (7, 8)),
    "sortd": Skill(draw_list, on_list(LIST_OPS["sortd"]), (3, 6), (7, 8)),
    "sub": Skill(draw_sub, solve_sub, (2, 2), (3, 3)),
    "hop2": Skill(draw_hop2, solve_hop2, (4, 4), (6, 6)),
    "runmax": Skill(draw_list, running(max), (4, 6), (7, 8)),
    "runsum": Skill(draw_list, running(lambda a, b: (a + b) % 10), (4, 6), (7, 8)),
    "even": Skill(draw_list, lambda body: ([], "no" if sum(numbers(body)) % 2 else "yes"), (3, 5), (6, 7)),
    "palin": Skill(draw_palindrome, lambda body: ([], "yes" if numbers(body) == numbers(body)[::-1] else "no"), (3, 6), (7, 8)),
    "contains": Skill(draw_contains, solve_contains, (3, 6), (7, 8)),
    "modsub": Skill(draw_modsub, solve_modsub, (53, 53), (31, 31)),
    "compose": Skill(draw_compose, solve_compose, (5, 5), (6, 7)),
    "risk": Skill(draw_risk, solve_risk, (8, 8), (6, 7)),
    "latin": Skill(puzzles.draw_latin, puzzles.solve_latin, (4, 6), (7, 8), valid=puzzles.valid_latin),
    "maze": Skill(puzzles.draw_maze, puzzles.solve_maze, (5, 5), (6, 6), valid=puzzles.valid_maze),
    "reach": Skill(puzzles.draw_reach, puzzles.solve_reach, (3, 3), (4, 4), valid=puzzles.valid_reach),
}
BASE = [name for name, skill in SKILLS.items() if skill.base]
