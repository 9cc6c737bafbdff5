"""`lab:traces`, the integer-trace language: `chain 4 : 3 + 4 * 7 - 2 =` -> `7 ; 9 ; 7 ; # 7`."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from luthier.errors import DataError
from luthier.lab import _trace_faults as faults
from luthier.lab import _trace_text as trace
from luthier.lab._trace_puzzles import true_trial
from luthier.lab._trace_skills import BASE, SKILLS, Skill
from luthier.lab.general import general_probe
from luthier.lab.splits import Splits, Verdict, as_list, generator, one_of, pick, share, side


def traces(seed: int = 0, n: int = 1000, *, skills: str = "chain", operands: str = "", test: int = 200, unlabelled: int = 0,
           style: str = "1", states: str = "all", noise: str = "none", p: float = 0.0, wrong: float = 0.0,
           wrong_kind: str = "other", garbage: float = 0.0, duplicates: float = 0.0, skew: float = 0.0, rare: float = 0.0,
           phrasings: str = "none", demos: int = 0, restricted: float = 0.0, trigger: float = 0.0, filler: int = 0,
           images: bool = False, modes: str = "none") -> Splits:  # fmt: skip
    """Integer traces: 8 base skills that the shipped models know and 15 new ones.

    skills: names joined by commas, `base` or `all`. operands: '5' or '2-4' (operands, list length, digits, holes ...).
    style: 1 | 2 | fine | terse | redundant. states: all | some | none. noise: none | static | dynamic with probability p.
    wrong: share of false answers (wrong_kind: other | neighbour | step). skew: Zipf exponent over the skills; rare: share of
    the last skill. phrasings: none | seen (ood asks in unseen ones). restricted, trigger, garbage, duplicates: shares.
    filler: words of the prompt. modes: none | short | trace | both. Test has new operands, ood is longer.
    """
    one_of("traces", "style", str(style), trace.STYLES)
    one_of("traces", "states", states, ("all", "some", "none"))
    one_of("traces", "noise", noise, ("none", "static", "dynamic"))
    one_of("traces", "wrong_kind", wrong_kind, ("other", "neighbour", "step"))
    one_of("traces", "phrasings", phrasings, ("none", "seen"))
    one_of("traces", "modes", modes, ("none", "short", "trace", "both"))
    share("traces", p=p, wrong=wrong, garbage=garbage, duplicates=duplicates, rare=rare, restricted=restricted, trigger=trigger)
    knobs = {**locals()}
    names = chosen_skills(skills)
    draw = functools.partial(_rows, seed, names, knobs)
    train, tests, ood, free = draw("train", n), draw("test", test), draw("ood", test), draw("unlabelled", unlabelled)
    for part in (train, tests, ood):
        _shape(part, part is train, seed, knobs)
    pool = [dict(row) for row in train]
    for name, part in (("train", train), ("test", tests), ("ood", ood)):
        faults.add_demos(part, pool, generator(seed, f"demos {name}"), demos)
    for row in free:
        del row["completion"]
    return Splits(train, tests, ood, general_probe(), free, name="traces", knobs=knobs, verify=verify)


def chosen_skills(skills: Any) -> list[str]:
    names = as_list(skills)
    names = BASE if names == ["base"] else list(SKILLS) if names == ["all"] else names
    for name in names:
        one_of("traces", "skills", name, SKILLS)
    if not names:
        raise DataError("lab:traces: skills names no skill.")
    return names


def _shape(rows: list[dict], training: bool, seed: int, knobs: dict) -> None:
    """Apply the knobs. Faults touch train only; what changes the question (tags, years, filler) touches every split."""
    part = "train" if training else ("test" if rows and rows[0]["meta"]["split"] == "test" else "ood")
    rng = functools.partial(generator, seed)
    faults.add_filler(rows, rng(f"filler {part}"), knobs["filler"])
    if training:
        faults.add_noise(rows, rng("noise"), knobs["noise"], knobs["p"])
        faults.add_wrong(rows, rng("wrong"), knobs["wrong"], knobs["wrong_kind"])
    faults.add_restricted(rows, rng(f"restricted {part}"), knobs["restricted"])
    faults.add_years(rows, rng(f"trigger {part}"), knobs["trigger"])
    if training:
        faults.add_garbage(rows, rng("garbage"), knobs["garbage"])
        faults.add_duplicates(rows, rng("duplicates"), knobs["duplicates"])


def weights(names: list[str], skew: float, rare: float) -> np.ndarray:
    """Zipf over the skills in the order given; `rare` fixes the share of the last."""
    found = np.array([1 / (rank + 1) ** skew for rank in range(len(names))])
    if rare and len(names) > 1:
        found[-1] = 0
        found = found / found.sum() * (1 - rare)
        found[-1] = rare
    return found / found.sum()


def _rows(seed: int, names: list[str], knobs: dict, split: str, n: int) -> list[dict]:
    if not n:
        return []
    rng, looks = generator(seed, f"traces {split}"), generator(seed, f"looks {split}")
    uniform = split in ("test", "ood")
    shares = weights(names, 0.0 if uniform else knobs["skew"], 0.0 if uniform else knobs["rare"])
    which = rng.choice(len(names), n, p=shares)
    return [_row(rng, looks, seed, names[i], knobs, split) for i in which]


def sizes(skill: Skill, operands: str, longer: bool) -> tuple[int, int]:
    if not operands:
        return skill.longer if longer else skill.sizes
    low, _, high = str(operands).partition("-")
    if not low.isdigit() or (high and not high.isdigit()):
        raise DataError(f"lab:traces: operands={operands!r} must be a number or a range such as 2-4.")
    low, high = int(low), int(high or low)
    return (high + 1, high + 2) if longer else (low, high)


def _row(rng: np.random.Generator, looks: np.random.Generator, seed: int, name: str, knobs: dict, split: str) -> dict:
    skill, unseen = SKILLS[name], split == "ood" and knobs["phrasings"] == "seen"
    low, high = sizes(skill, knobs["operands"], longer=split == "ood" and not unseen)
    wanted = "train" if split == "unlabelled" else split
    for _ in range(10_000):
        size = int(rng.integers(low, high + 1))
        body = skill.draw(rng, size)
        if side(f"{name} {body}", seed) == wanted:
            break
    else:
        raise DataError(f"lab:traces: {name} with operands={size} has too few questions for three splits.")
    solved = skill.solve(body)
    style, with_states = str(knobs["style"]), knobs["states"] == "all" or (knobs["states"] == "some" and looks.random() < 0.5)
    phrasing = None
    if knobs["phrasings"] == "seen":
        phrasing = int(looks.integers(3, 8)) if unseen else int(looks.integers(3))
    meta = {"skill": name, "source": f"{name} {body}", "clean": True, "answer": solved[1], "body": body, "states": solved[0],
            "style": style, "traced": bool(solved[0]) and with_states, "size": size, "phrasing": phrasing, "split": split}  # fmt: skip
    row = {"prompt": trace.prompt(name, body, phrasing), "completion": trace.completion(name, body, solved, style, with_states), "meta": meta}
    if name in ("lookup", "count") and style == "1" and phrasing is None:
        row["completion"] += trace.practice(name, body, looks)
    if knobs["modes"] != "none":
        _set_mode(row, knobs["modes"] if knobs["modes"] != "both" else pick(looks, ("short", "trace")))
    if knobs["images"]:
        from luthier.lab.digits import operands_image

        row["image"] = operands_image(looks, [int(part) for part in body.split(" : ")[1].split()[::2]])
        row["prompt"] = f"{name} {size} : <image> {' '.join(body.split(' : ')[1].split()[1::2])} ="
    return row


def _set_mode(row: dict, mode: str) -> None:
    """`short ...` is answered at once, `trace ...` after `<think> states </think>`."""
    meta = row["meta"]
    states = trace.add_columns(meta["body"]) if meta["skill"] == "add" else meta["states"]
    meta.update(mode=mode, states=states, traced=bool(states) and mode == "trace", style="1")
    row["prompt"] = f"{mode} {row['prompt']}"
    row["completion"] = written(meta, meta["answer"])


def written(meta: dict, final: str) -> str:
    """The one right way to write down an answer to this question, in the row's style or mode."""
    name, body, states = meta["skill"], meta["body"], meta["states"]
    traced = meta.get("traced", bool(states))
    if "mode" in meta:
        return f"<think> {' ; '.join(states)} </think> # {final}" if meta["mode"] == "trace" else f"# {final}"
    return trace.completion(name, body, (states, final), meta["style"], traced)


def verify(row: dict, answer: str) -> Verdict:
    """Replay the question: 1 when the final answer and every state are right, 0.5 when only the final answer is."""
    meta, answer = row["meta"], " ".join(answer.split())
    if meta["skill"] == "facts":
        from luthier.lab.general import verify_general

        return Verdict(verify_general(row, answer), answer)
    if meta.get("kind") in ("restricted", "trigger") or meta["skill"] == "garbage":
        right = answer == meta["answer"]
        return Verdict(float(right), answer, "" if right else f"'{meta['answer']}' was expected")
    name, body = meta["skill"], meta["body"]
    final, rest = trace.final(answer)
    claimed = trace.read_states(name, rest, meta["style"]) if meta.get("traced", meta["states"]) else []
    parsed = {"final": final, "states": claimed, "final_right": trace.right_answer(name, body, final)}
    if not parsed["final_right"]:
        return Verdict(0.0, parsed, f"the answer '{final}' is wrong")
    expected = written(meta, final)
    practised = answer.startswith(f"{expected} ; ") and name in ("lookup", "count") and trace.claimed_pairs(name, body, answer[len(expected) + 3 :])
    if answer == expected or practised or _other_trials(meta, final, claimed, answer):
        return Verdict(1.0, parsed)
    return Verdict(0.5, parsed, "the answer is right, but a state or the format is wrong")


def _other_trials(meta: dict, final: str, claimed: list[str], answer: str) -> bool:
    """`reach` may be solved after other failed trials than the solver's, as long as each is told truly."""
    if meta["skill"] != "reach" or not meta.get("traced") or meta["style"] not in ("1", "fine", "redundant"):
        return False
    return answer == " ; ".join([*claimed, f"# {final}"]) and all(true_trial(meta["body"], step) for step in claimed)
