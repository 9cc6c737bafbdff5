"""Rows to token sequences: what the model reads, and which of its tokens it learns.

prompt + completion of strings: with a chat template a user turn and an assistant turn; without one, or with `plain: true` in the row,
one text that ends with the end-of-sequence token. messages: one rendering of the template. A `system` column comes first as a system
turn. preference: two sequences, `chosen` and `rejected`, whose prompt tokens are the same. pairs: `anchor`, `positive`, `negative`.
`train_on` says what is supervised: "completion" (the answer; of a conversation every assistant turn), "assistant" (every assistant
turn, also those inside a prompt), "last" (the last one), "all" (every token). A message's own `train: true|false` overrides it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from itertools import count
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np

from luthier.core.batch import Sequence
from luthier.core.chat import Conversation, edges, has_template, plain_ids, text_of, tokenise, turns_to_learn
from luthier.core.columns import kind_of, preference_parts
from luthier.core.dataset import Aside, Rows, row_digest
from luthier.core.shorten import without_beginning, without_end
from luthier.errors import DataError, RecipeError, nearest

TRAIN_ON = ("completion", "assistant", "last", "all")
TooLong = Literal["stop", "skip", "cut"]
Made = list[tuple[str, np.ndarray, np.ndarray]]
"""(branch, ids, mask) of every sequence of a row."""


def encode(
    example: Mapping[str, Any],
    tokenizer: Any,
    train_on: str = "completion",
    row: int = 0,
    max_length: int | None = None,
    too_long: TooLong = "stop",
    where: str | None = None,
) -> list[Sequence]:
    """The token sequences of one row; `row` is its index in the batch, `where` its name in messages.

    A row longer than `max_length` tokens is refused, or with `too_long="cut"` loses the beginning of its prompt; its answer is never cut.
    A row may carry its own `max_length`, to which it is cut (`fit_lengths` writes it). What was encoded lately is remembered."""
    if train_on not in TRAIN_ON:
        raise RecipeError(f"train_on is '{train_on}', but must be one of {', '.join(TRAIN_ON)}.{nearest(str(train_on), TRAIN_ON)}")
    where = where or f"row {row}"
    memory = _memory(tokenizer)
    key = (train_on, max_length, too_long, _key(example))
    made = memory.pop(key, None)
    if made is None:
        made = _encode(example, tokenizer, train_on, max_length, too_long, where)
    if sum(len(ids) for _, ids, _ in made) <= LONGEST_REMEMBERED:
        memory[key] = made  # the youngest is last
        while len(memory) > REMEMBERED:
            del memory[next(iter(memory))]
    return [Sequence(ids.copy(), mask.copy(), row=row, branch=branch) for branch, ids, mask in made]


def _encode(example: Mapping[str, Any], tokenizer: Any, train_on: str, max_length: int | None, too_long: TooLong, where: str) -> Made:
    kind = kind_of(example)
    if kind not in ENCODERS:
        raise DataError(f"In {where} there is no text that this model could read; its columns are {', '.join(map(str, example))}.")
    made = ENCODERS[kind](example, tokenizer, train_on, where)
    if max_length is None and example.get("max_length") is not None:
        max_length, too_long = int(example["max_length"]), "cut"
    longest = max(len(ids) for _, ids, _ in made)
    if max_length is None or longest <= max_length:
        return made
    if too_long != "cut":
        raise DataError(f"In {where} there are {longest} tokens, more than max_length = {max_length}.")
    if kind in ("text", "text-label", "image-text", "pairs"):
        return [(branch, *without_end(ids, mask, max_length, tokenizer)) for branch, ids, mask in made]
    answers = made if train_on != "all" else ENCODERS[kind](example, tokenizer, "completion", where)
    room = min(int(np.argmax(mask)) if mask.any() else len(mask) for _, _, mask in answers)
    return [(branch, *without_beginning(ids, mask, longest - max_length, room, tokenizer, where)) for branch, ids, mask in made]


# -- what was encoded lately -------------------------------------------------------------------------------------------------

REMEMBERED, LONGEST_REMEMBERED = 20_000, 1024
"""So many rows of at most so many tokens are not tokenised again in the next epoch."""
READ = (
    "messages", "prompt", "completion", "chosen", "rejected", "text", "text_pair", "anchor", "positive", "system", "plain", "tools",
    "chat_template_kwargs", "max_length",
)  # fmt: skip
_memories: dict[Any, dict[Any, Made]] = {}
"""By what the tokenizer is, so that a model loaded again goes on with what was encoded before; the two used last are kept."""
_contents: WeakKeyDictionary[Any, tuple[Any, Any]] = WeakKeyDictionary()
_numbers = count()


def _memory(tokenizer: Any) -> dict[Any, Made]:
    """What this tokenizer, or one just like it, encoded. Another template or vocabulary has a memory of its own."""
    state = (str(tokenizer.chat_template), len(tokenizer), tokenizer.eos_token_id, tokenizer.bos_token_id, getattr(tokenizer, "add_bos_token", None))
    known = _contents.get(tokenizer)
    if known is None or known[0] != state:
        known = _contents[tokenizer] = (state, (*state, _content(tokenizer)))
    memory = _memories.pop(known[1], None)
    _memories[known[1]] = memory = {} if memory is None else memory
    while len(_memories) > 2:
        del _memories[next(iter(_memories))]
    return memory


def _content(tokenizer: Any) -> Any:
    """All that a tokenizer of the tokenizers library does, as one digest; of any other kind each is different."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return next(_numbers) if backend is None else hashlib.sha256(backend.to_str().encode()).digest()


def _key(example: Mapping[str, Any]) -> tuple[Any, ...]:
    """All that `encode` reads of a row."""
    found = [(c, example[c]) for c in READ if c in example] + [("label" in example, "image" in example, "audio" in example)]
    found += [("negative", text) for text in negatives_of(example)] if "anchor" in example else []
    return tuple((c, *v) if not v or isinstance(v[0], (str, bool, int)) else (c, row_digest({"v": v[0]})) for c, *v in found)


# -- answers to prompts -----------------------------------------------------------------------------------------------------


def is_plain(example: Mapping[str, Any], tokenizer: Any) -> bool:
    """Whether the row is text as it stands and not a conversation: strings only, and no template, or `plain: true`."""
    texts = all(isinstance(example[c], str) for c in ("prompt", "completion", "chosen", "rejected") if c in example)
    implicit = "chosen" in example and "prompt" not in example
    return "messages" not in example and texts and (bool(example.get("plain")) or implicit or not has_template(tokenizer))


def prompt_turns(example: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The turns before the answer."""
    if "messages" in example:
        turns = list(example["messages"])
        last = max((i for i, m in enumerate(turns) if m["role"] == "assistant"), default=len(turns))
        turns = turns[:last]
    else:
        prompt = preference_parts(example)[0] if "chosen" in example else example.get("prompt", "")
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return _with_system(example, turns)


def _with_system(example: Mapping[str, Any], turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    system = example.get("system")
    if not system or (turns and turns[0]["role"] == "system"):
        return turns
    return [{"role": "system", "content": system}, *turns]


def _answer_turns(answer: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": answer}] if isinstance(answer, str) else list(answer)


def _plain_prompt(example: Mapping[str, Any]) -> str:
    prompt = preference_parts(example)[0] if "chosen" in example else example.get("prompt", "")
    system = example.get("system")
    return f"{system}\n\n{prompt}" if system else str(prompt)


def _completion(example: Mapping[str, Any], tokenizer: Any, train_on: str, where: str) -> Made:
    if is_plain(example, tokenizer):
        return [("completion", *_plain(_plain_prompt(example), example["completion"], tokenizer, train_on))]
    prompt = prompt_turns(example)
    return [("completion", *_chat(prompt + _answer_turns(example["completion"]), len(prompt), example, tokenizer, train_on, where))]


def _messages(example: Mapping[str, Any], tokenizer: Any, train_on: str, where: str) -> Made:
    turns = _with_system(example, list(example["messages"]))
    return [("completion", *_chat(turns, 0, example, tokenizer, train_on, where))]


def _chat(turns: SequenceOf[Mapping[str, Any]], first: int, example: Mapping[str, Any], tokenizer: Any, train_on: str, where: str) -> tuple[np.ndarray, np.ndarray]:
    talk = Conversation.of(turns, tokenizer, example, where)
    if train_on == "all":
        return talk.tokens.ids, np.ones(len(talk.tokens.ids), dtype=bool)
    return talk.tokens.ids, talk.mask(turns_to_learn(turns, train_on, first))


def _plain(prompt: str, completion: str, tokenizer: Any, train_on: str) -> tuple[np.ndarray, np.ndarray]:
    head, answer = _plain_parts(prompt, completion, tokenizer)
    lead, tail = _around(tokenizer, head if len(head) else answer, answer)
    ids = np.concatenate([lead, head, answer, tail])
    mask = np.zeros(len(ids), dtype=bool)
    mask[len(lead) + (0 if train_on == "all" else len(head)) :] = True
    return ids, mask


def _plain_parts(prompt: str, completion: str, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of prompt and completion, from one tokenisation of the joined text.

    For a tokenizer that knows words but not the spaces between them, joining "=" and "7" would make one word of two; there the
    parts are tokenised one by one, which is the same as joining them with a space."""
    joined = tokenise(prompt + completion, tokenizer)
    if prompt and not prompt[-1:].isspace() and not completion[:1].isspace():
        apart = plain_ids(tokenizer, prompt), plain_ids(tokenizer, completion)
        if np.array_equal(np.concatenate(apart), plain_ids(tokenizer, f"{prompt}  {completion}")):
            return apart
    at = joined.first(len(prompt))
    return joined.ids[:at], joined.ids[at:]


def _around(tokenizer: Any, begin: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The special tokens before a text and the end of sequence after it, unless the text has them already."""
    lead, tail = edges(tokenizer)
    if tokenizer.eos_token_id is not None:
        tail = np.array([tokenizer.eos_token_id], dtype=np.int64)
    if len(lead) and np.array_equal(begin[: len(lead)], lead):
        lead = lead[:0]
    return lead, tail[:0] if len(tail) and np.array_equal(end[-len(tail) :], tail) else tail


def _preference(example: Mapping[str, Any], tokenizer: Any, train_on: str, where: str) -> Made:
    _, *answers = preference_parts(example)
    train_on = "last" if train_on == "last" else "completion"
    if is_plain(example, tokenizer):
        text = _plain_prompt(example)
        parts = [_plain_parts(text, a, tokenizer) for a in answers]
        if not np.array_equal(parts[0][0], parts[1][0]):
            parts = [(plain_ids(tokenizer, text), plain_ids(tokenizer, a)) for a in answers]
        made = [_joined(*_around(tokenizer, h if len(h) else a, a), h, a) for h, a in parts]
    else:
        turns = prompt_turns(example)
        made = [_chat(turns + _answer_turns(a), len(turns), example, tokenizer, train_on, where) for a in answers]
        made = _same_prompt(made, turns, answers, example, tokenizer, where)
    return [(branch, ids, mask) for branch, (ids, mask) in zip(("chosen", "rejected"), made)]


def _joined(lead: np.ndarray, tail: np.ndarray, head: np.ndarray, answer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ids = np.concatenate([lead, head, answer, tail])
    return ids, np.arange(len(ids)) >= len(lead) + len(head)


def _same_prompt(made: list[Any], turns: list[dict[str, Any]], answers: list[Any], example: Mapping[str, Any], tokenizer: Any, where: str) -> list[Any]:
    """Both conversations with equal prompt tokens. Where a token crosses the boundary, prompt and answer are tokenised apart."""
    heads = [ids[: int(np.argmax(mask))] for ids, mask in made]
    if all(mask.any() for _, mask in made) and np.array_equal(*heads):
        return made
    rebuilt = []
    before = Conversation.of(turns, tokenizer, example, where).render(turns, prompt=True)
    for answer in answers:
        talk = Conversation.of(turns + _answer_turns(answer), tokenizer, example, where)
        if not talk.full.startswith(before):
            raise DataError(f"The chat template renders the prompt of {where} differently for the chosen and the rejected answer, so they cannot be compared.")
        end = max(e for _, e in talk.spans([len(talk.messages) - 1]))
        nothing = np.zeros(0, dtype=np.int64)
        rebuilt.append(_joined(nothing, nothing, plain_ids(tokenizer, before), plain_ids(tokenizer, talk.full[len(before) : end])))
    return rebuilt


# -- texts that nothing answers ---------------------------------------------------------------------------------------------


def _text(example: Mapping[str, Any], tokenizer: Any, train_on: str, where: str) -> Made:
    ids = plain_ids(tokenizer, example["text"])
    return [("completion", *_joined(*_around(tokenizer, ids, ids), ids[:0], ids))]


def _read(text: str, tokenizer: Any, pair: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """A text as the tokenizer gives it, special tokens included; nothing is supervised."""
    found = tokenizer(text, verbose=False) if pair is None else tokenizer(text, pair, verbose=False)
    ids = np.asarray(found["input_ids"], dtype=np.int64)
    return ids, np.zeros(len(ids), dtype=bool)


def _labelled(example: Mapping[str, Any], tokenizer: Any, train_on: str, where: str) -> Made:
    return [("text", *_read(example["text"], tokenizer, example.get("text_pair")))]


def _pairs(example: Mapping[str, Any], tokenizer: Any, train_on: str, where: str) -> Made:
    made = [(branch, *_read(example[branch], tokenizer)) for branch in ("anchor", "positive")]
    return made + [("negative", *_read(text, tokenizer)) for text in negatives_of(example)]


def negatives_of(example: Mapping[str, Any]) -> list[str]:
    """`negative` (a text or several), `negatives`, `negative_1` and so on."""
    found: list[str] = []
    for column in ("negative", "negatives", *sorted((c for c in example if str(c).startswith("negative_")), key=lambda c: (len(c), c))):
        value = example.get(column)
        found += [value] if isinstance(value, str) else list(value or [])
    return found


def _prompt(example: Mapping[str, Any], tokenizer: Any, train_on: str, where: str) -> Made:
    ids = prompt_ids({**example, "max_length": None}, tokenizer)
    return [("prompt", ids, np.zeros(len(ids), dtype=bool))]


ENCODERS: dict[str, Callable[[Mapping[str, Any], Any, str, str], Made]] = {
    "prompt-completion": _completion, "messages": _messages, "preference": _preference, "pairs": _pairs,
    "text": _text, "text-label": _labelled, "image-text": _labelled, "prompt": _prompt,
}  # fmt: skip


# -- what generation starts from, and what it should say ----------------------------------------------------------------------


def prompt_ids(example: Mapping[str, Any] | str, tokenizer: Any) -> np.ndarray:
    """The tokens that generation starts from; where the template allows it, the beginning of `encode`'s ids."""
    example = {"prompt": example} if isinstance(example, str) else example
    kind = kind_of(example)
    if kind in ("text", "text-label", "image-text", "pairs"):
        text = example["anchor" if kind == "pairs" else "text"]
        ids = plain_ids(tokenizer, text)
        ids = np.concatenate([_around(tokenizer, ids, ids)[0], ids])
    elif is_plain(example, tokenizer):
        ids = plain_ids(tokenizer, _plain_prompt(example))
        ids = np.concatenate([_around(tokenizer, ids, ids)[0], ids])
    else:
        turns = prompt_turns(example)
        ids = plain_ids(tokenizer, Conversation.of(turns, tokenizer, example).render([{k: v for k, v in m.items() if k != "train"} for m in turns], prompt=True))
    limit = example.get("max_length")
    if limit is None:
        return ids
    whole = len(ids) if kind in ("prompt", "other") else max(len(s) for s in encode({**example, "max_length": None}, tokenizer))
    return without_beginning(ids, ids, max(0, whole - int(limit)), len(ids), tokenizer)[0]


def answer_of(example: Mapping[str, Any]) -> str | None:
    """The gold answer's text, None if the row has none."""
    answer = example.get("completion", example.get("chosen", example.get("answer")))
    if "messages" in example:
        turns = [m for m in example["messages"] if m.get("role") == "assistant"]
        return text_of(turns[-1]) if turns else None
    if "chosen" in example and "completion" not in example:
        answer = preference_parts(example)[1] if "rejected" in example else answer
    if isinstance(answer, (list, tuple)):
        turns = [m for m in answer if isinstance(m, Mapping) and m.get("role") == "assistant"]
        return text_of(turns[-1]) if turns else None
    return answer if isinstance(answer, str) else None


def prompt_text(example: Mapping[str, Any]) -> str:
    """The prompt as a person reads it: the text itself, or the turns before the answer with their roles."""
    for column in ("prompt", "anchor", "text"):
        if isinstance(example.get(column), str) and "messages" not in example:
            return example[column]
    if not {"messages", "prompt", "chosen"} & set(example):
        return ""
    if "chosen" in example and isinstance(example["chosen"], str) and "prompt" not in example:
        return str(preference_parts(example)[0])
    turns = prompt_turns(example)
    return text_of(turns[0]) if len(turns) == 1 else "\n".join(f"{m['role']}: {text_of(m)}" for m in turns)


# -- length ------------------------------------------------------------------------------------------------------------------


def lengths(rows: Iterable[Mapping[str, Any]], tokenizer: Any, train_on: str = "completion") -> np.ndarray:
    """For every row the tokens of its longest sequence."""
    rows = Rows.of(rows)
    return np.array([max(len(s) for s in encode(r, tokenizer, train_on, where=rows.where(i))) for i, r in enumerate(rows)], dtype=np.int64)


def fit_lengths(rows: Any, tokenizer: Any, max_length: int, too_long: TooLong = "stop", train_on: str = "completion") -> Rows:
    """The rows of at most `max_length` tokens. Longer ones are refused ("stop"), set aside and counted ("skip"), or marked to be cut
    ("cut": the prompt loses its beginning, the answer stays whole; refused where the answer alone is too long)."""
    if too_long not in ("stop", "skip", "cut"):
        raise RecipeError(f"too_long is '{too_long}', but must be stop, skip or cut.{nearest(str(too_long), ('stop', 'skip', 'cut'))}")
    rows = Rows.of(rows)
    sizes = lengths(rows, tokenizer, train_on)
    over = np.flatnonzero(sizes > max_length)
    if not len(over):
        return rows
    longest = int(over[np.argmax(sizes[over])])
    what = f"{len(over)} of {len(rows)} rows are longer than {max_length} tokens; the longest is {rows.where(longest)} with {sizes[longest]}"
    if too_long == "stop":
        raise DataError(f"{what}. Set them aside with `data: {{too_long: skip}}`, cut the beginning of their prompts with `cut`, or raise max_length.")
    if too_long == "skip":
        kept = rows.take(np.flatnonzero(sizes <= max_length))
        if not len(kept):
            raise DataError(f"{what}, so no rows are left; raise max_length.")
        kept.aside = [*rows.aside, *(Aside(rows.where(i), f"{sizes[i]} tokens are more than {max_length}") for i in over.tolist())]
        kept.notices = [*rows.notices, f"{what}; they were set aside."]
        return kept
    marked = [{**r, "max_length": max_length} if sizes[i] > max_length else r for i, r in enumerate(rows)]
    for i in over.tolist():
        encode(marked[i], tokenizer, train_on, where=rows.where(i))  # raises where the answer alone is too long
    return Rows(marked, rows.ids, rows.name, rows.source, rows.kind, rows.aside, [*rows.notices, f"{what}; their prompts lose the beginning."])
