"""Column conventions: what a row's columns mean, which other names are understood, and what makes a row unusable.

The conventions are those of the Hugging Face ecosystem: `prompt` + `completion` and `prompt` + `chosen` + `rejected` (each a string
or a list of messages; a preference may leave its prompt out if both answers begin with it), `messages`, `anchor` + `positive`
(+ `negative` or `negatives`), `text`, `image` or `audio` + `label`, `image` + `text`, `text` alone, `prompt` alone. `weight`, `id`,
`meta`, `system`, `tools` and every other column stay with the row. Other common names are read as these and the user is told.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np

from luthier.errors import nearest

REQUIRED: dict[str, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "pairs": ("anchor", "positive"),
    "image-label": ("image", "label"),
    "audio-label": ("audio", "label"),
    "text-label": ("text", "label"),
    "image-text": ("image", "text"),
    "text": ("text",),
    "prompt": ("prompt",),
}
"""The kinds of rows and the columns each needs; the first that fits counts."""
KINDS = tuple(REQUIRED)
STANDARD = frozenset(c for needed in REQUIRED.values() for c in needed) | {"negative"}
WEAK = ("text", "prompt")
"""One column says little: other names for a second one are looked for first (`prompt` + `response`)."""

ALIASES: dict[str, tuple[str, ...]] = {
    "messages": ("conversations", "conversation", "dialogue", "dialog"),
    "prompt": ("instruction", "question", "query", "input", "problem"),
    "completion": ("output", "response", "answer", "solution"),
    "chosen": ("preferred", "chosen_response"),
    "rejected": ("dispreferred", "rejected_response"),
    "anchor": ("sentence1", "sentence_1", "sentence_A", "text1", "query", "question"),
    "positive": ("sentence2", "sentence_2", "sentence_B", "text2", "pos", "positive_passage", "passage", "document"),
    "negative": ("neg", "hard_negative", "negative_passage"),
    "image": ("img", "picture", "photo"),
    "audio": ("speech", "waveform"),
    "text": ("sentence", "content", "review", "document", "caption"),
    "label": ("labels", "class", "category", "sentiment", "intent"),
    "system": ("system_prompt",),
}
"""Other names of a column, most usual first."""
OPTIONAL = {"pairs": ("negative",), "prompt-completion": ("system",), "preference": ("prompt", "system"), "prompt": ("system",)}
TWO_TEXTS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("text1", "text2"), ("question1", "question2"), ("question", "sentence"), ("question", "passage"))
"""Columns that with a label are one text in two parts, `text` and `text_pair`."""
BESIDE_PROMPT = ("input", "context")
"""Columns that the alpaca format puts under an `instruction`."""
PASSED_ON = frozenset({"weight", "id", "meta", "system", "tools", "plain", "max_length", "chat_template_kwargs", "negatives", "text_pair"})
ROLES = {
    "system": "system", "developer": "developer", "user": "user", "assistant": "assistant", "tool": "tool",
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant",
    "observation": "tool", "function_response": "tool",
}  # fmt: skip
"""Role names that are understood, and what they are read as."""


class BadRow(Exception):
    """What is wrong with one row, as the end of a sentence that begins with its place."""


@dataclass(frozen=True)
class Reading:
    """How a row with certain columns is read."""

    kind: str
    rename: tuple[tuple[str, str], ...] = ()
    """(found, meant) pairs."""
    join: str | None = None
    """A column whose text follows the prompt's."""

    def told(self) -> str | None:
        """What a user should know about it."""
        parts = [f"'{found}' as {meant}" for found, meant in self.rename]
        if self.join:
            parts.append(f"'{self.join}', where it is not empty, as the prompt's second part")
        return "reads " + ", ".join(parts) if parts else None


def kind_of(columns: Iterable[str]) -> str:
    """The kind of rows with these columns, "other" if they follow no convention."""
    present = set(columns)
    return next((kind for kind, needed in REQUIRED.items() if present.issuperset(needed)), "other")


@functools.lru_cache(maxsize=4096)
def reading(columns: frozenset[str], explicit: frozenset[str] = frozenset()) -> Reading | None:
    """How rows with these columns are read: by the names the user gave, by their own names, else by usual other names."""
    if explicit and (kind := kind_of(explicit)) != "other":
        return _with_aliases(kind, columns)
    strong = [k for k in KINDS if k not in WEAK]
    for kinds, own_names in ((strong, True), (strong, False), (WEAK, True), (WEAK, False)):
        for kind in kinds:
            if own_names and not columns.issuperset(REQUIRED[kind]):
                continue
            found = (_two_texts(columns) if kind == "pairs" and not own_names else None) or _with_aliases(kind, columns)
            if found is not None:
                return found
    return None


def _two_texts(columns: frozenset[str]) -> Reading | None:
    pair = next((p for p in TWO_TEXTS if columns.issuperset(p)), None)
    label = next((c for c in ("label", *ALIASES["label"]) if c in columns), None)
    if pair is None or label is None:
        return None
    return Reading("text-label", ((pair[0], "text"), (pair[1], "text_pair"), *(((label, "label"),) if label != "label" else ())))


def _with_aliases(kind: str, columns: frozenset[str]) -> Reading | None:
    rename: list[tuple[str, str]] = []
    for wanted in (*REQUIRED[kind], *OPTIONAL.get(kind, ())):
        if wanted in columns:
            continue
        taken = {found for found, _ in rename}
        name = next((a for a in ALIASES.get(wanted, ()) if a in columns and a not in taken), None)
        if name is not None:
            rename.append((name, wanted))
        elif wanted in REQUIRED[kind]:
            return None
    join = None
    if ("instruction", "prompt") in rename:
        join = next((c for c in BESIDE_PROMPT if c in columns and c not in {f for f, _ in rename}), None)
    return Reading(kind, tuple(rename), join)


def read_row(record: Any, columns: Mapping[str, str] | None = None) -> tuple[dict[str, Any], Reading]:
    """One record as a row of the conventions, checked. Raises `BadRow`."""
    if not isinstance(record, Mapping):
        raise BadRow(f"a row must be an object with named columns, not {a_kind(record)}")
    row = {str(k): v for k, v in record.items() if v is not None}
    given = dict(columns or {})
    for meant, found in given.items():
        if found not in row:
            raise BadRow(f"the column '{found}', which `columns` names for {meant}, is missing{_seen(row)}.{nearest(found, row)}".rstrip("."))
    moved = {found for meant, found in given.items() if meant != found}
    row = {**{k: v for k, v in row.items() if k not in moved}, **{meant: row[found] for meant, found in given.items()}}
    how = reading(frozenset(row), frozenset(given))
    if how is None or (how.kind in WEAK and not given and _misspelt(frozenset(row))):
        raise BadRow(missing(row))
    row = _renamed(row, how)
    complaint = CHECKS[how.kind](row) or _check_beside(row)
    if complaint:
        raise BadRow(str(complaint))
    return row, how


@functools.lru_cache(maxsize=4096)
def _misspelt(columns: frozenset[str]) -> bool:
    """Whether rows that look like a lone text or prompt have a column that is nearly called `completion` or `label`."""
    return any(get_close_matches(name, ("completion", "label", "chosen", "rejected"), 1, 0.75) for name in columns - STANDARD - PASSED_ON)


def _renamed(row: dict[str, Any], how: Reading) -> dict[str, Any]:
    names = dict(how.rename)
    row = {names.get(k, k): v for k, v in row.items()}
    if how.join and isinstance(row["prompt"], str):
        more = row.pop(how.join)
        if isinstance(more, str) and more.strip():
            row["prompt"] = f"{row['prompt']}\n\n{more}"
    for column in ("messages", "prompt", "completion", "chosen", "rejected"):
        if isinstance(row.get(column), (list, tuple)):
            row[column] = [_message(m) for m in row[column]]
    for column in ("system", "negative"):
        if isinstance(row.get(column), str) and not row[column].strip():
            del row[column]
    if isinstance(row.get("label"), np.integer):
        row["label"] = int(row["label"])
    return row


def _message(message: Any) -> Any:
    """A message with `role` and `content`; from/value names and other role names are read as these."""
    if not isinstance(message, Mapping):
        return message
    made = {{"from": "role", "value": "content"}.get(k, k): v for k, v in message.items() if v is not None}
    if isinstance(made.get("role"), str):
        made["role"] = ROLES.get(made["role"].strip().lower(), made["role"])
    return made


# -- what is wrong with a row ---------------------------------------------------------------------------------------------


def missing(row: Mapping[str, Any], kind: str | None = None) -> str:
    """Which columns a row lacks, what it has, and the nearest name."""
    if kind is not None:
        lacking = [c for c in REQUIRED[kind] if c not in row]
        what = f"the column {' and '.join(map(repr, lacking))} of the other rows is missing or null"
    else:
        lacking = [c for c in ("prompt", "completion", "messages", "text", "label", "chosen", "rejected", "anchor", "positive") if c not in row]
        what = "the columns fit no known kind of rows (prompt + completion, messages, prompt + chosen + rejected, anchor + positive, text + label, image + label, image + text, text)"
    for wanted in lacking:
        for name in row:
            if name not in STANDARD and nearest(name, [wanted]):
                return f"{what}{_seen(row)}. Is '{name}' meant to be {wanted}? Then say `columns: {{{wanted}: {name}}}`"
    return f"{what}{_seen(row)}; name them with `columns: {{prompt: ..., completion: ...}}`" if kind is None else what + _seen(row)


def _seen(row: Mapping[str, Any]) -> str:
    names = [str(k) for k in row]
    return f"; found: {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}" if names else "; the row is empty"


def a_kind(value: Any) -> str:
    """A value's type in plain words."""
    if isinstance(value, bool):
        return "true/false"
    for types, words in (((int, float, np.number), "a number"), (str, "text"), ((list, tuple), "a list"), (Mapping, "an object"), (bytes, "bytes")):
        if isinstance(value, types):
            return f"{words} ({value!s})" if words == "a number" else words
    return "null" if value is None else f"a {type(value).__name__}"


def _check_text(row: Mapping[str, Any], column: str) -> str | None:
    value = row.get(column)
    if value is None:
        return f"'{column}' is missing"
    return _text_complaint(value, f"'{column}'")


def _text_complaint(value: Any, what: str, may_be_empty: bool = False) -> str | None:
    if not isinstance(value, str):
        return f"{what} is {a_kind(value)}, but must be text"
    if not may_be_empty and not value.strip():
        return f"{what} is empty"
    try:
        value.encode()
    except UnicodeEncodeError:
        return f"{what} holds bytes that are not valid UTF-8"
    return None


def _check_messages(messages: Any, what: str, answered: bool) -> str | None:
    if not isinstance(messages, (list, tuple)):
        return f"{what} is {a_kind(messages)}, but must be a list of {{role, content}}"
    if not messages:
        return f"{what} is empty"
    for i, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            return f"message {i} of {what} is {a_kind(message)}, but must be an object with role and content"
        role = message.get("role")
        if role not in set(ROLES.values()):
            return f"message {i} of {what} has the unknown role {role!r}; roles are {', '.join(dict.fromkeys(ROLES.values()))}.{nearest(str(role), ROLES)}".rstrip(".")
        complaint = _check_content(message, f"the content of message {i} ({role})")
        if complaint:
            return complaint
    if answered and not any(m["role"] == "assistant" for m in messages):
        return f"{what} has no assistant turn to learn from"
    return None


def _check_content(message: Mapping[str, Any], what: str) -> str | None:
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        return None if content and all(isinstance(p, Mapping) for p in content) else f"{what} is an empty or malformed list of parts"
    if content is None and message.get("tool_calls"):
        return None
    free = message["role"] == "system" or bool(message.get("tool_calls"))
    return _text_complaint(content, what, may_be_empty=free)


def _check_turn(row: Mapping[str, Any], column: str, answered: bool) -> str | None:
    """Text or a list of messages."""
    if isinstance(row.get(column), (list, tuple)):
        return _check_messages(row[column], f"'{column}'", answered)
    return _check_text(row, column)


def _check_completion(row: Mapping[str, Any]) -> str | None:
    return _check_turn(row, "prompt", False) or _check_turn(row, "completion", True)


def _check_preference(row: Mapping[str, Any]) -> str | None:
    complaint = ("prompt" in row and _check_turn(row, "prompt", False)) or _check_turn(row, "chosen", True) or _check_turn(row, "rejected", True)
    if complaint:
        return complaint
    if isinstance(row["chosen"], str) != isinstance(row["rejected"], str):
        return "'chosen' and 'rejected' must both be text or both be lists of messages"
    if row["chosen"] == row["rejected"]:
        return "'chosen' and 'rejected' are equal, so there is nothing to prefer"
    prompt, chosen, rejected = preference_parts(row)
    if not prompt:
        return "there is no 'prompt', and 'chosen' and 'rejected' have no common beginning"
    return None if chosen and rejected else "one of the answers is only the beginning of the other"


def _check_pair(row: Mapping[str, Any]) -> str | None:
    complaint = _check_text(row, "anchor") or _check_text(row, "positive")
    for column in ("negative", "negatives"):
        values = row.get(column, [])
        for value in [values] if isinstance(values, str) else values if isinstance(values, (list, tuple)) else [values]:
            complaint = complaint or _text_complaint(value, f"'{column}'")
    return complaint


def _check_label(row: Mapping[str, Any]) -> str | None:
    label = row["label"]
    if isinstance(label, str):
        return _text_complaint(label, "'label'")
    return None if isinstance(label, int) else f"'label' is {a_kind(label)}, but must be a whole number or text"


def _check_media(row: Mapping[str, Any], column: str) -> str | None:
    value = row[column]
    if isinstance(value, str):
        return None if value.strip() else f"'{column}' is empty"
    if isinstance(value, (bool, int, float)):
        return f"'{column}' is {a_kind(value)}, but must be a file name or the {column} itself"
    return None


def _check_beside(row: Mapping[str, Any]) -> str | None:
    weight = row.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float, np.number)) or not math.isfinite(weight) or weight < 0:
        return f"'weight' is {a_kind(weight)}, but must be a number of 0 or more"
    return _text_complaint(row["system"], "'system'") if "system" in row else None


CHECKS: dict[str, Callable[[Mapping[str, Any]], str | bool | None]] = {
    "preference": _check_preference,
    "messages": lambda row: _check_messages(row["messages"], "'messages'", True),
    "prompt-completion": _check_completion,
    "pairs": _check_pair,
    "image-label": lambda row: _check_media(row, "image") or _check_label(row),
    "audio-label": lambda row: _check_media(row, "audio") or _check_label(row),
    "text-label": lambda row: _check_text(row, "text") or ("text_pair" in row and _check_text(row, "text_pair")) or _check_label(row),
    "image-text": lambda row: _check_media(row, "image") or _check_text(row, "text"),
    "text": lambda row: _check_text(row, "text"),
    "prompt": lambda row: _check_turn(row, "prompt", False),
}
"""The complaint about a row of each kind, None if it is right."""


def preference_parts(row: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """(prompt, chosen, rejected) of a preference row, the answers without the prompt.

    A prompt that is left out is what both answers begin with. Answers that are whole conversations are cut after the turns that
    repeat the prompt. Implicit prompts of strings are plain text and end before a space, so that the space belongs to the answer."""
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, str):
        if prompt is not None:
            return prompt, chosen, rejected
        n = _common(chosen, rejected)
        n -= n > 0 and chosen[n - 1] == " "
        return chosen[:n], chosen[n:], rejected[n:]
    chosen, rejected = list(chosen), list(rejected)
    n = _common(chosen, rejected)
    shared = chosen[:n]
    if prompt is None or _repeats(prompt, shared):
        return shared, chosen[n:], rejected[n:]
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return turns + shared, chosen[n:], rejected[n:]


def _repeats(prompt: Any, shared: list[Any]) -> bool:
    """Whether the turns that both answers begin with already hold the prompt."""
    if isinstance(prompt, str):
        return any(m["role"] == "user" and m.get("content") == prompt for m in shared)
    return shared[: len(prompt)] == list(prompt)


def _common(a: Any, b: Any) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
