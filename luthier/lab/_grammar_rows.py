"""The rows of `lab:grammar`, one maker a label: each draws a text of a topic and knows its label."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np

from luthier.lab import _grammar_world as world
from luthier.lab.splits import pick
from luthier.lab.words import NEGATIVE, POSITIVE, TOPICS

TOPIC_NAMES = list(TOPICS)
INTENTS = list(world.INTENTS)
ENTAIL = ["entail", "neutral", "oppose"]
RELATIONS: dict[str, list[str]] = {
    "causes": ["the {a} causes the {b} .", "because of the {a} there is a {b} ."],
    "part": ["the {a} is a part of the {b} .", "the {b} has the part {a} ."],
    "owner": ["the {a} is the owner of the {b} .", "the {b} has the owner {a} ."],
    "uses": ["the {a} uses the {b} .", "the {b} is for the {a} ."],
    "makes": ["the {a} makes the {b} .", "the {b} is from the {a} ."],
    "before": ["the {a} is before the {b} .", "the {b} is after the {a} ."],
    "prevents": ["the {a} prevents the {b} .", "no {b} with the {a} ."],
    "near": ["the {a} is near the {b} .", "the {a} is at the {b} ."],
}
# A span's type is the sum of its cues' numbers mod 4, so neither side alone gives it away.
LEFT, RIGHT = ["near", "with", "during", "after"], [",", ";", "-", "/"]
SPAN_LABELS = ["A", "B", "C", "D"]
ROLES = ["mood", "determiner", "adjective", "subject", "negation", "verb", "object", "adverb", "end"]


def label_names(label: str) -> list[str]:
    return {"topic": TOPIC_NAMES, "intent": INTENTS, "entail": ENTAIL, "negation": ["no", "yes"], "relation": list(RELATIONS),
            "spans": SPAN_LABELS, "tagging": ROLES, "reviews": ["bad", "good"]}.get(label, [])  # fmt: skip


def synonym(rng: np.random.Generator, word: str) -> str:
    others = [other for other in world.SYNONYMS.get(word, []) if other != word]
    return pick(rng, others) if others else word


def eda(text: str, rng: np.random.Generator, safe: bool = True, rate: float = 0.3) -> str:
    """Easy data augmentation: synonyms of verbs, adjectives and adverbs; unsafe: any content word for any other."""
    words = text.split()
    for i, word in enumerate(words):
        base = word.removesuffix("s")
        known = word if word in world.SYNONYMS else base if base in world.SYNONYMS else None
        if rng.random() >= rate:
            continue
        if safe and known:
            words[i] = synonym(rng, known) + word[len(known):]
        elif not safe and (known or word in world.NOUN_SET or word == "not"):
            words[i] = pick(rng, world.NOUNS)
    return " ".join(words)


def topic(rng, name: str, sentences: int, dialect: world.Dialect) -> tuple[str, str, dict]:
    return " ".join(world.draw_sentence(rng, name, dialect=dialect).write() for _ in range(sentences)), name, {}


def intent(rng, name: str, sentences: int, dialect: world.Dialect) -> tuple[str, str, dict]:
    made = world.draw_sentence(rng, name, dialect=dialect)
    return made.write(), made.intent, {}


def negation(rng, name: str, sentences: int, dialect: world.Dialect) -> tuple[str, str, dict]:
    made = replace(world.draw_sentence(rng, name, "inform", dialect), negated=bool(rng.random() < 0.5))
    return made.write(), "yes" if made.negated else "no", {}


def entail(rng, name: str, sentences: int, dialect: world.Dialect) -> tuple[str, str, dict]:
    """Premise | hypothesis: a paraphrase, one with another object or a new adjective, or one with the other polarity."""
    premise = world.draw_sentence(rng, name, "inform", dialect)
    label = ENTAIL[int(rng.integers(3))]
    other = replace(premise, verb=synonym(rng, premise.verb))
    if premise.object.adjective and rng.random() < 0.5:
        other = replace(other, object=replace(premise.object, adjective=synonym(rng, premise.object.adjective)))
    if label == "oppose":
        other = replace(other, negated=not premise.negated)
    elif label == "neutral":
        nouns = [noun for noun in world.TERMS[name] if noun != premise.object.noun]
        other = replace(other, object=replace(other.object, noun=pick(rng, nouns)))
    first, second = premise.write(), other.write()
    return f"{first} | {second}", label, {"premise": first, "hypothesis": second}


def relation(rng, name: str, sentences: int, dialect: world.Dialect) -> tuple[str, str, dict]:
    label = pick(rng, list(RELATIONS))
    first, second = (world.TERMS[name][int(i)] for i in rng.permutation(15)[:2])
    return pick(rng, RELATIONS[label]).format(a=first, b=second), label, {"pair": [first, second]}


@functools.cache
def label_map(name: str) -> list[str]:
    """The domain's own permutation of the span labels."""
    order = np.random.default_rng(TOPIC_NAMES.index(name)).permutation(4)
    return [SPAN_LABELS[int(i)] for i in order]


def spans(rng, name: str, sentences: int, dialect: world.Dialect) -> tuple[str, str, dict]:
    """`near server , with disk ;`: the type of a noun is set by the words on both sides of it."""
    words, tags, found = [], [], []
    for _ in range(int(rng.integers(2, 4))):
        left, right, noun = int(rng.integers(4)), int(rng.integers(4)), world.draw_noun(rng, name, dialect.rare)
        label = label_map(name)[(left + right) % 4]
        words += [LEFT[left], noun, RIGHT[right]]
        tags += ["O", label, "O"]
        found.append(f"{label} : {noun}")
    return " ".join(words), " ; ".join(found), {"tags": tags, "words": words}


def tagging(rng, name: str, sentences: int, dialect: world.Dialect, language: int = 1) -> tuple[str, str, dict]:
    pairs = world.draw_sentence(rng, name, dialect=dialect).roles(language)
    roles = [role for _, role in pairs]
    return " ".join(word for word, _ in pairs), " ".join(roles), {"tags": roles, "words": [word for word, _ in pairs]}


def reviews(rng, name: str, sentences: int, dialect: world.Dialect) -> tuple[str, str, dict]:
    """One to three clauses, each with an aspect, an opinion and a sentiment that `not` turns round."""
    clauses, tuples = [], []
    nouns = [world.TERMS[name][int(i)] for i in rng.permutation(15)[: int(rng.integers(1, 4))]]
    for noun in nouns:
        good, turned = bool(rng.random() < 0.5), bool(rng.random() < 0.25)
        opinion = pick(rng, POSITIVE if good else NEGATIVE)
        clauses.append(f"the {noun} is {'not ' if turned else ''}{'very ' if rng.random() < 0.3 else ''}{opinion}")
        tuples.append(f"( {noun} , {opinion} , {'good' if good != turned else 'bad'} )")
    return " but ".join(clauses) + " .", " ; ".join(tuples), {"aspects": nouns}


MAKERS = {"topic": topic, "intent": intent, "negation": negation, "entail": entail, "relation": relation, "spans": spans,
          "tagging": tagging, "reviews": reviews}  # fmt: skip


def sentence(rng, name: str, sentences: int, dialect: world.Dialect) -> tuple[str, str, dict]:
    text = world.draw_sentence(rng, name, dialect=dialect).write()
    return text, "", {"log_probability": world.log_probability(text)}


def pattern(made: world.Sentence) -> tuple:
    """What two sentences share that are alike by template."""
    return made.intent, made.negated, made.object.plural, bool(made.adverb)


def similar(rng: np.random.Generator, kind: str, negatives: int = 3) -> tuple[str, str, list[str], str]:
    """anchor, positive, negatives and the topic: alike by `topic`, `template` or `entity` (the object noun)."""
    name = pick(rng, TOPIC_NAMES)
    anchor = world.draw_sentence(rng, name)

    def like(same: bool) -> str:
        while True:
            other = pick(rng, TOPIC_NAMES)
            if kind == "topic":
                made = world.draw_sentence(rng, name if same else other)
                fits = same or other != name
            elif kind == "template":
                made = world.draw_sentence(rng, other, anchor.intent if same else None)
                fits = (pattern(made) == pattern(anchor)) == same
            else:
                made = world.draw_sentence(rng, name)
                made = replace(made, object=replace(made.object, noun=anchor.object.noun)) if same else made
                fits = (made.object.noun == anchor.object.noun) == same
            if fits and made != anchor:
                return made.write()

    return anchor.write(), like(True), [like(False) for _ in range(negatives)], name
