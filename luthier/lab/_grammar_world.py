"""A probabilistic grammar with agreement whose sentences have known log-probabilities.

A sentence is `[mood] NP VERB NP [adverb]`: the topic decides the nouns (Zipf over 15 terms), the number decides the
determiner and the verb's ending, every other choice is independent. `parse` inverts `write` for language 1 and
`log_probability` sums over the topics, so text can be judged without the derivation that made it.
"""

from __future__ import annotations

import bisect
import functools
import math
from dataclasses import dataclass, replace

import numpy as np

from luthier.lab.words import ADJECTIVE_SETS, ADVERB_SETS, SHARED, TOPICS, VERB_SETS, grammar_lexicon, translate_word

INTENTS = {"inform": 0.6, "ask": 0.25, "request": 0.1, "complain": 0.05}
DETERMINERS = {False: {"the": 0.5, "a": 0.3, "this": 0.2}, True: {"the": 0.5, "these": 0.3, "some": 0.2}}
PLURAL, ADJECTIVE, NEGATED, ADVERB = 0.4, 0.35, 0.25, 0.3
VERBS = [verb for group in VERB_SETS for verb in group]
ADJECTIVES = [adjective for group in ADJECTIVE_SETS for adjective in group]
ADVERBS = [adverb for group in ADVERB_SETS for adverb in group]
SYNONYMS = {word: group for group in VERB_SETS + ADJECTIVE_SETS + ADVERB_SETS for word in group}
# Places of (mood, subject, verb, object, adverb): languages 1 SVO, 2 SOV, 3 VSO, 4 all backwards.
ORDERS = {1: (0, 1, 2, 3, 4), 2: (0, 1, 3, 2, 4), 3: (0, 2, 1, 3, 4), 4: (4, 3, 2, 1, 0)}
LEXICON = {word: i for i, word in enumerate(grammar_lexicon())}


def terms(topic: str) -> list[str]:
    """The 15 terms of a topic by rank: its own nine mixed with six that its sibling topics share."""
    group, own = TOPICS[topic]
    shared, mixed = SHARED[group], []
    for i in range(15):
        mixed.append(own[i // 5 * 3 + i % 5] if i % 5 < 3 else shared[i // 5 * 2 + i % 5 - 3])
    return mixed


TERMS = {topic: terms(topic) for topic in TOPICS}
_ZIPF = np.array([1 / (rank + 1) for rank in range(15)])
ZIPF = (_ZIPF / _ZIPF.sum()).tolist()
_CUMULATIVE = np.cumsum(ZIPF).tolist()
NOUN_RANK = {topic: {noun: rank for rank, noun in enumerate(nouns)} for topic, nouns in TERMS.items()}
NOUNS = list(dict.fromkeys(noun for nouns in TERMS.values() for noun in nouns))


@dataclass(frozen=True)
class Phrase:
    """`these big servers`."""

    determiner: str
    noun: str
    plural: bool
    adjective: str = ""

    def words(self) -> list[str]:
        return [self.determiner, *([self.adjective] if self.adjective else []), self.noun + "s" * self.plural]


@dataclass(frozen=True)
class Sentence:
    """One derivation. A request has no subject and its verb is `check`."""

    intent: str
    subject: Phrase | None
    verb: str
    object: Phrase
    negated: bool = False
    adverb: str = ""

    def write(self, language: int = 1) -> str:
        return " ".join(word for word, _ in self.roles(language))

    def roles(self, language: int = 1) -> list[tuple[str, str]]:
        """(word, role) in the order of the language; a noun's role is subject or object, so order matters."""
        parts = [
            [(word, "mood") for word in self._mood()],
            self._roles_of(self.subject, "subject"),
            [(word, "verb" if word != "not" else "negation") for word in self._verb()],
            self._roles_of(self.object, "object"),
            [(self.adverb, "adverb")] if self.adverb else [],
        ]
        pairs = [pair for place in ORDERS[language] for pair in (parts[place] if language != 4 else parts[place][::-1])]
        end = "?" if self.intent == "ask" else "."
        return [(translate_word(word, language, LEXICON), role) for word, role in pairs] + [(end, "end")]

    @staticmethod
    def _roles_of(phrase: Phrase | None, role: str) -> list[tuple[str, str]]:
        words = phrase.words() if phrase else []
        return list(zip(words, ["determiner", *["adjective"] * (len(words) - 2), role]))

    def _mood(self) -> list[str]:
        plural = bool(self.subject and self.subject.plural)
        return {"ask": ["do" if plural else "does"], "request": ["please"], "complain": ["sadly"]}.get(self.intent, [])

    def _verb(self) -> list[str]:
        plural = bool(self.subject and self.subject.plural)
        if self.intent == "request":
            return ["check"]
        if self.negated:
            return ([] if self.intent == "ask" else ["do" if plural else "does"]) + ["not", self.verb]
        return [self.verb if plural or self.intent == "ask" else self.verb + "s"]

    def nouns(self) -> list[str]:
        return [phrase.noun for phrase in (self.subject, self.object) if phrase]


def _weighted(rng: np.random.Generator, table: dict[str, float]) -> str:
    point = rng.random()
    for word, weight in table.items():
        point -= weight
        if point < 0:
            return word
    return word


def draw_noun(rng: np.random.Generator, topic: str, rare: bool = False) -> str:
    """A term of the topic by Zipf's law; `rare` turns the law round."""
    rank = min(14, bisect.bisect(_CUMULATIVE, rng.random()))
    return TERMS[topic][14 - rank if rare else rank]


def draw_phrase(rng: np.random.Generator, topic: str, rare: bool = False) -> Phrase:
    plural = bool(rng.random() < PLURAL)
    adjective = ADJECTIVES[int(rng.integers(len(ADJECTIVES)))] if rng.random() < ADJECTIVE else ""
    return Phrase(_weighted(rng, DETERMINERS[plural]), draw_noun(rng, topic, rare), plural, adjective)


@dataclass(frozen=True)
class Dialect:
    """How sentences are drawn when they are not drawn from the grammar itself: rare terms, other shares of intents."""

    rare: bool = False
    drifted: bool = False

    def intents(self) -> dict[str, float]:
        return dict(zip(INTENTS, reversed(INTENTS.values()))) if self.drifted else INTENTS


PLAIN = Dialect()


def draw_sentence(rng: np.random.Generator, topic: str | None = None, intent: str | None = None, dialect: Dialect = PLAIN) -> Sentence:
    topic = topic or list(TOPICS)[int(rng.integers(len(TOPICS)))]
    intent = intent or _weighted(rng, dialect.intents())
    if intent == "request":
        return Sentence(intent, None, "check", draw_phrase(rng, topic, dialect.rare))
    adverb = ADVERBS[int(rng.integers(len(ADVERBS)))] if rng.random() < ADVERB else ""
    verb = VERBS[int(rng.integers(len(VERBS)))]
    first, second = (draw_phrase(rng, topic, dialect.rare) for _ in range(2))
    return Sentence(intent, first, verb, second, bool(rng.random() < NEGATED), adverb)


class _Reader:
    def __init__(self, text: str):
        self.words, self.place = text.split(), 0

    def peek(self) -> str:
        return self.words[self.place] if self.place < len(self.words) else ""

    def take(self, *allowed: str) -> str:
        word = self.peek()
        if allowed and word not in allowed:
            raise ValueError(f"expected {' or '.join(allowed[:3])}, found '{word}'")
        self.place += 1
        return word


def _read_phrase(reader: _Reader) -> Phrase:
    determiner = reader.take("the", "a", "this", "these", "some")
    adjective = reader.take() if reader.peek() in SYNONYMS and reader.peek() in ADJECTIVES else ""
    word = reader.take()
    plural = word not in NOUN_SET
    noun = word.removesuffix("s") if plural else word
    if noun not in NOUN_SET or determiner not in DETERMINERS[plural]:
        raise ValueError(f"'{determiner} {word}' is no noun phrase")
    return Phrase(determiner, noun, plural, adjective)


NOUN_SET = set(NOUNS)
_VERB_FORMS = {form for verb in VERBS for form in (verb, verb + "s")}


def parse(text: str) -> Sentence:
    """The derivation of a sentence of language 1; ValueError says where it is not grammatical."""
    reader = _Reader(text)
    first = reader.peek()
    if first == "please":
        reader.take()
        reader.take("check")
        return _finish(reader, Sentence("request", None, "check", _read_phrase(reader)))
    intent = {"do": "ask", "does": "ask", "sadly": "complain"}.get(first, "inform")
    if intent != "inform":
        reader.take()
    subject = _read_phrase(reader)
    if intent == "ask" and (first == "do") != subject.plural:
        raise ValueError(f"'{first}' does not agree with '{subject.noun}'")
    negated = reader.peek() in ("do", "does", "not")
    if negated and intent != "ask":
        reader.take("do" if subject.plural else "does")
    if negated:
        reader.take("not")
    bare = negated or subject.plural or intent == "ask"
    form = reader.take(*_VERB_FORMS)
    if (form in VERBS) != bare:
        raise ValueError(f"'{form}' does not agree with its subject")
    verb = form if bare else form.removesuffix("s")
    return _finish(reader, Sentence(intent, subject, verb, _read_phrase(reader), negated))


def _finish(reader: _Reader, sentence: Sentence) -> Sentence:
    if sentence.intent != "request" and reader.peek() in ADVERBS:
        sentence = replace(sentence, adverb=reader.take())
    reader.take("?" if sentence.intent == "ask" else ".")
    if reader.peek():
        raise ValueError(f"words after the end: '{reader.peek()}'")
    return sentence


def _phrase_log(phrase: Phrase) -> float:
    """Everything about a noun phrase but its noun."""
    adjective = ADJECTIVE / len(ADJECTIVES) if phrase.adjective else 1 - ADJECTIVE
    number = PLURAL if phrase.plural else 1 - PLURAL
    return math.log(number * DETERMINERS[phrase.plural][phrase.determiner] * adjective)


def topic_posterior(nouns: list[str]) -> dict[str, float]:
    """p(topic, nouns) for every topic under a uniform prior; zero where a noun is not a term."""
    return {
        topic: math.prod(ZIPF[ranks[noun]] if noun in ranks else 0.0 for noun in nouns) / len(TOPICS)
        for topic, ranks in NOUN_RANK.items()
    }


@functools.lru_cache(maxsize=100_000)
def log_probability(text: str) -> float:
    """log p of a sentence of language 1 under the grammar, -inf when it cannot be derived."""
    try:
        sentence = parse(text)
    except ValueError:
        return -math.inf
    nouns = sum(topic_posterior(sentence.nouns()).values())
    if nouns <= 0:
        return -math.inf
    total = math.log(INTENTS[sentence.intent]) + math.log(nouns) + _phrase_log(sentence.object)
    if sentence.subject is None:
        return total
    adverb = ADVERB / len(ADVERBS) if sentence.adverb else 1 - ADVERB
    negated = NEGATED if sentence.negated else 1 - NEGATED
    return total + _phrase_log(sentence.subject) + math.log(adverb * negated / len(VERBS))
