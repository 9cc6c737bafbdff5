"""How a trace question and its answer are written, and how an answer is read back."""

from __future__ import annotations

import numpy as np

from luthier.lab._trace_skills import SKILLS, Solved, table_of

STYLES = ("1", "2", "fine", "terse", "redundant")
SEEN, UNSEEN = 3, 5

# Eight phrasings an operation: the chat model sees the first three. Of the other five, three use words that it knows
# in a new frame and two use a new word, so that a gap remains which instruction tuning can close.
PHRASINGS: dict[str, list[str]] = {
    "chain": ["compute chain {b} =", "work out chain {b} =", "the chain {b} result is =",
              "please compute the chain {b} =", "the result of chain {b} =", "tell me chain {b} =", "give the sum {b} =", "what is {b} ="],
    "copy": ["repeat the list {b} =", "copy this list : {b} =", "please copy {b} =",
             "please repeat {b} =", "copy the numbers {b} =", "repeat this : {b} =", "clone the list {b} =", "the same again : {b} ="],
    "reverse": ["reverse the list {b} =", "this list backwards : {b} =", "please reverse {b} =",
                "reverse the numbers {b} =", "please give backwards {b} =", "reverse this : {b} =", "flip the list {b} =", "mirror {b} ="],
    "max": ["the max of {b} =", "the biggest of this list : {b} =", "please give the max {b} =",
            "the biggest number in {b} =", "what is the max of {b} =", "max in the list {b} =", "the highest of {b} =", "the top of {b} ="],
    "succ": ["increase each of {b} =", "succ of each : {b} =", "please increase the list {b} =",
             "increase every number {b} =", "succ of the list {b} =", "please succ {b} =", "bump the list {b} =", "one more for each {b} ="],
    "count": ["count in the list {b} =", "how many times : {b} =", "please count {b} =",
              "count the numbers {b} =", "how many in {b} =", "count how many {b} =", "tally {b} =", "the number of times {b} ="],
    "lookup": ["lookup in the list {b} =", "find the value : {b} =", "please lookup {b} =",
               "lookup the value {b} =", "please find {b} =", "find in this list {b} =", "the key value {b} =", "which is it : {b} ="],
    "add": ["the sum of {b} =", "add the numbers {b} =", "please add {b} =",
            "please sum {b} =", "the sum : {b} =", "add {b} for me =", "plus : {b} =", "work out {b} ="],
}


def prompt(skill: str, body: str, phrasing: int | None = None) -> str:
    """`chain 4 : 3 + 4 * 7 - 2 =`, or phrasing 0-7 of a base skill."""
    if phrasing is None or skill not in PHRASINGS:
        return f"{skill} {body} ="
    return PHRASINGS[skill][phrasing].format(b=body)


def equations(body: str, states: list[str]) -> list[str]:
    """`3 + 4 = 7` for every state of a chain."""
    parts = body.split(" : ")[1].split()
    return [f"{left} {op} {right} = {state}" for left, op, right, state in zip([parts[0], *states], parts[1::2], parts[2::2], states)]


def remaining(body: str, states: list[str]) -> list[str]:
    """What is left of a chain after each state: `7 * 7 - 2`, `9 - 2`, `7`."""
    parts = body.split(" : ")[1].split()
    return [" ".join([state, *parts[2 * i + 3 :]]) for i, state in enumerate(states)]


def completion(skill: str, body: str, solved: Solved, style: str = "1", with_states: bool = True) -> str:
    """The answer text. Skills without states answer at once in style 1 and with `so` in style 2."""
    states, answer = solved
    marked = bool(states) or style not in ("1",)
    if not states or not with_states:
        return f"{'so' if style == '2' else '#'} {answer}" if marked else answer
    chain = skill == "chain"
    if style == "2":
        return " , ".join(equations(body, states) if chain else states) + f" , so {answer}"
    if style == "terse":
        return " ".join([*(states[:-1] if chain else states), f"# {answer}"])
    if style in ("fine", "redundant") and chain:
        states = equations(body, states) if style == "fine" else remaining(body, states)
    return " ; ".join([*states, f"# {answer}"])


def practice(skill: str, body: str, rng: np.random.Generator) -> str:
    """More questions about the same row with their answers: one supervised token a row teaches look-up too little."""
    if skill == "lookup":
        table, query = table_of(body)
        keys = [key for key in table if key != query]
        return "".join(f" ; {keys[i]} = {table[keys[i]]}" for i in rng.permutation(len(keys)))
    items, query = body.split(" : ")
    others = sorted(set(items.split()) - {query})
    return "".join(f" ; {others[i]} = {items.split().count(others[i])}" for i in rng.permutation(len(others)))


def strip_think(answer: str) -> str:
    return answer.replace("<think>", "").replace("</think>", ";").strip(" ;")


def final(answer: str) -> tuple[str, str]:
    """The last answer of a text and what stands before it: after `#`, else after `so`, else up to the first `;`."""
    text = strip_think(answer.strip())
    for mark in ("#", "so"):
        parts = text.split()
        if mark in parts:
            place = len(parts) - 1 - parts[::-1].index(mark)
            return " ".join(parts[place + 1 :]), " ".join(parts[:place]).strip(" ;,")
    head, _, rest = text.partition(" ; ")
    return head.strip(), rest


def read_states(skill: str, trace: str, style: str) -> list[str]:
    """The states that a trace claims, in its style."""
    if style == "terse":
        return trace.split()
    steps = [step.strip() for step in trace.replace(" , ", " ; ").split(" ; ") if step.strip()]
    if skill != "chain" or style == "1":
        return steps
    return [step.rpartition("= ")[2] if style in ("2", "fine") else step.split()[0] for step in steps]


def claimed_pairs(skill: str, body: str, rest: str) -> bool:
    """Is every practice answer `key = value` behind the first answer of a multi-question row right?"""
    for part in rest.split(" ; "):
        key, mark, value = part.partition(" = ")
        right = table_of(body)[0].get(key) if skill == "lookup" else str(body.split(" : ")[0].split().count(key))
        if not mark or value != right:
            return False
    return True


def right_answer(skill: str, body: str, answer: str) -> bool:
    valid = SKILLS[skill].valid
    return valid(body, answer) if valid else answer == SKILLS[skill].solve(body)[1]




def add_columns(body: str) -> list[str]:
    """The columns of an addition from the right, with the carry: `7 + 8 + 0 = 1 5`."""
    left, right = (part.split()[::-1] for part in body.split(" + "))
    carry, states = 0, []
    for i in range(max(len(left), len(right))):
        a, b = (int(side[i]) if i < len(side) else 0 for side in (left, right))
        total = a + b + carry
        states.append(f"{a} + {b} + {carry} = {' '.join(f'{total:02d}')}")
        carry = total // 10
    return states
