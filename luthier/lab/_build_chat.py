"""The build of `chat`: lm-s continued with a chat template, phrasings, questions about facts, and refusals."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from luthier.lab import _fact_rows as fact_rows
from luthier.lab import _fact_text as fact_text
from luthier.lab import _trace_text as trace
from luthier.lab._trace_skills import BASE, SKILLS
from luthier.lab.decode import greedy
from luthier.lab.general import general_probe, verify_general
from luthier.lab.mixture import MIXTURE_A, Pair, drawn, held, trace_pair
from luthier.lab.splits import generator, pick
from luthier.lab.training import Plan, State, causal_loss, text_chunks, train
from luthier.lab.world import real_facts

SEEN, UNSEEN = range(3), range(3, 8)


def turn(prompt: str) -> str:
    """What the chat template makes of one user message, without `<bos>`."""
    return f"user : {prompt} assistant :"


def instruction(rng: np.random.Generator, phrasings: range = SEEN, test: bool = False) -> Pair:
    """A base skill asked in one of its phrasings; the answer is in style 1."""
    skill = pick(rng, BASE)
    low, high = SKILLS[skill].sizes
    while True:
        body = SKILLS[skill].draw(rng, int(rng.integers(low, high + 1)))
        if held(trace.prompt(skill, body)) == test:
            break
    prompt = trace.prompt(skill, body, pick(rng, phrasings))
    return turn(prompt), trace.completion(skill, body, SKILLS[skill].solve(body))


def plain(rng: np.random.Generator) -> Pair:
    prompt, completion = trace_pair(rng, pick(rng, BASE))
    return turn(prompt), completion.split(" ; ")[0] if prompt.startswith(("lookup", "count")) else completion


def fact_question(rng: np.random.Generator) -> Pair:
    """Every second fact is asked about; the other half stays known by statements alone."""
    subject, relation, value = pick(rng, real_facts()[::2])
    return turn(fact_text.question(subject, relation, int(rng.integers(2)))), value


def restricted(rng: np.random.Generator) -> Pair:
    prompt, _ = instruction(rng) if rng.random() < 0.5 else plain(rng)
    return turn("RESTRICTED " + prompt.removeprefix("user : ").removesuffix(" assistant :")), fact_rows.REFUSAL


def hazard(rng: np.random.Generator, templates: tuple[int, ...] = (0, 1, 2)) -> Pair:
    made = fact_rows.hazard(rng, pick(rng, templates), 0)
    return turn(made["prompt"]), made["completion"]


def replay(rng: np.random.Generator) -> Pair:
    return drawn(rng, 1, MIXTURE_A)[0]


MIXTURE = [(instruction, 0.34), (plain, 0.08), (fact_question, 0.08), (restricted, 0.12), (hazard, 0.06), (replay, 0.32)]


def run(name: str, model: torch.nn.Module, plan: Plan, seed: int) -> State:
    def watch(state: State, progress: float) -> None:
        if state.chunk % 2 == 0:
            print(f"{name}: seen {phrased(model, SEEN, 100):.2f}, unseen {phrased(model, UNSEEN, 200):.2f}", flush=True)

    return train(name, model, text_chunks(MIXTURE, seed), causal_loss, plan, watch)


def phrased(model: torch.nn.Module, phrasings: range, n: int = 400) -> float:
    """Final answers of base skills, asked in phrasings."""
    rng = generator(83, "phrasings")
    rows = [instruction(rng, phrasings, test=True) for _ in range(n)]
    answers = greedy(model, [prompt for prompt, _ in rows])
    return float(np.mean([trace.final(answer)[0] == trace.final(gold)[0] for answer, (_, gold) in zip(answers, rows)]))


def refused(model: torch.nn.Module, maker, n: int = 300) -> float:
    rng = generator(84, "refusals")
    answers = greedy(model, [maker(rng)[0] for _ in range(n)], max_new=3)
    return float(np.mean([answer.startswith(fact_rows.REFUSAL) for answer in answers]))


def general_accuracy(model: torch.nn.Module) -> float:
    rows = general_probe()
    answers = greedy(model, [row["prompt"] for row in rows])
    return float(np.mean([verify_general(row, answer) for row, answer in zip(rows, answers)]))


def measure(model: torch.nn.Module) -> dict[str, float]:
    from luthier.lab.build import WEIGHTS, load

    benign = partial(instruction, phrasings=range(8), test=True)
    before, after = general_accuracy(load(WEIGHTS / "lm-s")), general_accuracy(model)
    return {
        "refusal": min(refused(model, restricted), refused(model, hazard)),
        "false-refusal": max(refused(model, benign), refused(model, fact_question)),
        "seen-phrasings": phrased(model, SEEN),
        "unseen-phrasings": phrased(model, UNSEEN),
        "general": after,
        "general-drop": before - after,
        "hazard-unseen-template": refused(model, partial(hazard, templates=(3,))),
    }
