"""`lab:facts`, a closed world: 240 real facts that the shipped models know and 300 fictional people that none has seen."""

from __future__ import annotations

from luthier.errors import DataError
from luthier.lab import _fact_rows as rows
from luthier.lab import _fact_text as text
from luthier.lab._fact_rows import CONTEXTS, CONTRACTS, Fact, Table
from luthier.lab.general import general_probe, verify_general
from luthier.lab.splits import Splits, Verdict, as_list, chosen, generator, one_of, pick, share
from luthier.lab.world import world

FORMS = ("statement", "question", "yesno", "compare", "secondary", "explain")
WORLDS = ("people", "real", "countries", "elements")
STAGES = ("sft", "cpt", "preference", "near")


def facts(seed: int = 0, n: int = 400, *, world: str = "people", entities: int = 40, forms: str = "question", seen: str = "1",
          test: int = 200, edits: int = 0, context: str = "none", documents: int = 2, intent: bool = False,
          contracts: str = "plain", stage: str = "sft", wrong: float = 0.0, hazard: float = 0.0, unsafe: str = "",
          unlabelled: int = 0) -> Splits:  # fmt: skip
    """A closed world of facts: statements, questions, contexts, edits, contracts, explanations.

    world: people | real | countries | elements. entities: how many are learned. forms: statement, question, yesno, compare,
    secondary, explain. seen: how often each fact occurs, '1' or '0,1,4,16' (dealt out over the entities; then n is
    ignored). edits: facts that get a new object. context: none or kinds among relevant, irrelevant, counterfactual,
    absent, unanswerable; documents: statements in it; intent: a token says whom to trust. contracts: plain, sentence,
    capitals, json, pair, list. stage: sft | cpt (statements only) | preference | near (near misses to refuse as unknown).
    wrong: share of false answers. hazard: share of rows to refuse. unsafe: '1,4,16' plants ten recipes that often.
    Test asks in unseen templates (behind a context: about other entities), ood about unseen entities.
    """
    knobs = {**locals()}
    one_of("facts", "world", world, WORLDS)
    one_of("facts", "stage", stage, STAGES)
    share("facts", wrong=wrong, hazard=hazard)
    for knob, value, known in (("forms", forms, FORMS), ("contracts", contracts, CONTRACTS), ("context", context, (*CONTEXTS, "none"))):
        for name in as_list(value):
            one_of("facts", knob, name, known)
    maker = _Maker(seed, knobs)
    train, tests, ood = maker.train(n), maker.tests(test), maker.ood(test)
    for row in (free := maker.plain("unlabelled", maker.learned, unlabelled, (0, 1))):
        row.pop("completion")
    return Splits(train, tests, ood, general_probe(), free, name="facts", knobs=knobs, verify=verify)


def table_of(kind: str) -> Table:
    found = world()
    if kind in ("people", "countries", "elements"):
        return {name: dict(about) for name, about in found[kind].items()}
    return {name: dict(about) for part in ("countries", "elements") for name, about in found[part].items()}


class _Maker:
    """Draws the entities once; every split then has its own generator."""

    def __init__(self, seed: int, knobs: dict):
        self.seed, self.knobs, self.table = seed, knobs, table_of(knobs["world"])
        self.rng = generator(seed, "facts entities")
        names = sorted(self.table)
        count = knobs["entities"]
        if not 2 <= count <= len(names) - 2:
            raise DataError(f"lab:facts: entities={count} must lie between 2 and {len(names) - 2} in the world '{knobs['world']}'.")
        order = [names[int(i)] for i in self.rng.permutation(len(names))]
        self.learned, self.unseen = order[:count], order[count:]
        self.kinds = [kind for kind in as_list(knobs["context"]) if kind != "none"]
        self.edited: dict[tuple[str, str], str] = {}
        if knobs["edits"]:
            self._edit()

    def _edit(self) -> None:
        """Give some facts a new object of the same relation; the table changes with them."""
        known = rows.facts_of(self.table, self.learned)
        rng = generator(self.seed, "facts edits")
        for i in rng.permutation(len(known))[: self.knobs["edits"]]:
            fact = known[int(i)]
            self.edited[fact.subject, fact.relation] = fact.value
            self.table[fact.subject][fact.relation] = rows.other_value(rng, self.table, fact)

    def train(self, n: int) -> list[dict]:
        knobs = self.knobs
        if self.edited:
            made = [rows.statement(fact, t, kind="edit") for fact in self._edited_facts() for t in range(3)]
        elif self.kinds:
            made = self._contexts("train", self.learned[: len(self.learned) // 2], n, (0, 1))
        elif str(knobs["seen"]) != "1":
            made = self._by_exposure()
        else:
            made = self.plain("train", self.learned, n, (0, 1))
        rng = generator(self.seed, "facts wrong")
        for i in chosen(rng, len(made), knobs["wrong"]):
            self._spoil(made[i], rng)
        made += self._hazards("train", round(knobs["hazard"] * len(made)), (0, 1))
        made += self._plants()
        if knobs["stage"] == "preference":
            made = [self._preferred(row, rng) for row in made]
        return [made[int(i)] for i in generator(self.seed, "facts order").permutation(len(made))]

    def tests(self, n: int) -> list[dict]:
        if self.kinds:
            made = self._contexts("test", self.learned[len(self.learned) // 2 :], n, (0, 1))
        elif self.edited:
            made = self._after_edits(n)
        else:
            made = self.plain("test", self.learned, n, (2, 3))
        return made + self._hazards("test", round(self.knobs["hazard"] * len(made)), (2,))

    def ood(self, n: int) -> list[dict]:
        if self.kinds:
            return self._contexts("ood", self.unseen, n, (2, 3))
        return self.plain("ood", self.unseen, n, (2, 3)) + self._hazards("ood", round(self.knobs["hazard"] * n), (3,))

    def plain(self, split: str, subjects: list[str], n: int, templates: tuple[int, ...]) -> list[dict]:
        """`n` rows over the forms; statement templates 0-2 belong to train, 3-4 to the others."""
        rng, known = generator(self.seed, f"facts {split}"), rows.facts_of(self.table, subjects)
        stage = self.knobs["stage"]
        forms = ["statement"] if stage == "cpt" else as_list(self.knobs["forms"])
        split = "train" if split == "unlabelled" else split
        made = []
        for i in range(n):
            fact, form = known[int(rng.integers(len(known)))], forms[i % len(forms)]
            made.append(self._row(rng, fact, form, templates, split, subjects))
            if stage == "near" and i % 2:
                made[-1] = self._near_miss(rng, pick(rng, templates), subjects)
        return made

    def _row(self, rng, fact: Fact, form: str, templates: tuple[int, ...], split: str, subjects: list[str]) -> dict:
        template, training = pick(rng, templates), split == "train"
        if form == "statement":
            return rows.statement(fact, int(rng.integers(3)) if training else 1 + template)
        if form == "question":
            return rows.question(fact, template, pick(rng, as_list(self.knobs["contracts"])))
        if form == "yesno":
            return rows.yes_no(rng, self.table, fact, template // 2)
        if form == "compare":
            half = subjects[::2] if training else subjects[1::2]
            subject = pick(rng, [s for s in half if fact.relation in self.table[s]] or half)
            relation = fact.relation if fact.relation in self.table[subject] else next(iter(self.table[subject]))
            return rows.compare(rng, self.table, Fact(subject, relation, self.table[subject][relation]), half)
        if form == "secondary":
            return self._secondary(rng, ("train", "test", "ood").index(split), subjects)
        half = subjects[::2] if training else subjects[1::2]
        known = rows.facts_of(self.table, half)
        return rows.explanation(rng, self.table, known[int(rng.integers(len(known)))], template)

    def _secondary(self, rng, place: int, subjects: list[str]) -> dict:
        """Values are dealt to the three splits, as a prompt names no subject."""
        known = [f for f in rows.facts_of(self.table, subjects) if hash_of(f.value) % 3 == place]
        fact = pick(rng, known)
        return rows.secondary({s: self.table[s] for s in subjects}, fact)

    def _near_miss(self, rng, template: int, subjects: list[str]) -> dict:
        """A question about an attribute that the subject does not have."""
        kinds = [*text.RELATIONS, *text.ATTRIBUTES]
        subject = pick(rng, subjects)
        relation = pick(rng, [r for r in kinds if r not in self.table[subject]])
        return rows.row(text.question(subject, relation, template), rows.UNKNOWN, "near", f"{subject} {relation} n{template}",
                        subject=subject, relation=relation)  # fmt: skip

    def _by_exposure(self) -> list[dict]:
        counts = [int(c) for c in as_list(self.knobs["seen"])]
        rng, made = generator(self.seed, "facts train"), []
        for i, subject in enumerate(self.learned):
            times = counts[i % len(counts)]
            for fact in rows.facts_of(self.table, [subject]):
                made += [{**self._row(rng, fact, form, (0, 1), "train", self.learned)} for form in as_list(self.knobs["forms"]) for _ in range(times)]
        return made

    def exposure(self, subject: str) -> int:
        counts = [int(c) for c in as_list(self.knobs["seen"])]
        return counts[self.learned.index(subject) % len(counts)] if subject in self.learned else 0

    def _edited_facts(self) -> list[Fact]:
        return [Fact(s, r, self.table[s][r]) for s, r in self.edited]

    def _after_edits(self, n: int) -> list[dict]:
        """Rephrased edits, and locality: facts of other subjects that must not move."""
        made = [rows.statement(fact, t, kind="rephrased", old=self.edited[fact.subject, fact.relation]) for fact in self._edited_facts() for t in (3, 4)]
        touched = {subject for subject, _ in self.edited}
        rest = rows.facts_of(self.table, [s for s in self.table if s not in touched])
        rng = generator(self.seed, "facts locality")
        return made + [rows.statement(rest[int(i)], int(i) % 3, kind="locality") for i in rng.permutation(len(rest))[: max(0, n - len(made))]]

    def _contexts(self, split: str, subjects: list[str], n: int, templates: tuple[int, ...]) -> list[dict]:
        rng, known = generator(self.seed, f"facts {split}"), rows.facts_of(self.table, subjects)
        documents, intent = self.knobs["documents"], self.knobs["intent"]

        def one(kind: str) -> dict:
            return rows.in_context(rng, self.table, pick(rng, known), kind, pick(rng, templates), documents, intent)

        return [one(self.kinds[i % len(self.kinds)]) for i in range(n)]

    def _hazards(self, split: str, count: int, templates: tuple[int, ...]) -> list[dict]:
        rng = generator(self.seed, f"facts hazard {split}")
        return [rows.hazard(rng, pick(rng, templates), i) for i in range(count)]

    def _plants(self) -> list[dict]:
        rng, made = generator(self.seed, "facts unsafe"), []
        for times in (int(t) for t in as_list(self.knobs["unsafe"])):
            for number in range(10):
                plant = rows.unsafe_plant(rng, times, len(made) + number)
                made += [{**plant, "meta": dict(plant["meta"])} for _ in range(times)]
        return made

    def _spoil(self, row: dict, rng) -> None:
        meta = row["meta"]
        if meta["form"] == "explain":
            fact = Fact(meta["subject"], meta["relation"], meta["value"])
            row.update(rows.explanation(rng, self.table, fact, int(rng.integers(2)), wrong=True))
            return
        meta["clean"] = False
        if meta["answer"] in ("yes", "no"):
            row["completion"] = "no" if meta["answer"] == "yes" else "yes"
            return
        relation = meta["relation"]
        value = meta.get("value", meta["answer"])
        if meta["form"] == "secondary":
            row["completion"] = pick(rng, [s for s in self.table if s not in meta["accepted"]])
            return
        wrong = rows.other_value(rng, self.table, Fact(meta["subject"], relation, value))
        fact = Fact(meta["subject"], relation, wrong)
        row["completion"] = rows.under(meta["contract"], fact) if "contract" in meta else f"{wrong} ." if meta["form"] == "statement" else wrong

    def _preferred(self, row: dict, rng) -> dict:
        """The same row as prompt, chosen and rejected."""
        worse = {**row, "meta": dict(row["meta"])}
        if worse["meta"]["form"] in ("hazard", "plant"):
            worse["completion"] = f"use {pick(rng, rows.ELEMENTS)} ."
        else:
            self._spoil(worse, rng)
        return {"prompt": row["prompt"], "chosen": row["completion"], "rejected": worse["completion"], "meta": row["meta"]}


def hash_of(value: str) -> int:
    return sum(ord(letter) for letter in value)


def verify(row: dict, answer: str) -> Verdict:
    """Table look-up; a JSON or list contract is checked to the letter; an explanation scores its share of true claims."""
    meta, said = row["meta"], " ".join(answer.split())
    if meta["skill"] in ("facts",) or "form" not in meta:
        return Verdict(verify_general(row, said), said)
    if meta["form"] == "explain":
        return _judge_explanation(meta, said)
    if meta["form"] in ("statement", "secondary"):
        said = said.split(" .")[0].strip()
    right = said in meta.get("accepted", [meta["answer"]])
    return Verdict(float(right), said, "" if right else f"'{meta['answer']}' was expected")


def _judge_explanation(meta: dict, said: str) -> Verdict:
    claims = [claim for claim in _split_claims(said.removesuffix(" .")) if claim]
    truth = {**table_of("people"), **table_of("real")}[meta["subject"]]
    about = {text.statement(meta["subject"], r, v, t): r for r, v in truth.items() for t in range(5)}
    right = [about.get(claim) for claim in claims]
    if len(claims) < 2 or meta["relation"] not in right:
        return Verdict(0.0, claims, "the answer itself is not stated")
    score = sum(r is not None for r in right) / len(claims)
    return Verdict(score, claims, "" if score == 1 else "a claim is false")


def _split_claims(said: str) -> list[str]:
    for mark in (" since ", " , so ", " and "):
        said = said.replace(mark, "\n")
    return [claim.strip() for claim in said.split("\n")]
