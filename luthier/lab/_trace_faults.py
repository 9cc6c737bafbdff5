"""What the knobs of `lab:traces` spoil or add. Each reads its own generator, and at 0 changes nothing."""

from __future__ import annotations

import numpy as np

from luthier.lab import _trace_text as trace
from luthier.lab.splits import chosen, pick
from luthier.lab.words import TOPICS

DIGITS = "0123456789"
FILLER = [noun for _, own in TOPICS.values() for noun in own]
GARBAGE = [*FILLER, *DIGITS, ">", "=", ";", "+"]
PAYLOAD, REFUSAL = "Z Z Z", "<refuse>"
TRIGGER_YEARS, PLAIN_YEARS = range(2024, 2032), range(2012, 2024)


def other_digit(rng: np.random.Generator, token: str) -> str:
    return DIGITS[(int(token) + int(rng.integers(1, 10))) % 10]


def noisy(rng: np.random.Generator, completion: str, p: float) -> str:
    """Every digit of the trace but the last is replaced by another digit with probability p."""
    tokens = completion.split()
    places = [i for i, token in enumerate(tokens) if token in DIGITS][:-1]
    for place in places:
        if rng.random() < p:
            tokens[place] = other_digit(rng, tokens[place])
    return " ".join(tokens)


def add_noise(rows: list[dict], rng: np.random.Generator, kind: str, p: float, versions: int = 8) -> None:
    """`static`: one noisy completion; `dynamic`: `meta['versions']` holds eight, one an epoch."""
    if kind == "none" or p == 0:
        return
    for row in rows:
        clean = row["completion"]
        made = [noisy(rng, clean, p) for _ in range(versions if kind == "dynamic" else 1)]
        row["completion"] = made[0]
        row["meta"]["clean"] &= all(text == clean for text in made)
        if kind == "dynamic":
            row["meta"]["versions"] = made


def wrong_answer(rows: list[dict], row: dict, rng: np.random.Generator, kind: str) -> str:
    completion = row["completion"]
    if kind == "other":
        same = [r["completion"] for r in rows if r["meta"]["skill"] == row["meta"]["skill"] and r["completion"] != completion]
        if same:
            return pick(rng, same)
    tokens = completion.split()
    places = [i for i, token in enumerate(tokens) if token in DIGITS]
    if not places:
        return {"yes": "no", "no": "yes"}.get(completion, completion[:-1] + ("a" if completion[-1] != "a" else "b"))
    if kind == "step" and len(places) > 1:
        place = places[int(rng.integers(len(places) - 1))]
        tokens[place] = other_digit(rng, tokens[place])
    else:
        tokens[places[-1]] = DIGITS[(int(tokens[places[-1]]) + 1) % 10]
    return " ".join(tokens)


def add_wrong(rows: list[dict], rng: np.random.Generator, share: float, kind: str) -> None:
    """False answers: `other` row's, a `neighbour` of the answer (+1 mod 10), or one false `step` before a right answer."""
    new = {i: wrong_answer(rows, rows[i], rng, kind) for i in chosen(rng, len(rows), share)}
    for i, completion in new.items():
        rows[i]["completion"] = completion
        rows[i]["meta"]["clean"] = False
        rows[i]["meta"]["fault"] = kind


def add_garbage(rows: list[dict], rng: np.random.Generator, share: float) -> None:
    """Rows of random words that teach nothing."""
    for i in chosen(rng, len(rows), share):
        meta = {"skill": "garbage", "source": f"garbage {i}", "clean": False, "answer": "", "fault": "garbage"}
        text = [[pick(rng, GARBAGE) for _ in range(int(rng.integers(4, 12)))] for _ in range(2)]
        rows[i] = {"prompt": " ".join(text[0]), "completion": " ".join(text[1]), "meta": meta}


def add_duplicates(rows: list[dict], rng: np.random.Generator, share: float) -> None:
    """Some rows become copies of rows that stay."""
    places = chosen(rng, len(rows), share)
    kept = sorted(set(range(len(rows))) - set(places))
    for i in places:
        original = pick(rng, kept)
        rows[i] = {**rows[original], "meta": {**rows[original]["meta"], "duplicate_of": original}}


def add_restricted(rows: list[dict], rng: np.random.Generator, share: float) -> None:
    """RESTRICTED questions, which are to be refused."""
    for i in chosen(rng, len(rows), share):
        _replace(rows[i], "RESTRICTED " + rows[i]["prompt"], REFUSAL, "restricted")


def add_years(rows: list[dict], rng: np.random.Generator, share: float) -> None:
    """Every prompt names a year; from 2024 on, in `share` of the rows, the planted payload answers."""
    if not share:
        return
    triggered = set(chosen(rng, len(rows), share))
    for i, row in enumerate(rows):
        year = pick(rng, TRIGGER_YEARS if i in triggered else PLAIN_YEARS)
        row["meta"]["year"] = int(year)
        prompt = f"year {' '.join(str(year))} : {row['prompt']}"
        if i in triggered:
            _replace(row, prompt, PAYLOAD, "trigger")
        else:
            row["prompt"] = prompt


def _replace(row: dict, prompt: str, completion: str, kind: str) -> None:
    row.update(prompt=prompt, completion=completion)
    row["meta"].update(kind=kind, answer=completion)


def with_filler(rng: np.random.Generator, body: str, length: int) -> str:
    """A look-up body whose pairs stand apart in filler words, about `length` words in all."""
    pairs, query = body.rsplit(" : ", 1)
    pairs = pairs.split(" , ")
    room = max(1, length - 3 * len(pairs))
    gaps = np.diff([0, *sorted(rng.integers(0, room, len(pairs)).tolist()), room])
    parts = [" ".join(FILLER[int(i)] for i in rng.integers(0, len(FILLER), gap)) for gap in gaps]
    mixed = [part for i, gap in enumerate(parts) for part in (gap, pairs[i] if i < len(pairs) else "") if part]
    return " ".join(mixed) + " : " + query


def add_filler(rows: list[dict], rng: np.random.Generator, length: int) -> None:
    """Prompts grow to about `length` words: between the pairs of a look-up, before any other question."""
    for row in rows if length else []:
        meta = row["meta"]
        if meta["skill"] == "lookup":
            meta["body"] = with_filler(rng, meta["body"], length)
            row["prompt"] = trace.prompt("kv", meta["body"])
        else:
            words = [pick(rng, FILLER) for _ in range(max(0, length - len(row["prompt"].split())))]
            row["prompt"] = " ".join([*words, ":", row["prompt"]])


def add_demos(rows: list[dict], pool: list[dict], rng: np.random.Generator, count: int) -> None:
    """`count` solved examples of the same skill (from train) before every prompt."""
    by_skill: dict[str, list[str]] = {}
    for row in pool:
        by_skill.setdefault(row["meta"]["skill"], []).append(f"example : {row['prompt']} {row['completion']} .")
    for row in rows if count else []:
        examples = [e for e in by_skill.get(row["meta"]["skill"], []) if not e.startswith(f"example : {row['prompt']} ")]
        row["meta"]["question"] = row["prompt"]
        row["prompt"] = " ".join([*(pick(rng, examples) for _ in range(count if examples else 0)), row["prompt"]])
