"""`lab:rewards`, sequences whose true reward is known: far integers, headlines, class-conditional order, bandit lists."""

from __future__ import annotations

import itertools

import numpy as np

from luthier.lab.splits import Splits, Verdict, chosen, generator, one_of, share

KINDS = ("near", "far", "headlines", "order", "bandit")
LENGTH, VALUES = 10, 100
CENTERS = {"near": 20, "far": 70}
# Headlines: 40 words, of which 8 benefit, 8 touch emotions and 5 mark the slot; the rest only fill.
BENEFIT, EMOTION, MARKER = range(0, 8), range(8, 16), range(16, 21)
SLOTS = 5


def _words(tokens: np.ndarray | list) -> str:
    return " ".join(str(int(v)) for v in tokens)


def near_reward(tokens: list[int], center: int) -> float:
    """mean_i exp(-((a_i - center) / 10)^2)."""
    return float(np.mean(np.exp(-(((np.array(tokens) - center) / 10) ** 2))))


def true_effect(words: list[int]) -> float:
    """+1 a benefit word, +0.5 an emotion word, -0.3 a repeat."""
    repeats = len(words) - len(set(words))
    return float(sum(w in BENEFIT for w in words) + 0.5 * sum(w in EMOTION for w in words) - 0.3 * repeats)


def order_reward(tokens: list[int], stride: int) -> float:
    """The share of neighbours that differ by the class's stride, mod 10."""
    return float(np.mean([(b - a) % 10 == stride for a, b in itertools.pairwise(tokens)]))


def prior(rng: np.random.Generator, n: int) -> np.ndarray:
    """The data of the near and far rewards: a Cauchy (location -0.7, scale 0.4) squashed by tanh into 100 bins."""
    squashed = np.tanh(-0.7 + 0.4 * rng.standard_cauchy((n, LENGTH)))
    return np.clip((squashed + 1) / 2 * VALUES, 0, VALUES - 1).astype(int)


def rewards(seed: int = 0, n: int = 1000, *, kind: str = "far", test: int = 200, pairs: bool = False, flips: float = 0.0,
            tails: float = 0.0, noise: float = 0.0, shift: float = 0.0, ties: float = 0.0, confounding: float = 1.0) -> Splits:  # fmt: skip
    """Sequences with a known reward.

    kind: near | far (ten integers below 100, reward peaks at 20 or 70), headlines (8 of 40 words with true effects and a
    popularity confounder), order (digits that should step by the class's stride), bandit (a context, four items).
    pairs: rows as prompt/chosen/rejected by observed reward. flips: share of pairs turned round. noise: standard deviation
    on observed rewards; tails: scale of Student-t noise (1.5 degrees of freedom). shift: how far ood contexts move (bandit).
    ties: share of pairs of equal reward. confounding: strength of the slot effect (headlines).
    """
    knobs = {**locals()}
    one_of("rewards", "kind", kind, KINDS)
    share("rewards", flips=flips, ties=ties)
    make = _lists if kind == "bandit" else _sequences
    train, tests, ood = (make(generator(seed, f"rewards {kind} {split}"), seed, size, knobs, split) for split, size in (("train", n), ("test", test), ("ood", test)))
    if pairs:
        train, tests, ood = (_paired(generator(seed, f"pairs {i}"), part, knobs, i == 0) for i, part in enumerate((train, tests, ood)))
    return Splits(train, tests, ood, name="rewards", knobs=knobs, verify=verify)


def _observed(rng: np.random.Generator, value: float, knobs: dict) -> float:
    value += knobs["noise"] * float(rng.normal()) if knobs["noise"] else 0.0
    return value + (knobs["tails"] * float(rng.standard_t(1.5)) if knobs["tails"] else 0.0)


def _sequences(rng: np.random.Generator, seed: int, n: int, knobs: dict, split: str) -> list[dict]:
    kind, rows = knobs["kind"], []
    noise = generator(seed, f"observed {split}")
    for i in range(n):
        extra: dict = {}
        if kind in ("near", "far"):
            tokens = prior(rng, 1)[0].tolist()
            extra["center"] = CENTERS[kind]
            prompt = f"{kind} {split} {i} ="
        elif kind == "headlines":
            extra["slot"] = int(rng.integers(SLOTS))
            tokens = _headline(rng, extra["slot"], knobs["confounding"])
            prompt = f"slot {extra['slot']} {split} {i} ="
        else:
            extra["stride"] = int(rng.integers(1, 5)) if split != "ood" else int(rng.integers(5, 7))
            tokens = _ordered(rng, extra["stride"])
            prompt = f"order {extra['stride']} {split} {i} ="
        true = reward_of({**extra, "kind": kind}, tokens)
        popular = knobs["confounding"] * extra["slot"] if kind == "headlines" else 0.0
        meta = {"skill": f"rewards {kind}", "source": f"{split} {i}", "clean": True, "answer": _words(tokens), "kind": kind,
                "true": true, "observed": _observed(noise, true + popular, knobs), **extra}  # fmt: skip
        rows.append({"prompt": prompt, "completion": _words(tokens), "meta": meta})
    return rows


def _headline(rng: np.random.Generator, slot: int, confounding: float) -> list[int]:
    """Writers in popular slots use more emotion words and the slot's marker."""
    emotion = 0.1 + 0.12 * slot * confounding
    words = []
    for point in rng.random(8):
        group = EMOTION if point < emotion else BENEFIT if point < emotion + 0.15 else range(21, 40)
        words.append(int(group[int(rng.integers(len(group)))]))
    if rng.random() < 0.7 * min(1.0, confounding):
        words[int(rng.integers(8))] = MARKER[slot]
    return words


def _ordered(rng: np.random.Generator, stride: int) -> list[int]:
    """Data of mixed quality: a step is right with a probability that differs from row to row."""
    quality, tokens = rng.random(), [int(rng.integers(10))]
    for _ in range(LENGTH - 1):
        tokens.append((tokens[-1] + stride) % 10 if rng.random() < quality else int(rng.integers(10)))
    return tokens


def reward_of(meta: dict, tokens: list[int]) -> float:
    if meta["kind"] == "headlines":
        return true_effect(tokens)
    return order_reward(tokens, meta["stride"]) if meta["kind"] == "order" else near_reward(tokens, meta["center"])


def _network(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = generator(seed, "bandit reward")
    return rng.normal(0, 0.35, (16 + 8, 32)), rng.normal(0, 0.5, 32)


def _lists(rng: np.random.Generator, seed: int, n: int, knobs: dict, split: str) -> list[dict]:
    """A context in R^16 and four items in R^8; the reward is a fixed random network of both."""
    first, second = _network(seed)
    noise, rows = generator(seed, f"observed {split}"), []
    for i in range(n):
        context, items = rng.normal(0, 1, 16) + (knobs["shift"] if split == "ood" else 0.0), rng.normal(0, 1, (4, 8))
        true = np.tanh(np.concatenate([np.repeat(context[None], 4, 0), items], 1) @ first) @ second
        if knobs["ties"] and rng.random() < knobs["ties"]:
            items[1], true[1] = items[0], true[0]
        meta = {"skill": "rewards bandit", "source": f"{split} {i}", "clean": True, "answer": str(int(true.argmax())), "kind": "bandit",
                "true": true.tolist(), "observed": [_observed(noise, float(v), knobs) for v in true]}  # fmt: skip
        rows.append({"prompt": f"bandit {split} {i}", "context": context, "items": items, "label": int(true.argmax()), "meta": meta})
    return rows


def _paired(rng: np.random.Generator, rows: list[dict], knobs: dict, training: bool) -> list[dict]:
    """Two rows of one condition (or two items of a list), the better by observed reward first; train has the flips."""
    made = [_list_pair(rng, row) for row in rows] if knobs["kind"] == "bandit" else _sequence_pairs(rng, rows)
    for i in chosen(rng, len(made), knobs["flips"] if training else 0.0):
        made[i]["chosen"], made[i]["rejected"] = made[i]["rejected"], made[i]["chosen"]
    for row in made:
        best, worst = row["meta"]["true_of"][row["chosen"]], row["meta"]["true_of"][row["rejected"]]
        row["meta"]["clean"] = best >= worst
    return made


def _list_pair(rng: np.random.Generator, row: dict) -> dict:
    a, b = (int(v) for v in rng.permutation(4)[:2])
    seen, true = row["meta"]["observed"], row["meta"]["true"]
    best, worst = (a, b) if seen[a] >= seen[b] else (b, a)
    meta = {**row["meta"], "true_of": {str(best): true[best], str(worst): true[worst]}, "answer": str(best if true[best] >= true[worst] else worst)}
    return {**{k: row[k] for k in ("prompt", "context", "items")}, "chosen": str(best), "rejected": str(worst), "meta": meta}


def _sequence_pairs(rng: np.random.Generator, rows: list[dict]) -> list[dict]:
    groups: dict = {}
    for row in rows:
        groups.setdefault(row["meta"].get("slot", row["meta"].get("stride")), []).append(row)
    made = []
    for group in groups.values():
        for first, second in zip(group[::2], group[1::2]):
            if first["completion"] == second["completion"]:
                continue
            best, worst = (first, second) if first["meta"]["observed"] >= second["meta"]["observed"] else (second, first)
            truth = {row["completion"]: row["meta"]["true"] for row in (best, worst)}
            meta = {**first["meta"], "true_of": truth, "answer": max(truth, key=truth.get)}
            made.append({"prompt": first["prompt"], "chosen": best["completion"], "rejected": worst["completion"], "meta": meta})
    return made


def verify(row: dict, answer: str) -> Verdict:
    """The true reward of a sequence, in [0, 1] for near, far and order; a headline's effect over 8; a list's best item."""
    meta, parts = row["meta"], str(answer).split()
    if meta["kind"] == "bandit":
        right = str(answer).strip() == meta["answer"]
        return Verdict(float(right), str(answer).strip(), "" if right else f"item {meta['answer']} is better")
    limit, length = {"headlines": (40, 8), "order": (10, LENGTH)}.get(meta["kind"], (VALUES, LENGTH))
    if len(parts) != length or not all(part.isdigit() and int(part) < limit for part in parts):
        return Verdict(0.0, None, f"{length} integers below {limit} were expected")
    value = reward_of(meta, [int(part) for part in parts])
    return Verdict(min(1.0, max(0.0, value / 8 if meta["kind"] == "headlines" else value)), value)
