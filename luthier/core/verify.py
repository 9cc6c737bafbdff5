"""Verifiers: small programs that say whether an answer is right. One parser serves filters, rewards and metrics.

A verifier is called with the answer's text and its row and returns a `Verdict`. The gold answer is read from the row's columns
(`answer`, `label`, `completion`, the last assistant message, `meta.answer`); a list of gold answers means that any of them is
right. What cannot be read from an answer scores 0, never a guess. `strict=True` (in a recipe: `number:strict`) wants the whole
answer to be what is asked for, with nothing around it: metrics use it, rewards mostly do not.
"""

from __future__ import annotations

import importlib
import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any, Protocol

from luthier.errors import DataError, RecipeError, nearest

Row = Mapping[str, Any]
LONGEST = 20_000
"""Characters of an answer that are looked at, its last ones: model-written text may be arbitrarily long."""


@dataclass(frozen=True)
class Verdict:
    """The score of one answer in [0, 1], what was read from it, and why it is not 1."""

    score: float
    parsed: Any = None
    reason: str = ""

    def __bool__(self) -> bool:
        return self.score >= 1.0


class Verifier(Protocol):
    def __call__(self, answer: str, row: Row) -> Verdict: ...


def verifier(spec: str | Callable[..., Any], strict: bool = False, **options: Any) -> Verifier:
    """A verifier by name: exact, normalised, number, label, regex:PATTERN, contains, json, lab, lab:TASK; or a function
    `(answer, row) -> Verdict | float | bool`. `NAME:strict` is the same as `strict=True`."""
    if callable(spec):
        return partial(_call, spec)
    name, _, rest = str(spec).partition(":")
    name = name.strip().replace("_", "-")
    if name == "regex":
        return _regex_verifier(rest or options.get("pattern", ""), strict)
    if name == "lab" and rest:
        return partial(lab, task=rest.strip())
    if name not in NAMED:
        raise RecipeError(f"There is no verifier '{spec}'.{nearest(name, NAMED)} Known: {', '.join(NAMED)}, regex:PATTERN, lab:TASK.")
    if rest and rest.strip() != "strict":
        raise RecipeError(f"The verifier '{name}' has no option '{rest.strip()}'; only '{name}:strict'.")
    strict = strict or bool(rest)
    return partial(NAMED[name], strict=strict, **options) if name in STRICTABLE else partial(NAMED[name], **options)


def _call(function: Callable[..., Any], answer: str, row: Row) -> Verdict:
    """A user's own function; whatever carries score, parsed and reason counts as a verdict."""
    found = function(answer, row)
    if isinstance(found, Verdict):
        return found
    if hasattr(found, "score"):
        return Verdict(float(found.score), getattr(found, "parsed", None), getattr(found, "reason", ""))
    return Verdict(float(found), answer)


def gold(row: Row) -> list[str]:
    """The row's right answers; any of them passes."""
    for key in ("answer", "answers", "label", "completion"):
        if row.get(key) is not None:
            return _texts(row[key])
    messages = row.get("messages")
    if messages and messages[-1].get("role") == "assistant":
        return _texts(messages[-1]["content"])
    meta = row.get("meta")
    if isinstance(meta, Mapping) and meta.get("answer") is not None:
        return _texts(meta["answer"])
    raise DataError(f"A row has no right answer to check against; give it a column 'answer'. It has: {', '.join(map(str, row))}.")


def _texts(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [json.dumps(value)] if "content" not in value else _texts(value["content"])
    if isinstance(value, (list, tuple)):
        if value and isinstance(value[-1], Mapping) and "content" in value[-1]:  # a conversational completion
            return _texts(value[-1]["content"])
        return [t for v in value for t in _texts(v)]
    return [str(value)]


def normalise(text: str) -> str:
    """Case, width, spacing and the punctuation around the text do not matter."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.strip(" .,;:!?\"'`*()[]")


def tokens(text: str) -> list[str]:
    """Words and single signs, in lower case."""
    return re.findall(r"\w+|[^\w\s]", unicodedata.normalize("NFKC", text).casefold())


# the verifiers ------------------------------------------------------------------------------------------------------


def exact(answer: str, row: Row) -> Verdict:
    """The same string, but for the blanks around it."""
    read = answer.strip()
    return _same(read, [g.strip() for g in gold(row)])


def normalised(answer: str, row: Row) -> Verdict:
    """The same string after `normalise`."""
    return _same(normalise(answer), [normalise(g) for g in gold(row)])


def _same(read: Any, right: list[Any]) -> Verdict:
    if read in right:
        return Verdict(1.0, read)
    return Verdict(0.0, read, f"{str(right[0])[:80]!r} was expected" if right else "no right answer is known")


_NUMBER = re.compile(r"(?<![\w.])[-+]?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.?\d+)?(?:[eE][-+]?\d{1,3})?(?:\s*/\s*\d+(?![\d.]))?")


def final_number(text: str, strict: bool = False) -> Fraction | None:
    """The number behind the last '#', else the last number: 12, -3.5, 1,234, 2e3 or 3/4. None if there is none."""
    text = unicodedata.normalize("NFKC", text[-LONGEST:]).replace("\N{MINUS SIGN}", "-")
    marked = "#" in text
    part = text.rsplit("#", 1)[1] if marked else text
    found = [m for m in _NUMBER.finditer(part) if any(c.isdigit() for c in m.group())]
    if not found:
        return None
    pick = found[0] if marked else found[-1]
    around = (part[: pick.start()] + part[pick.end() :]).strip(" \t\r\n$%.")
    if strict and (around or len(found) > 1 or (marked and text.split("#", 1)[0].strip())):
        return None
    return _fraction(pick.group())


def _fraction(text: str) -> Fraction | None:
    text = re.sub(r"[,$\s]", "", text)
    if len(text) > 400:
        return None
    over, _, under = text.partition("/")
    try:
        return Fraction(over) / Fraction(under) if under else Fraction(over)
    except (ValueError, ZeroDivisionError):
        return None


def number(answer: str, row: Row, strict: bool = False, tolerance: float = 1e-6) -> Verdict:
    """The final number equals the gold one; fractions and decimals compare by value, up to a relative `tolerance` unless both
    are whole."""
    read = final_number(answer, strict)
    if read is None:
        return Verdict(0.0, None, "no number can be read from the answer")
    right = [n for n in map(final_number, gold(row)) if n is not None]
    if not right:
        raise DataError("The gold answer of a row holds no number; use another verifier.")
    if any(_close(read, n, tolerance) for n in right):
        return Verdict(1.0, read)
    return Verdict(0.0, read, f"{right[0]} was expected")


def _close(a: Fraction, b: Fraction, tolerance: float) -> bool:
    if a == b or (a.denominator == 1 and b.denominator == 1):
        return a == b
    return abs(a - b) <= Fraction(tolerance) * max(abs(a), abs(b))


def label(answer: str, row: Row, strict: bool = False) -> Verdict:
    """The one label named in the answer. The possible labels are the row's `labels`, `options` or `choices`; an answer that names
    two of them, or none, is wrong. Without such a column the whole answer must be the label."""
    names = next((row[k] for k in ("labels", "options", "choices") if row.get(k) is not None), None)
    right = [normalise(g) for g in gold(row)]
    if names is None or strict:
        return _same(normalise(answer), right)
    known = {normalise(n): n for n in _texts(names)}
    held = _named(tokens(answer[-LONGEST:]), list(known))
    if len(held) != 1:
        return Verdict(0.0, None, "no label is named" if not held else f"several labels are named: {', '.join(sorted(held))}")
    return _same(held.pop(), right)


def _named(words: list[str], names: list[str]) -> set[str]:
    """The names that occur as whole token runs; a name inside a longer one that occurs ("not safe": "safe") does not count."""
    spans = [(start, start + len(t), n) for n in names if (t := tokens(n)) for start in _occurrences(words, t)]
    return {n for a, b, n in spans if not any(c <= a and b <= d and (d - c) > (b - a) for c, d, _ in spans)}


def _occurrences(words: list[str], part: list[str]) -> list[int]:
    return [i for i in range(len(words) - len(part) + 1) if words[i : i + len(part)] == part]


def contains(answer: str, row: Row) -> Verdict:
    """A gold answer occurs in the answer as whole tokens ('12' does not occur in '126')."""
    words = tokens(answer[-LONGEST:])
    for right in gold(row):
        part = tokens(right)
        if part and _occurrences(words, part):
            return Verdict(1.0, right)
    return Verdict(0.0, None, f"{gold(row)[0][:80]!r} does not occur")


def _regex_verifier(pattern: str, strict: bool) -> Verifier:
    pattern = pattern.strip()
    if not pattern:
        raise RecipeError("The verifier 'regex' needs a pattern, e.g. `regex:answer is (.+)`.")
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise RecipeError(f"The pattern '{pattern}' is not a regular expression: {error}.") from error
    return partial(regex, pattern=compiled, strict=strict)


def regex(answer: str, row: Row, pattern: str | re.Pattern[str], strict: bool = False) -> Verdict:
    """The last match of the pattern (strict: the whole answer). With a group, what it holds must be the gold answer after
    `normalise`; without one, matching is enough."""
    compiled = re.compile(pattern)
    answer = answer[-LONGEST:].strip()
    found = [m for m in [compiled.fullmatch(answer)] if m] if strict else list(compiled.finditer(answer))
    if not found:
        return Verdict(0.0, None, "the pattern does not match")
    if compiled.groups == 0:
        return Verdict(1.0, found[-1].group())
    return _same(normalise(found[-1].group(1) or ""), [normalise(g) for g in gold(row)])


def json_equal(answer: str, row: Row, strict: bool = False) -> Verdict:
    """The answer's first JSON object has the gold object's keys and values; order and number format (1, 1.0) do not matter."""
    read = _json_object(answer[:LONGEST], strict)
    if read is None:
        return Verdict(0.0, None, "no JSON object can be read from the answer")
    right = [o for o in (_json_object(g, strict=True) for g in gold(row)) if o is not None]
    if not right:
        raise DataError("The gold answer of a row is no JSON object; use another verifier.")
    if read in right:
        return Verdict(1.0, read)
    wrong = sorted(k for k in {*read, *right[0]} if k not in read or k not in right[0] or read[k] != right[0][k])
    return Verdict(0.0, read, f"these keys differ: {', '.join(wrong)}")


def _json_object(text: str, strict: bool) -> dict[str, Any] | None:
    starts = [0] if strict else [m.start() for m in re.finditer(r"\{", text)][:50]
    for start in starts:
        try:
            found, end = json.JSONDecoder().raw_decode(text.strip() if strict else text[start:])
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict) and (not strict or end == len(text.strip())):
            return found
    return None


def lab(answer: str, row: Row, task: str | None = None) -> Verdict:
    """The row's own check: its column `verify` (or `meta.verify`) is a verifier's name or function, or `meta.task` names the lab
    task whose program judges it. `lab:TASK` names the task for all rows."""
    meta = row.get("meta") if isinstance(row.get("meta"), Mapping) else {}
    own = task or row.get("verify") or meta.get("verify") or meta.get("task")  # type: ignore[union-attr]
    if own is None:
        raise DataError("A row carries no check of its own (column 'verify', 'meta.verify' or 'meta.task'); use another verifier.")
    if callable(own):
        return _call(own, answer, row)
    name = str(own).removeprefix("lab:")
    if name in NAMED and name != "lab":
        return verifier(name)(answer, row)
    program = _program(name)
    return _call(lambda text, r: program(r, text), answer, row)


def _program(task: str) -> Callable[..., Any]:
    """`verify(row, answer)` of a lab task. The name may come from a data file, so it is only ever looked up in the lab."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", task):
        raise DataError(f"'{task}' is no lab task.")
    try:
        module = importlib.import_module(f"luthier.lab.{task}")
    except ModuleNotFoundError as error:
        raise DataError(f"There is no lab task '{task}'.") from error
    if not callable(getattr(module, "verify", None)):
        raise DataError(f"The lab task '{task}' has no program that checks single answers; use another verifier.")
    return module.verify


NAMED: dict[str, Callable[..., Verdict]] = {
    "exact": exact, "normalised": normalised, "number": number, "label": label, "contains": contains, "json": json_equal, "lab": lab,
}  # fmt: skip
STRICTABLE = frozenset({"number", "label", "json"})
