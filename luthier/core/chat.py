"""Chat templates: which tokens of a rendered conversation the model itself writes. Right for any template, or refused.

A conversation is rendered once and tokenised once, as text, so the tokens are those that the model meets when it is used. What a turn
covers is found in the text and carried to the tokens by their character offsets; a token that crosses a boundary belongs to what
comes after it. A turn's span begins where generation would begin and ends with the token that ends the turn.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from luthier.errors import DataError

Message = Mapping[str, Any]
Span = tuple[int, int]
SENTINEL = "\ue000luthier\ue001"
"""Stands for one turn's content in a trial rendering; private-use characters, which no data should hold."""
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


# -- text to tokens ------------------------------------------------------------------------------------------------------


@dataclass
class Tokens:
    """A text's token ids and where each lies in the text."""

    text: str
    ids: np.ndarray
    tokenizer: Any
    starts: np.ndarray | None = None
    ends: np.ndarray | None = None

    def first(self, char: int) -> int:
        """The first token that reaches beyond this character position."""
        if self.ends is not None:
            return int(np.searchsorted(self.ends, char, side="right"))
        head = plain_ids(self.tokenizer, self.text[:char])
        n = min(len(head), len(self.ids))
        different = np.flatnonzero(head[:n] != self.ids[:n])
        return int(different[0]) if len(different) else n

    def stop(self, char: int) -> int:
        """One past the last token that begins before this character position."""
        if self.starts is not None:
            return int(np.searchsorted(self.starts, char, side="left"))
        at = self.first(char)
        return at if at == len(plain_ids(self.tokenizer, self.text[:char])) else min(at + 1, len(self.ids))


def tokenise(text: str, tokenizer: Any) -> Tokens:
    """The tokens of a text as it stands; nothing is put before or after it."""
    if not getattr(tokenizer, "is_fast", False):
        return Tokens(text, plain_ids(tokenizer, text), tokenizer)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = np.asarray(found["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    # Offsets may be trimmed of spaces, never of order; the running maximum keeps them sorted for byte pieces of one character.
    starts, ends = np.maximum.accumulate(offsets, axis=0).T if len(offsets) else (np.zeros(0, np.int64),) * 2
    return Tokens(text, np.asarray(found["input_ids"], dtype=np.int64), tokenizer, starts, ends)


def plain_ids(tokenizer: Any, text: str) -> np.ndarray:
    """Token ids without special tokens around them."""
    return np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)


def edges(tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """The special tokens that the tokenizer puts before and after a text."""
    with_edges = np.asarray(tokenizer("a", verbose=False)["input_ids"], dtype=np.int64)
    bare = plain_ids(tokenizer, "a")
    for start in range(len(with_edges) - len(bare) + 1):
        if np.array_equal(with_edges[start : start + len(bare)], bare):
            return with_edges[:start], with_edges[start + len(bare) :]
    return with_edges[:0], with_edges[:0]


# -- templates -----------------------------------------------------------------------------------------------------------


def has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def text_of(message: Message) -> str:
    """A message's text; of a list of parts, the text parts."""
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        return "".join(str(p.get("text", "")) for p in content if isinstance(p, Mapping))
    return "" if content is None else str(content)


def _extras(given: Any, tokenizer: Any, where: str) -> dict[str, Any]:
    """A row's own values for the template. Rows are data: they may not replace the template or say how it is applied."""
    own = inspect.signature(tokenizer.apply_chat_template).parameters
    wrong = [str(k) for k in given if k in own] if isinstance(given, Mapping) else [str(given)]
    if wrong:
        raise DataError(f"In {where} chat_template_kwargs holds {', '.join(wrong)[:80]}; only values that the template itself reads can be given, such as {{enable_thinking: false}}.")
    return dict(given)


@dataclass
class Conversation:
    """Messages and the template they are rendered with."""

    messages: list[dict[str, Any]]
    tokenizer: Any
    extras: dict[str, Any]
    """What else the template may read: tools, and a row's `chat_template_kwargs`."""
    where: str = "the row"

    @classmethod
    def of(cls, messages: SequenceOf[Message], tokenizer: Any, example: Mapping[str, Any], where: str = "the row") -> Conversation:
        if not has_template(tokenizer):
            raise DataError(f"In {where} there are messages, but the tokenizer has no chat template; use a chat model, give it a template, or write the rows as prompt and completion.")
        extras = _extras(example.get("chat_template_kwargs") or {}, tokenizer, where)
        if example.get("tools"):
            extras["tools"] = example["tools"]
        shown = [{k: v for k, v in m.items() if k != "train" and v is not None} for m in messages]
        return cls(shown, tokenizer, extras, where)

    def render(self, messages: list[dict[str, Any]], prompt: bool = False) -> str:
        """The template's text; `prompt` adds what comes before the model's answer."""
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **self.extras))
        except DataError:
            raise
        except Exception as error:  # a template is a program and may raise anything
            raise DataError(f"The chat template cannot render {self.where} ({type(error).__name__}: {error}).") from error

    def rendered(self, messages: list[dict[str, Any]], prompt: bool = False) -> str | None:
        """The same, None where the template refuses these messages."""
        try:
            return self.render(messages, prompt) if messages else None
        except DataError:
            return None

    @cached_property
    def full(self) -> str:
        return self.render(self.messages)

    @cached_property
    def tokens(self) -> Tokens:
        return tokenise(self.full, self.tokenizer)

    # spans --------------------------------------------------------------------------------------------------------------
    def mask(self, turns: SequenceOf[int]) -> np.ndarray:
        """bool per token: it belongs to one of these turns."""
        mask = np.zeros(len(self.tokens.ids), dtype=bool)
        for start, end in self.spans(turns):
            mask[self.tokens.first(start) : self.tokens.stop(end)] = True
        return mask

    def spans(self, turns: SequenceOf[int]) -> list[Span]:
        """Where in the text these turns stand: by the template's own marks, by its prefixes, else by their content."""
        marked = self._marked()
        found = []
        for turn in turns:
            span = marked.get(turn) or self._by_prefix(turn) or self._by_content(turn)
            if span is None:
                raise DataError(
                    f"The chat template cannot be trained on turn by turn: turn {turn + 1} of {self.where} cannot be found in what it renders. "
                    "Use `train_on: all`, or a template with {% generation %} marks around the assistant's words."
                )
            found.append(span)
        return found

    def _marked(self) -> dict[int, Span]:
        """The assistant turns between `{% generation %}` marks, if there are as many marks as turns."""
        template = self.tokenizer.get_chat_template(None, self.extras.get("tools"))
        if not GENERATION.search(template):
            return {}
        from transformers.utils.chat_template_utils import render_jinja_template

        settings = {**self.tokenizer.special_tokens_map, **self.extras}
        rendering: Any = render_jinja_template([self.messages], chat_template=template, return_assistant_tokens_mask=True, **settings)
        marks: list[Span] = rendering[1][0]
        turns = [i for i, m in enumerate(self.messages) if m["role"] == "assistant"]
        if len(marks) != len(turns):
            return {}
        return {turn: (start, self._ended(end)) for turn, (start, end) in zip(turns, marks)}

    def _by_prefix(self, turn: int) -> Span | None:
        """From the end of the text that precedes the turn to the end of the text that includes it, where both begin the full text."""
        before = self._before(turn)
        after = self.full if turn == len(self.messages) - 1 else self.rendered(self.messages[: turn + 1])
        if before is None or after is None or len(after) <= len(before) or not self.full.startswith(after):
            return None
        trimmed = self._trimmed(len(before), len(after))
        return len(before), trimmed if trimmed < len(after) else self._trimmed(len(before), self._ended(len(after)))

    def _before(self, turn: int) -> str | None:
        """The text up to where the turn's own words begin, if the full text begins with it."""
        assistant = self.messages[turn]["role"] == "assistant"
        text = self.rendered(self.messages[:turn], prompt=assistant) if turn else None
        return text if text is not None and self.full.startswith(text) else None

    def _by_content(self, turn: int) -> Span | None:
        """Between what the template writes before and after a stand-in for the turn's content.

        Serves templates that rewrite history (drop thoughts, move the system prompt), and first turns. What stands there must be
        part of the content, else the template has changed it beyond recognition."""
        content = text_of(self.messages[turn])
        stand_in = [{"type": "text", "text": SENTINEL}] if isinstance(self.messages[turn].get("content"), list) else SENTINEL
        trial = self.rendered([{**m, "content": stand_in} if i == turn else m for i, m in enumerate(self.messages)])
        if trial is None or trial.count(SENTINEL) != 1:
            return None
        head, tail = trial.split(SENTINEL)
        full = self.full
        if len(head) + len(tail) > len(full) or not full.startswith(head) or not full.endswith(tail):
            return None
        start, end = len(head), len(full) - len(tail)
        kept = full[start:end].strip()
        if kept not in content:  # nothing may be left of it: a turn that was all thought
            return None
        before = self._before(turn)
        start = len(before) if before is not None and len(before) <= start else start
        return start, self._trimmed(start, self._ended(end))

    def _ended(self, end: int) -> int:
        """The end of a span, with the end-of-turn token that follows it, if one does."""
        rest = self.full[end:]
        space = len(rest) - len(rest.lstrip())
        return next((end + space + len(e) for e in self._ends if rest.startswith(e, space)), end)

    def _trimmed(self, start: int, end: int) -> int:
        """Without the white space that a template writes after the end-of-turn token: generation has stopped by then."""
        shorter = len(self.full[:end].rstrip())
        return shorter if shorter > start and self._ends and self.full[:shorter].endswith(self._ends) else end

    @cached_property
    def _ends(self) -> tuple[str, ...]:
        """What may end a turn: what this template writes after an answer, and the tokenizer's end of sequence."""
        trial = self.rendered([{"role": "user", "content": "a"}, {"role": "assistant", "content": SENTINEL}])
        tail = trial.partition(SENTINEL)[2].strip() if trial else ""
        specials = [t for t in self.tokenizer.all_special_tokens if t and tail.startswith(t)]
        found = {max(specials, key=len) if specials else tail, self.tokenizer.eos_token}
        return tuple(sorted((t for t in found if t), key=lambda t: (-len(t), t)))


def turns_to_learn(messages: SequenceOf[Message], train_on: str, first: int = 0) -> list[int]:
    """The indices of the turns that are supervised: assistant turns from `first` on, or the last; a message's own `train` decides."""
    assistants = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    chosen = {"assistant": assistants, "last": assistants[-1:], "completion": [i for i in assistants if i >= first]}[train_on]
    return [i for i, m in enumerate(messages) if m.get("train", i in chosen)]


