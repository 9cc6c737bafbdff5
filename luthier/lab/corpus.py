"""`lab:corpus`, retrieval with graded relevance: passages about fictional entities, near-duplicates, four query styles."""

from __future__ import annotations

import ast
import functools
import math
import sysconfig
from pathlib import Path

import numpy as np

from luthier.errors import DataError
from luthier.lab import _fact_text as text
from luthier.lab.splits import Splits, Verdict, generator, one_of, pick, share
from luthier.lab.words import TOPICS
from luthier.lab.world import people_facts, world

PERIODS = ("year 1 9", "year 2 0", "year 2 1")
STYLES: dict[str, str] = {
    "question": "what is the {r} of {s} in {p} ?",
    "keywords": "{s} {r} {p}",
    "command": "tell me the {r} that {s} has in {p} .",
    "indirect": "{p} : which {r} does {s} have ?",
}
HELD_OUT_STYLE = "indirect"
MODULES = ("argparse", "ast", "calendar", "collections", "csv", "datetime", "difflib", "fractions", "functools", "gzip", "heapq", "inspect",
           "ipaddress", "json.decoder", "logging", "mailbox", "os", "pathlib", "pickle", "platform", "random", "shutil", "statistics",
           "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading", "tokenize", "typing", "unittest.case", "urllib.parse", "uuid",
           "zipfile")  # fmt: skip


def grade(query: dict, passage: dict) -> int:
    """3: entity, relation and period are shared; 2: the entity and one of the others; 1: the entity alone, or both others."""
    entity, relation, period = (query[key] == passage[key] for key in ("entity", "relation", "period"))
    return 1 + relation + period if entity else int(relation and period)


def passages(seed: int, size: int, duplicates: int) -> list[dict]:
    """`size` passages: each tells one fact of a period, with filler; near-duplicates use another template."""
    rng, found = generator(seed, "corpus passages"), []
    facts = people_facts()
    order = [facts[int(i)] for i in rng.permutation(len(facts))]
    number = 0
    while len(found) < size:
        subject, relation, value = order[number % len(order)]
        about = {"entity": subject, "relation": relation, "value": value, "period": PERIODS[int(rng.integers(len(PERIODS)))], "fact": number}
        for copy in range(1 + int(rng.integers(duplicates + 1))):
            if len(found) < size:
                found.append({**about, "id": len(found), "text": _passage(rng, about, copy)})
        number += 1
    return found


def _passage(rng: np.random.Generator, about: dict, template: int) -> str:
    told = text.statement(about["entity"], about["relation"], about["value"], template % 5)
    noun = pick(rng, TOPICS[pick(rng, list(TOPICS))][1])
    other = pick(rng, TOPICS[pick(rng, list(TOPICS))][1])
    return f"in {about['period']} {told} . the {noun} is near the {other} ."


def query_text(passage: dict, style: str) -> str:
    return STYLES[style].format(s=passage["entity"], r=text.asked(passage["relation"]), p=passage["period"])


def corpus(seed: int = 0, n: int = 400, *, kind: str = "facts", size: int = 800, duplicates: int = 2, negatives: int = 7,
           distractors: str = "graded", false_negatives: float = 0.0, teacher_noise: float = 0.0, test: int = 100) -> Splits:  # fmt: skip
    """Retrieval: query -> passages with relevance 0-3 (shared entity, relation, period).

    kind: facts | code (docstring summary -> function of installed standard-library modules) | clones (pairs of renamed
    functions). size: passages. duplicates: up to so many near-duplicates of a passage. negatives a row. distractors:
    graded | random | hard (same entity or relation). false_negatives: share of rows where a relevant passage is listed as a
    negative. teacher_noise: standard deviation on `meta.teacher`, the grade of every candidate. Test asks about other
    entities, ood in a held-out style; `unlabelled` holds all passages (meta: id, entity, relation, period).
    """
    knobs = {**locals()}
    one_of("corpus", "kind", kind, ("facts", "code", "clones"))
    one_of("corpus", "distractors", distractors, ("graded", "random", "hard"))
    share("corpus", false_negatives=false_negatives)
    if kind != "facts":
        return _code(seed, n, knobs)
    if not 0 <= duplicates <= 3:
        raise DataError(f"lab:corpus: duplicates={duplicates} must lie between 0 and 3.")
    pool = passages(seed, size, duplicates)
    names = sorted(world()["people"])
    order = [names[int(i)] for i in generator(seed, "corpus entities").permutation(len(names))]
    homes = dict(zip(order, ["train"] * (len(order) * 7 // 10) + ["test"] * len(order)))
    parts = {split: [p for p in pool if homes[p["entity"]] == split] for split in ("train", "test")}
    styles = [style for style in STYLES if style != HELD_OUT_STYLE]
    make = functools.partial(_queries, seed, pool, knobs)
    free = [{"text": p["text"], "meta": {"skill": "corpus", "clean": True, **{k: v for k, v in p.items() if k != "text"}}} for p in pool]
    train, tests = make("train", parts["train"], styles, n), make("test", parts["test"], styles, test)
    ood = make("ood", parts["test"], [HELD_OUT_STYLE], test)
    return Splits(train, tests, ood, [], free, name="corpus", knobs=knobs, verify=verify)


def _queries(seed: int, pool: list[dict], knobs: dict, split: str, own: list[dict], styles: list[str], n: int) -> list[dict]:
    rng, spoil, teach = (generator(seed, f"corpus {purpose} {split}") for purpose in ("queries", "false negatives", "teacher"))
    rows = []
    for i in range(n):
        passage, style = pick(rng, own), styles[i % len(styles)]
        grades = {p["id"]: grade(passage, p) for p in pool}
        listed = _negatives(rng, pool, passage, grades, knobs)
        clean = True
        if knobs["false_negatives"] and spoil.random() < knobs["false_negatives"]:
            twins = [p["id"] for p in pool if grades[p["id"]] == 3 and p["id"] != passage["id"]]
            if twins and listed:
                listed[0], clean = pick(spoil, twins), False
        candidates = [passage["id"], *listed]
        noise = teach.normal(0, 1, len(candidates)) * knobs["teacher_noise"]
        meta = {"skill": f"corpus {style}", "source": f"{split} {passage['entity']} {passage['relation']} {passage['period']} {style} {i}",
                "clean": clean, "answer": str(passage["id"]), "grades": {k: g for k, g in grades.items() if g}, "candidates": candidates,
                "teacher": [float(grades[c] + e) for c, e in zip(candidates, noise)], "fact": passage["fact"]}  # fmt: skip
        rows.append({"anchor": query_text(passage, style), "positive": passage["text"], "negatives": [pool[k]["text"] for k in listed], "meta": meta})
    return rows


def _negatives(rng: np.random.Generator, pool: list[dict], passage: dict, grades: dict[int, int], knobs: dict) -> list[int]:
    """Passages that are not fully relevant: random ones, hard ones, or a graded mixture of both."""
    hard = [p["id"] for p in pool if 0 < grades[p["id"]] < 3]
    plain = [p["id"] for p in pool if grades[p["id"]] == 0]
    wanted = {"random": 0, "hard": knobs["negatives"], "graded": knobs["negatives"] // 2}[knobs["distractors"]]
    some = [hard[int(i)] for i in rng.permutation(len(hard))[:wanted]]
    return some + [plain[int(i)] for i in rng.permutation(len(plain))[: knobs["negatives"] - len(some)]]


def ndcg(grades: dict[int, int], ranked: list[int], k: int = 10) -> float:
    """nDCG@k with gains 2^grade - 1 over the whole collection."""
    gain = [(2 ** grades.get(i, 0) - 1) / math.log2(rank + 2) for rank, i in enumerate(ranked[:k])]
    best = [(2**g - 1) / math.log2(rank + 2) for rank, g in enumerate(sorted(grades.values(), reverse=True)[:k])]
    return sum(gain) / sum(best) if best else 0.0


def recall(grades: dict[int, int], ranked: list[int], k: int = 10) -> float:
    relevant = {i for i, g in grades.items() if g == 3}
    return len(relevant & set(ranked[:k])) / max(1, min(k, len(relevant)))


def reciprocal_rank(grades: dict[int, int], ranked: list[int], k: int = 10) -> float:
    return next((1 / (rank + 1) for rank, i in enumerate(ranked[:k]) if grades.get(i) == 3), 0.0)


@functools.cache
def functions() -> list[dict]:
    """(name, summary, code) of documented functions in the installed standard library, read without running it."""
    found = []
    for module in MODULES:
        base = Path(sysconfig.get_path("stdlib")).joinpath(*module.split("."))
        path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            doc = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            if doc and not node.name.startswith("__") and len(node.body) > 1:
                summary = " ".join(doc.split("\n\n")[0].split())
                bare = ast.FunctionDef(**{**vars(node), "body": node.body[1:], "decorator_list": []})
                code = " ".join(ast.unparse(ast.fix_missing_locations(bare)).split())
                if 12 < len(summary) < 160 and 40 < len(code) < 900:
                    found.append({"name": f"{module}.{node.name}:{node.lineno}", "summary": plain(summary), "code": plain(code[:400])})
    unique = {entry["summary"]: entry for entry in {entry["code"]: entry for entry in found}.values()}
    return sorted(unique.values(), key=lambda entry: entry["name"])


def plain(line: str) -> str:
    """Words and symbols apart, so that known words are found: `self.items[0]` -> `self . items [ 0 ]`."""
    spaced = "".join(c if c.isalnum() else " " if c == "_" else f" {c} " for c in line if c.isascii())
    return " ".join(spaced.split()).lower()


def renamed(code: str, rng: np.random.Generator) -> str:
    """A clone: the words that name things become other words, one for one."""
    keep = {"def", "return", "self", "if", "else", "import", "class", "raise", "none", "for", "in", "not", "and", "or", "is", "while", "try", "except"}
    names = sorted({word for word in code.split() if word.isalpha() and word not in keep})
    nouns = [noun for _, own in TOPICS.values() for noun in own]
    order = rng.permutation(max(len(nouns), len(names)))
    table = {name: nouns[int(order[i]) % len(nouns)] for i, name in enumerate(names)}
    return " ".join(table.get(word, word) for word in code.split())


def _code(seed: int, n: int, knobs: dict) -> Splits:
    """Docstring summaries with their functions, or pairs (text, text_pair, label) of clones and strangers."""
    entries = functions()
    order = [int(i) for i in generator(seed, "code order").permutation(len(entries))]
    cut = len(order) * 7 // 10
    homes = {"train": order[:cut], "test": order[cut : cut + (len(order) - cut) // 2], "ood": order[cut + (len(order) - cut) // 2 :]}
    parts = []
    for split, size in (("train", n), ("test", knobs["test"]), ("ood", knobs["test"])):
        rng = generator(seed, f"code {split}")
        make = _clone if knobs["kind"] == "clones" else _search
        places = [homes[split][i % len(homes[split])] for i in range(size)]
        parts.append([make(rng, entries, place, homes[split], knobs["negatives"], i) for i, place in enumerate(places)])
    free = [{"text": f"{entry['summary']} {entry['code']}", "meta": {"skill": "code", "clean": True}} for entry in entries]
    return Splits(*parts, [], free, name="corpus", knobs=knobs, verify=verify)


def _search(rng: np.random.Generator, entries: list[dict], place: int, home: list[int], negatives: int, i: int) -> dict:
    others = [k for k in (home[int(j)] for j in rng.permutation(len(home))[: negatives + 1]) if k != place][:negatives]
    meta = {"skill": "corpus code", "source": entries[place]["name"], "clean": True, "answer": str(place), "grades": {place: 3}, "candidates": [place, *others]}
    return {"anchor": entries[place]["summary"], "positive": entries[place]["code"], "negatives": [entries[k]["code"] for k in others], "meta": meta}


def _clone(rng: np.random.Generator, entries: list[dict], place: int, home: list[int], negatives: int, i: int) -> dict:
    same = bool(rng.random() < 0.5)
    other = place if same else pick(rng, [k for k in home if k != place])
    first, second = renamed(entries[place]["code"], rng), renamed(entries[other]["code"], rng)
    meta = {"skill": "corpus clones", "source": entries[place]["name"], "clean": True, "answer": str(int(same))}
    return {"text": first, "text_pair": second, "label": int(same), "meta": meta}


def verify(row: dict, answer: str) -> Verdict:
    """`answer` is a ranking of passage ids (best first), scored by nDCG@10; for clones the label."""
    meta = row["meta"]
    if "grades" not in meta:
        return Verdict(float(str(answer).strip() == meta["answer"]), str(answer))
    parts = str(answer).split()
    if not parts or not all(part.isdigit() for part in parts) or len(set(parts)) != len(parts):
        return Verdict(0.0, None, "a ranking of different passage ids was expected")
    ranked = [int(part) for part in parts]
    score = ndcg(meta["grades"], ranked) if len(ranked) > 1 else float(meta["grades"].get(ranked[0], 0) == 3)
    return Verdict(score, ranked, "" if score == 1 else "less relevant passages stand before more relevant ones")
