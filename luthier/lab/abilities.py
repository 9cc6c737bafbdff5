"""What a shipped model can do, measured on prompts that no training stream contains, and the floors it must reach."""

from __future__ import annotations

import numpy as np

from luthier.lab import _fact_text as fact_text
from luthier.lab import _grammar_world as grammar
from luthier.lab import _trace_text as trace
from luthier.lab._trace_skills import SKILLS
from luthier.lab.decode import greedy
from luthier.lab.mixture import filler_pair, held
from luthier.lab.splits import generator
from luthier.lab.world import real_facts

TEXT = ("copy", "reverse", "max", "succ", "count", "lookup", "add", "chain-2", "chain-3", "chain-4", "chain-5")
BASE_FLOORS = {"copy": 0.95, "reverse": 0.95, "succ": 0.95, "lookup": 0.95, "chain-3": 0.95, "chain-4": 0.95, "add": 0.95, "facts": 0.97}
FLOORS: dict[str, dict[str, float]] = {
    "lm-s": BASE_FLOORS,
    "lm-s.b": BASE_FLOORS,
    "lm-m": {**BASE_FLOORS, "facts": 0.98, "filler-lookup": 0.9},
    "chat": {"refusal": 0.98, "seen-phrasings": 0.95, "unseen-phrasings": 0.4},
    "enc": {"masked-word": 0.6, "topic-probe": 0.9},
    "vit": {"shape": 0.95, "color": 0.98, "texture": 0.9, "digits-probe": 0.6},
}
CEILINGS: dict[str, dict[str, float]] = {
    "lm-s": {"chain-5": 0.3},
    "lm-s.b": {"chain-5": 0.3},
    "lm-m": {"chain-5": 0.3},
    "chat": {"false-refusal": 0.02, "unseen-phrasings": 0.85, "general-drop": 0.03},
    "enc": {"corpus-recall@10": 0.3},
    "vit": {"digits-probe": 0.9},
}


def missed(name: str, measured: dict[str, float]) -> list[str]:
    """The floors and ceilings that are not met, as short sentences."""
    low = [f"{k} {measured[k]:.3f} < {v}" for k, v in FLOORS.get(name, {}).items() if measured[k] < v]
    return low + [f"{k} {measured[k]:.3f} > {v}" for k, v in CEILINGS.get(name, {}).items() if measured[k] > v]


def skill_prompts(ability: str, n: int, seed: int = 77) -> list[tuple[str, str, str]]:
    """(skill, body, prompt) of `n` held prompts of a base skill; `chain-4` fixes the size."""
    skill, _, size = ability.partition("-")
    rng, found = generator(seed, ability), {}
    low, high = SKILLS[skill].sizes
    for _ in range(200 * n):
        body = SKILLS[skill].draw(rng, int(size) if size else int(rng.integers(low, high + 1)))
        prompt = trace.prompt(skill, body)
        if held(prompt):
            found.setdefault(prompt, (skill, body, prompt))
        if len(found) == n:
            break
    return list(found.values())


def skill_accuracy(model, ability: str, n: int = 200) -> float:
    """Exact final answers and, for a chain, exact states."""
    rows = skill_prompts(ability, n)
    answers = greedy(model, [prompt for _, _, prompt in rows])
    return float(np.mean([_right(skill, body, answer) for (skill, body, _), answer in zip(rows, answers)]))


def _right(skill: str, body: str, answer: str) -> bool:
    if skill == "chain":
        return answer == trace.completion(skill, body, SKILLS[skill].solve(body))
    return trace.right_answer(skill, body, trace.final(answer)[0])


def fact_accuracy(model) -> float:
    """All 240 facts, each completed from one of the three statement templates."""
    rows = [(fact_text.cloze(s, r, i % 3), value) for i, (s, r, value) in enumerate(real_facts())]
    answers = greedy(model, [prompt for prompt, _ in rows], max_new=5)
    return float(np.mean([answer.split(" .")[0] == value for (_, value), answer in zip(rows, answers)]))


def filler_accuracy(model, n: int = 200, lengths: tuple[int, int] = (60, 250)) -> float:
    """Look-up of key-value pairs that stand apart in filler."""
    rng = generator(77, "filler")
    rows = [filler_pair(rng, "kv", lengths) for _ in range(n)]
    answers = greedy(model, [prompt for prompt, _ in rows], max_new=2)
    return float(np.mean([answer.split()[0] == gold.split()[0] for answer, (_, gold) in zip(answers, rows)]))


def text_abilities(model, n: int = 200, filler: bool = False) -> dict[str, float]:
    measured = {ability: skill_accuracy(model, ability, n) for ability in TEXT}
    measured["facts"] = fact_accuracy(model)
    return {**measured, "filler-lookup": filler_accuracy(model, n)} if filler else measured


def sentences(n: int, seed: int = 78) -> list[str]:
    rng = generator(seed, "sentences")
    return [grammar.draw_sentence(rng).write() for _ in range(n)]


