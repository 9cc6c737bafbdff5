"""`lab:grammar`, labelled sentences of a probabilistic grammar whose log-probabilities are known."""

from __future__ import annotations

import functools

import numpy as np

from luthier.lab import _grammar_rows as rows
from luthier.lab import _grammar_world as world
from luthier.lab.general import general_probe, verify_general
from luthier.lab.splits import Splits, Verdict, as_list, chosen, generator, one_of, pick, share, side

LABELS = (*rows.MAKERS, "sentences", "similarity")


def grammar(seed: int = 0, n: int = 1000, *, label: str = "topic", topics: str = "", sentences: int = 2, by: str = "topic",
            languages: str = "1", shots: int = 0, test: int = 200, noise: float = 0.0, duplicates: float = 0.0,
            unlabelled: int = 0, shifted: float = 0.0, distractors: int = 0, drift: float = 0.0) -> Splits:  # fmt: skip
    """Labelled text from a known grammar: 12 topics in 3 groups, agreement, synonyms, negation.

    label: topic, intent (60/25/10/5), negation, entail, relation (8), spans (label map permuted by domain), tagging (roles),
    reviews (aspect, opinion, sentiment), sentences (plain text with log-probabilities), similarity (by: topic | template |
    entity). topics: names, default all. sentences: per topic text. languages: '1' or '1,2,3,4' (topic, intent, negation,
    tagging). shots: rows a class in place of n. noise: share of wrong labels. duplicates: share of train rows that nearly
    repeat a test row. unlabelled: pool size, of which `shifted` comes from rare terms. distractors: unrelated sentences.
    drift: share at the end of the pool whose intents are 5/10/25/60. Ood uses the rare terms of each topic.
    """
    knobs = {**locals()}
    one_of("grammar", "label", label, LABELS)
    one_of("grammar", "by", by, ("topic", "template", "entity"))
    names = as_list(topics) or rows.TOPIC_NAMES
    for name in names:
        one_of("grammar", "topics", name, rows.TOPIC_NAMES)
    for language in as_list(languages):
        one_of("grammar", "languages", language, ("1", "2", "3", "4"))
    share("grammar", noise=noise, duplicates=duplicates, shifted=shifted, drift=drift)
    made = functools.partial(_part, seed, knobs, names)
    tests, ood, pool = made("test", test), made("ood", test), made("unlabelled", unlabelled)
    train = _shots(made("train", n), shots, made) if shots and label not in ("sentences", "similarity") else made("train", n)
    if label not in ("sentences", "similarity"):
        _flip(train, seed, label, noise)
        _repeat(train, tests, seed, duplicates)
    for row in pool:
        for key in ("label", "label_text", "completion", "prompt"):
            row.pop(key, None)
    return Splits(train, tests, ood, general_probe(), pool, name="grammar", knobs=knobs, verify=verify)


def _shots(train: list[dict], shots: int, made) -> list[dict]:
    """The first `shots` rows of every class (of every domain for spans, tagging and reviews)."""
    counts: dict[str, int] = {}
    kept = []
    for row in [*train, *made("more", 40 * shots + 200)]:
        key = row["label_text"] if "label" in row else row["meta"]["topic"]
        if counts.get(key, 0) < shots:
            counts[key] = counts.get(key, 0) + 1
            kept.append(row)
    return kept


def _part(seed: int, knobs: dict, names: list[str], split: str, n: int) -> list[dict]:
    rng, found = generator(seed, f"grammar {split}"), []
    pool = split == "unlabelled"
    for i in range(n):
        late = pool and i >= n - round(knobs["drift"] * n)
        rare = split == "ood" or (pool and i < round(knobs["shifted"] * n))
        found.append(_one(rng, seed, knobs, names, split, rare, late))
    if pool and knobs["shifted"]:
        found = [found[int(i)] for i in rng.permutation(n)] if not knobs["drift"] else found
    return found


def _one(rng: np.random.Generator, seed: int, knobs: dict, names: list[str], split: str, rare: bool, late: bool) -> dict:
    wanted = "ood" if split == "ood" else "test" if split == "test" else "train"
    for _ in range(2000):
        row = _similar(rng, knobs) if knobs["label"] == "similarity" else _labelled(rng, knobs, pick(rng, names), rare, late)
        if side(row["meta"]["source"], seed) == wanted:
            row["meta"].update(shifted=rare, drifted=late)
            return row
    raise ValueError("the grammar has too few sentences for this split")


def _labelled(rng: np.random.Generator, knobs: dict, name: str, rare: bool, late: bool) -> dict:
    label = knobs["label"]
    language = int(pick(rng, as_list(knobs["languages"])))
    dialect = world.Dialect(rare, late)
    if label == "sentences":
        text, answer, extra = rows.sentence(rng, name, 1, dialect)
    elif label == "tagging":
        text, answer, extra = rows.tagging(rng, name, 1, dialect, language)
    else:
        text, answer, extra = rows.MAKERS[label](rng, name, knobs["sentences"], dialect)
    if language != 1 and label in ("topic", "intent", "negation"):
        text = " ".join(world.parse(s).write(language) for s in split_sentences(text))
    source = text
    for _ in range(knobs["distractors"]):
        other = world.draw_sentence(rng, pick(rng, [t for t in rows.TOPIC_NAMES if t != name])).write()
        text = f"{text} {other}" if rng.random() < 0.5 else f"{other} {text}"
    meta = {"skill": f"grammar {label}", "source": f"{label} {source}", "clean": True, "answer": answer, "topic": name, "language": language}
    row = {"text": text, "meta": {**meta, **{k: v for k, v in extra.items() if k not in ("words", "tags")}}}
    if label == "sentences":
        return {"prompt": "", "completion": text, **row}
    row |= {key: extra[key] for key in ("words", "tags") if key in extra}
    prefix = f"{name} : " if label == "spans" else ""
    row |= {"prompt": f"{prefix}{text} =", "completion": answer, "label_text": answer}
    if answer in rows.label_names(label):
        row["label"] = rows.label_names(label).index(answer)
    return row


def _similar(rng: np.random.Generator, knobs: dict) -> dict:
    anchor, positive, negatives, name = rows.similar(rng, knobs["by"])
    meta = {"skill": f"similarity {knobs['by']}", "source": anchor, "clean": True, "answer": positive, "topic": name}
    return {"anchor": anchor, "positive": positive, "negatives": negatives, "meta": meta}


def split_sentences(text: str) -> list[str]:
    """`a b . c d ?` -> `a b .`, `c d ?`."""
    return [part.strip() for part in text.replace(" .", " .\n").replace(" ?", " ?\n").split("\n") if part.strip()]


def _flip(train: list[dict], seed: int, label: str, noise: float) -> None:
    rng, names = generator(seed, "grammar noise"), rows.label_names(label)
    for i in chosen(rng, len(train), noise):
        row = train[i]
        if "label" in row:
            wrong = pick(rng, [k for k in range(len(names)) if k != row["label"]])
            row.update(label=wrong, label_text=names[wrong], completion=names[wrong])
        else:
            other = pick(rng, [r for r in train if r["completion"] != row["completion"]])
            row.update(completion=other["completion"], label_text=other["label_text"])
        row["meta"]["clean"] = False


def _repeat(train: list[dict], tests: list[dict], seed: int, duplicates: float) -> None:
    """Some train rows become a test row with one more full stop: an honest split would not contain them."""
    rng = generator(seed, "grammar duplicates")
    for i in chosen(rng, len(train), duplicates):
        twin = pick(rng, tests)
        text = f"{twin['text']} ."
        meta = {**twin["meta"], "source": f"twin {i} {twin['meta']['source']}", "duplicate_of": twin["text"]}
        train[i] = {**twin, "text": text, "prompt": twin["prompt"].replace(twin["text"], text), "meta": meta}


def verify(row: dict, answer: str) -> Verdict:
    """The label word; tuples and spans by F1; a plain sentence by the grammar's own parser."""
    meta, said = row["meta"], " ".join(answer.split())
    if not meta["skill"].startswith(("grammar", "similarity")):
        return Verdict(verify_general(row, said), said)
    if meta["skill"] == "grammar sentences":
        try:
            return Verdict(1.0, world.parse(said))
        except ValueError as reason:
            return Verdict(0.0, None, str(reason))
    if meta["skill"] in ("grammar spans", "grammar reviews"):
        claimed, gold = said.split(" ; "), meta["answer"].split(" ; ")
        common = sum(min(claimed.count(item), gold.count(item)) for item in set(gold))
        score = 2 * common / (len(claimed) + len(gold))
        return Verdict(score, claimed, "" if score == 1 else f"{common} of {len(gold)} items are right")
    right = said == meta["answer"]
    return Verdict(float(right), said, "" if right else f"'{meta['answer']}' was expected")
