"""The streams of text that the shipped models are pre-trained on: (prompt, completion) pairs, made as they are needed.

A statement has an empty prompt, so all of its tokens are learned. Prompts whose hash says `held` are never in a stream:
a model's abilities are measured on those.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable

import numpy as np

from luthier.lab import _fact_text as fact_text
from luthier.lab import _grammar_world as grammar
from luthier.lab import _scene_graph as scene
from luthier.lab import _trace_text as trace
from luthier.lab._trace_faults import with_filler
from luthier.lab._trace_skills import SKILLS
from luthier.lab.splits import pick
from luthier.lab.tokenizer import entries
from luthier.lab.world import real_facts

Pair = tuple[str, str]
CHAIN_SHARES = (0.15, 0.55, 1.0)  # cumulative: 2, 3 and 4 operands


def held(prompt: str) -> bool:
    """One prompt in 16 is kept for measuring."""
    return zlib.crc32(prompt.encode()) % 16 == 0


def encode(text: str) -> list[int]:
    """The tokenizer's ids without `<bos>`, by table look-up (a hundred times faster on single rows)."""
    table, ids = entries_cached(), []
    for word in text.split():
        if word in table:
            ids.append(table[word])
        else:
            ids += _pieces(word)
    return ids


@functools.cache
def entries_cached() -> dict[str, int]:
    return entries()


@functools.lru_cache(maxsize=100_000)
def _pieces(word: str) -> tuple[int, ...]:
    table, ids, start = entries_cached(), [], 0
    while start < len(word):
        prefix = "##" if start else ""
        end = next(e for e in range(len(word), start, -1) if prefix + word[start:e] in table)
        ids.append(table[prefix + word[start:end]])
        start = end
    return tuple(ids)


def trace_pair(rng: np.random.Generator, skill: str, size: int | None = None, free: bool = False) -> Pair:
    """A base-skill row in style 1; look-up and count rows go on with practice questions. `free` allows held prompts."""
    low, high = SKILLS[skill].sizes
    while True:
        body = SKILLS[skill].draw(rng, size or int(rng.integers(low, high + 1)))
        prompt = trace.prompt(skill, body)
        if free or not held(prompt):
            break
    completion = trace.completion(skill, body, SKILLS[skill].solve(body))
    return prompt, completion + (trace.practice(skill, body, rng) if skill in ("lookup", "count") else "")


def chain_pair(rng: np.random.Generator) -> Pair:
    return trace_pair(rng, "chain", int(np.searchsorted(CHAIN_SHARES, rng.random())) + 2)


def list_pair(rng: np.random.Generator) -> Pair:
    return trace_pair(rng, pick(rng, ("copy", "reverse", "max", "succ", "count")))


def filler_pair(rng: np.random.Generator, tag: str = "lookup", lengths: tuple[int, int] = (10, 30), pairs: tuple[int, int] = (3, 4)) -> Pair:
    body = SKILLS["lookup"].draw(rng, int(rng.integers(pairs[0], pairs[1] + 1)))
    body = with_filler(rng, body, int(rng.integers(*lengths)))
    prompt = trace.prompt(tag, body)
    return prompt, SKILLS["lookup"].solve(body)[1] + trace.practice("lookup", body, rng)


def lookup_pair(rng: np.random.Generator) -> Pair:
    return filler_pair(rng) if rng.random() < 0.2 else trace_pair(rng, "lookup")


def fact_pair(rng: np.random.Generator) -> Pair:
    subject, relation, value = pick(rng, _facts())
    if relation in fact_text.REVERSED and rng.random() < 0.2:
        return "", fact_text.REVERSED[relation].format(s=subject, o=value) + " ."
    return "", fact_text.statement(subject, relation, value, int(rng.integers(3))) + " ."


@functools.cache
def _facts() -> list[tuple[str, str, str]]:
    return real_facts()


def grammar_pair(rng: np.random.Generator) -> Pair:
    return "", grammar.draw_sentence(rng).write()


def caption_pair(rng: np.random.Generator) -> Pair:
    graph = scene.draw_scene(rng, pick(rng, (1, 1, 2, 2, 3)))
    return "", scene.caption(graph, pick(rng, ("short", "full", "full", "paragraph")))


def spelled_pair(rng: np.random.Generator) -> Pair:
    from luthier.lab.sounds import entries as sound_entries

    word = pick(rng, sound_entries())[0]
    return f"spell {word} =", " ".join(word)


# (maker, share of rows); as shares of tokens they come to the mixture that LAB calls A.
MIXTURE_A: list[tuple[Callable, float]] = [
    (chain_pair, 0.20),
    (list_pair, 0.17),
    (lookup_pair, 0.14),
    (lambda rng: trace_pair(rng, "add"), 0.08),
    (fact_pair, 0.24),
    (grammar_pair, 0.10),
    (caption_pair, 0.04),
    (spelled_pair, 0.03),
]


def drawn(rng: np.random.Generator, n: int, mixture: list[tuple[Callable, float]]) -> list[Pair]:
    """`n` pairs of a mixture."""
    shares = np.array([share for _, share in mixture])
    which = rng.choice(len(mixture), n, p=shares / shares.sum())
    return [mixture[i][0](rng) for i in which]


def encoded(pair: Pair) -> tuple[list[int], int]:
    """`<bos> prompt completion <eos>` and the first supervised place."""
    prompt = [1, *encode(pair[0])]
    return [*prompt, *encode(pair[1]), 2], len(prompt)


