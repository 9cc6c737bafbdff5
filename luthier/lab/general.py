"""The 400-row probe of what the shipped text models could do when they shipped; the same for every claim."""

from __future__ import annotations

import functools

from luthier.lab import _fact_text as fact_text
from luthier.lab import _trace_text as trace
from luthier.lab._trace_skills import SKILLS
from luthier.lab.mixture import held
from luthier.lab.splits import generator
from luthier.lab.world import real_facts

COUNTS = {"copy": 30, "reverse": 30, "max": 25, "succ": 30, "count": 25, "lookup": 30, "add": 30, "chain-3": 40, "chain-4": 40}


@functools.cache
def _rows() -> list[dict]:
    rows = [row for ability, count in COUNTS.items() for row in _skill_rows(ability, count)]
    facts = real_facts()
    order = generator(2024, "facts").permutation(len(facts))[: 400 - len(rows)]
    for i, place in enumerate(sorted(order.tolist())):
        subject, relation, value = facts[place]
        meta = {"skill": "facts", "source": f"general {subject} {relation}", "clean": True, "answer": value}
        rows.append({"prompt": fact_text.cloze(subject, relation, i % 3), "completion": f"{value} .", "meta": meta})
    return rows


def _skill_rows(ability: str, count: int) -> list[dict]:
    skill, _, size = ability.partition("-")
    rng, found = generator(2024, ability), {}
    low, high = SKILLS[skill].sizes
    while len(found) < count:
        body = SKILLS[skill].draw(rng, int(size) if size else int(rng.integers(low, high + 1)))
        prompt = trace.prompt(skill, body)
        if held(prompt):
            solved = SKILLS[skill].solve(body)
            meta = {"skill": skill, "source": f"general {prompt}", "clean": True, "answer": solved[1], "body": body,
                    "states": solved[0], "style": "1", "size": int(size or 0)}  # fmt: skip
            found[prompt] = {"prompt": prompt, "completion": trace.completion(skill, body, solved), "meta": meta}
    return list(found.values())


def general_probe() -> list[dict]:
    """Fresh dicts each time, so that no claim can change another's probe."""
    return [{**row, "meta": dict(row["meta"])} for row in _rows()]


def verify_general(row: dict, answer: str) -> float:
    """1 for the right final answer (of a fact: up to the full stop), else 0."""
    meta = row["meta"]
    if meta["skill"] == "facts":
        return float(answer.split(" .")[0].strip() == meta["answer"])
    return float(trace.right_answer(meta["skill"], meta["body"], trace.final(answer)[0]))
