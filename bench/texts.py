"""Rows of words with exact numbers of tokens, the same at every run."""

from __future__ import annotations

from typing import Any

import numpy as np

Rows = list[dict[str, Any]]


def words_of(tokenizer: Any) -> list[str]:
    """Lower-case words that are one token, with a space before them and without."""
    vocabulary = tokenizer.get_vocab()
    found = (token[1:] for token in vocabulary if token.startswith("Ġ"))
    return sorted(w for w in found if w.isascii() and w.isalpha() and w.islower() and 3 <= len(w) <= 9 and w in vocabulary)


class Writer:
    """Draws texts of so many tokens each."""

    def __init__(self, words: list[str], seed: int = 0) -> None:
        self.words, self.rng = words, np.random.default_rng(seed)

    def text(self, tokens: int) -> str:
        return " ".join(self.rng.choice(self.words, tokens))

    def answer(self, tokens: int) -> str:
        """What follows a prompt: words with the space before them, and room for the end-of-sequence token."""
        return " " + self.text(tokens - 1)

    def length(self, mean: int, spread: float = 0.25) -> int:
        """Lengths vary as they do in data: evenly within `spread` of the mean."""
        return int(self.rng.integers(round(mean * (1 - spread)), round(mean * (1 + spread)) + 1))


def completions(writer: Writer, rows: int, prompt: int, answer: int, system: int = 0) -> Rows:
    """Prompts (after a system prompt that all share) with their completions."""
    shared = writer.text(system) + " " if system else ""
    return [{"prompt": shared + writer.text(writer.length(prompt)), "completion": writer.answer(writer.length(answer))} for _ in range(rows)]


def preferences(writer: Writer, rows: int, prompt: int, answer: int) -> Rows:
    return [{"prompt": writer.text(prompt), "chosen": writer.answer(answer), "rejected": writer.answer(answer)} for _ in range(rows)]


def rollouts(writer: Writer, rows: int, prompt: int, answer: int, group: int) -> Rows:
    """Prompts with given answers and their advantages (of mean 0 in a group, as rewards leave them)."""
    made = []
    for _ in range(rows):
        advantages = writer.rng.normal(size=group)
        made.append({"prompt": writer.text(prompt), "answers": [writer.answer(answer) for _ in range(group)], "advantages": (advantages - advantages.mean()).tolist()})
    return made


def questions(writer: Writer, rows: int, prompt: int, option: int, options: int) -> Rows:
    """Prompts with candidate answers. The last token of an option is a word as well."""
    return [{"prompt": writer.text(writer.length(prompt)), "options": [" " + writer.text(writer.length(option)) for _ in range(options)]} for _ in range(rows)]


def pairs(writer: Writer, rows: int, anchor: int, positive: int) -> Rows:
    return [{"anchor": writer.text(writer.length(anchor, 0.5)), "positive": writer.text(writer.length(positive, 0.5))} for _ in range(rows)]


def tags(rows: int, number: int, seed: int = 0) -> tuple[list[list[str]], np.ndarray]:
    """One to eight tags a row, common and rare (Zipf) as tagged instructions have them, and a quality a row."""
    rng = np.random.default_rng(seed)
    size = rng.integers(1, 9, rows)
    drawn = rng.zipf(1.4, int(size.sum())) % number
    ends = np.cumsum(size)
    return [[f"tag {t}" for t in drawn[end - n : end]] for n, end in zip(size, ends)], rng.uniform(0.1, 1.0, rows)


def by_length(rows: Rows, batch: int) -> Rows:
    """The rows of every step in order of their length, so that a side which pads rows in the order given pads least."""
    size = lambda row: sum(len(v.split()) for v in row.values() if isinstance(v, str))  # noqa: E731
    return [row for at in range(0, len(rows), batch) for row in sorted(rows[at : at + batch], key=size)]
