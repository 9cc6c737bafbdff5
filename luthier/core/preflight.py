"""Before training: what the model will learn from a row, token by token; what would go wrong; what the run will cost.

The commonest silent faults of fine-tuning are found here: a mask that is off by a turn, an end-of-turn token that is never learned (the
model does not stop) or that generation does not stop at, rows longer than the model reads, rows that are empty after templating.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.core import ranks
from luthier.core.batch import Sequence
from luthier.core.dataset import Rows
from luthier.core.encode import TooLong, answer_of, encode, fit_lengths, prompt_ids
from luthier.core.estimate import Estimate, estimate, low_rank_size
from luthier.errors import DataError

if TYPE_CHECKING:
    from luthier.core.families import Family

__all__ = ["Estimate", "Preflight", "Token", "before_training", "estimate", "preflight"]

EXAMINED = 20_000
"""Larger data sets are examined in a sample of this size."""
SHOWN = 48
"""Tokens of a row in the table; the middle of a longer row is left out."""
GREEN, DIM, PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[0m"
WITH_ANSWERS = ("prompt-completion", "messages", "preference", "text")


@dataclass(frozen=True)
class Token:
    """One line of the table."""

    position: int
    id: int
    text: str
    learned: bool


@dataclass
class Preflight:
    """What was found. `rows` are the given ones, without or with marks on those that are too long."""

    rows: Rows
    table: list[Token] = field(default_factory=list)
    """The first row as the model sees it."""
    notices: list[str] = field(default_factory=list)
    examined: int = 0
    tokens: float = 0.0
    """Mean tokens a row, all its sequences together."""
    learned: float = 0.0
    """Mean supervised tokens a row."""
    longest: int = 0
    where_longest: str = ""

    def lines(self, colour: bool = False, most: int = SHOWN, table: bool = True) -> list[str]:
        """The table and the notices, for a terminal or as plain text."""
        facts = []
        if self.examined:
            part = "" if self.examined == len(self.rows) else f" (examined: {self.examined})"
            facts = [f"{len(self.rows)} rows{part}, {self.tokens:.0f} tokens a row, {self.learned:.0f} of them learned; the longest is {self.where_longest} with {self.longest}."]
        return facts + (table_lines(self.table, colour, most) if table else []) + self.notices


def preflight(
    rows: Any, family: Family, train_on: str = "completion", max_length: int | None = None, too_long: TooLong = "stop", row: int = 0
) -> Preflight:
    """Look at rows as `family` will read them. Raises DataError, naming the row, where training would be wrong; tells the rest.

    max_length: None takes the model's own limit. too_long: what becomes of longer rows (see `fit_lengths`); the result's `rows`
    are to be trained on. `row` is the one that the table shows. Models that are given no token sequences are not examined."""
    rows = Rows.of(rows)
    found = Preflight(rows)
    if not len(rows):
        raise DataError(f"{rows.source} holds no rows.")
    tokenizer = getattr(family, "tokenizer", None)
    if "score" not in family.verbs or tokenizer is None or rows.kind == "other" or rows.kind.startswith(("image-label", "audio")):
        return found
    limit = max_length or positions(family)
    if limit is not None:
        rows = found.rows = fit_lengths(rows, tokenizer, limit, too_long, train_on) if len(rows) <= EXAMINED else _fit_sample(rows, tokenizer, limit, too_long, train_on)
        found.notices += [n for n in rows.notices if "tokens" in n]
    sequences = _examine(found, tokenizer, train_on)
    shown = sequences[min(row, len(sequences) - 1)]
    found.table = table(shown[0], tokenizer)
    if rows.kind in WITH_ANSWERS:
        _check_learned(found, sequences, tokenizer, train_on)
        _check_ends(found, sequences, family, tokenizer)
        _check_start(found, tokenizer, sequences)
    _check_unknown(found, sequences, tokenizer)
    return found


def positions(family: Family) -> int | None:
    """The most tokens that the model reads, None if it has no limit."""
    config = family.config
    config = getattr(config, "text_config", None) or config
    known = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    sizes = [int(n) for n in known if isinstance(n, int) and 0 < n < 10**9]
    return min(sizes) if sizes else None


# -- what is examined ----------------------------------------------------------------------------------------------------------


def _sample(rows: Rows) -> np.ndarray:
    """All rows, or a fixed sample of them that holds the longest texts."""
    if len(rows) <= EXAMINED:
        return np.arange(len(rows))
    size = np.array([sum(len(v) if isinstance(v, str) else len(str(v)) for k, v in r.items() if k not in ("image", "audio", "meta")) for r in rows])
    drawn = np.random.default_rng(0).choice(len(rows), EXAMINED - 500, replace=False)
    return np.unique(np.concatenate([[0], drawn, np.argsort(-size, kind="stable")[:499]]))


def _fit_sample(rows: Rows, tokenizer: Any, limit: int, too_long: TooLong, train_on: str) -> Rows:
    """Nothing is tokenised twice before training where the sample, which holds the longest texts, shows that all rows fit."""
    try:
        fit_lengths(rows.take(_sample(rows)), tokenizer, limit, "stop", train_on)
    except DataError:
        return fit_lengths(rows, tokenizer, limit, too_long, train_on)
    return rows


def _examine(found: Preflight, tokenizer: Any, train_on: str) -> list[list[Sequence]]:
    """The sequences of the examined rows, and how long they are."""
    rows = found.rows
    chosen = _sample(rows)
    found.examined = len(chosen)
    made = [encode(rows[int(i)], tokenizer, train_on, row=int(i), where=rows.where(int(i))) for i in chosen]
    longest = [max(len(s) for s in m) for m in made]
    at = int(np.argmax(longest))
    found.longest, found.where_longest = longest[at], rows.where(int(chosen[at]))
    found.tokens = float(np.mean([sum(len(s) for s in m) for m in made]))
    found.learned = float(np.mean([sum(len(s.supervised) for s in m) for m in made]))
    return made


def _check_learned(found: Preflight, sequences: list[list[Sequence]], tokenizer: Any, train_on: str) -> None:
    """Every row teaches something, and what it teaches holds its gold answer."""
    spelt = tokenizer.batch_decode([made[0].ids[made[0].mask].tolist() for made in sequences])
    for made, learned in zip(sequences, spelt):
        row, where = found.rows[made[0].row], found.rows.where(made[0].row)
        empty = next((s for s in made if not len(s.supervised)), None)
        if empty is not None:
            raise DataError(f"In {where} nothing is learned: after templating, no token of its {empty.branch} is supervised (train_on: {train_on}).")
        answer = answer_of(row)
        if answer and found.rows.kind != "text" and not _holds(learned, answer, tokenizer) and not _untrained(row):
            raise DataError(f"In {where} the chat template and the mask disagree: the answer {answer[:60]!r} is not among what is learned, {learned[:120]!r}.")


def _untrained(row: Mapping[str, Any]) -> bool:
    """The last answer is left out on purpose, by its own `train: false`."""
    turns = [m for m in row.get("messages", ()) if m.get("role") == "assistant"]
    return bool(turns) and turns[-1].get("train") is False


def _holds(learned: str, answer: str, tokenizer: Any) -> bool:
    """Whether what is learned spells the answer, as far as the tokenizer can spell it and the template keeps it."""
    learned, kept = "".join(learned.split()), [answer, answer.rpartition("</think>")[2]]
    if any("".join(t.split()) in learned for t in kept):
        return True
    spelt = (tokenizer.decode(tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"]) for t in kept)
    return any("".join(t.split()) in learned for t in spelt)


def _check_ends(found: Preflight, sequences: list[list[Sequence]], family: Family, tokenizer: Any) -> None:
    """The answer's last learned token is one at which generation stops."""
    if not hasattr(family, "end_ids"):
        return
    ends = set(family.end_ids())
    missed: dict[int, list[int]] = {}
    for made in sequences:
        learned = made[0].ids[made[0].mask]
        if ends.isdisjoint(learned[-3:].tolist()):  # where all is learned, a template's line end may follow
            missed.setdefault(int(learned[-1]), []).append(made[0].row)
    if not missed:
        return
    last, some = max(missed.items(), key=lambda item: len(item[1]))
    number = sum(map(len, missed.values()))
    which = f"{number} of {len(sequences)} rows" if number < len(sequences) else "Every row"
    stops = ", ".join(repr(tokenizer.decode([e])) for e in sorted(ends)) or "no token at all"
    text = tokenizer.decode([last])
    if last in tokenizer.all_special_ids:
        remedy = f"Add its id {last} to the generation config's eos_token_id, else the tuned model talks on after its answer."
    else:
        remedy = "The model will not learn to end its answers: use a chat template that writes the end token after each answer, or set the tokenizer's eos_token."
    found.notices.append(f"{which} (such as {found.rows.where(some[0])}) end{'s' if which == 'Every row' else ''} the answer with {text!r}, but generation stops only at {stops}. {remedy}")


def _check_start(found: Preflight, tokenizer: Any, sequences: list[list[Sequence]]) -> None:
    """Generation starts from the tokens that precede the answer in training."""
    if found.rows.kind == "text":
        return
    off = [m for m in sequences[:200] if not np.array_equal((head := prompt_ids(found.rows[m[0].row], tokenizer)), m[0].ids[: len(head)])]
    if off:
        found.notices.append(
            f"In {len(off)} of the first {len(sequences[:200])} rows (such as {found.rows.where(off[0][0].row)}) generation starts from other tokens than training did: "
            "the template writes a generation prompt that its own answers do not begin with, or prompt and answer share a token."
        )


def _check_unknown(found: Preflight, sequences: list[list[Sequence]], tokenizer: Any) -> None:
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown == tokenizer.eos_token_id:
        return
    share = np.mean([float(np.mean(s.ids == unknown)) for made in sequences for s in made if len(s)])
    if share > 0.01:
        found.notices.append(f"{share:.0%} of the tokens are unknown to the tokenizer ({tokenizer.unk_token}); the model cannot read these texts well.")


# -- telling -----------------------------------------------------------------------------------------------------------------


def table(sequence: Sequence, tokenizer: Any) -> list[Token]:
    """One sequence token by token. `learned`: this token is predicted from those before it."""
    learned = set(sequence.supervised.tolist())
    return [Token(i, int(t), tokenizer.decode([int(t)]), i in learned) for i, t in enumerate(sequence.ids)]


def table_lines(tokens: list[Token], colour: bool = False, most: int = SHOWN) -> list[str]:
    """A line a token: position, id, text, and whether it is learned. Text is escaped, so data cannot command the terminal."""
    if not tokens:
        return []
    lines = ["what the model reads in one row (+ is learned):"]
    left_out = _left_out(tokens, most)
    for token in tokens:
        if token.position == left_out.start and len(left_out):
            lines.append(f"         ... {len(left_out)} more ...")
        if token.position in left_out:
            continue
        line = f"{token.position:>5} {token.id:>7} {'+' if token.learned else ' '} {_escaped(token.text)}"
        lines.append(f"{GREEN if token.learned else DIM}{line}{PLAIN}" if colour else line)
    return lines


def running_text(tokens: list[Token], colour: bool = False) -> list[str]:
    """The row as running text, what is learned between >> and <<."""
    if not tokens:
        return []
    parts, learning = [], False
    for token in tokens:
        if token.learned != learning:
            learning = token.learned
            parts.append((f"{GREEN}>>" if learning else f"<<{PLAIN}") if colour else (">>" if learning else "<<"))
        parts.append("".join(c if c.isprintable() else "\\n" if c == "\n" else repr(c)[1:-1] for c in token.text))
    parts.append("" if not learning else f"<<{PLAIN}" if colour else "<<")
    return ["One row as the model reads it, >>what is learned<< marked:", "  " + "".join(parts)]


def _left_out(tokens: list[Token], most: int) -> range:
    """The middle of the stretch before the first learned token, else the middle of all."""
    surplus = len(tokens) - most
    if surplus <= 0:
        return range(0)
    first = next((t.position for t in tokens if t.learned), len(tokens))
    if first > surplus + 8:
        return range(4, 4 + surplus)
    return range(most - most // 4, len(tokens) - most // 4)


def _escaped(text: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text) if text.strip() else repr(text)


def before_training(start: Any, rows: Any, recipe: Any) -> list[str]:
    """What a run says before it trains. `start` is a model or its spec, `recipe` says how rows are read and how long it trains."""
    if rows is None or not len(rows):
        return []
    from luthier.core.models import load
    from luthier.select import budget_of

    family = start if hasattr(start, "network") else load(start, device=recipe.train.device)
    data, train = recipe.data, recipe.train
    found = preflight(rows, family, data.train_on, data.max_length, getattr(data, "too_long", "stop"))
    learned_from = budget_of(recipe.budget, len(found.rows)) if recipe.select else len(found.rows)
    steps = train.steps or max(1, round(-(-learned_from // train.batch) * train.epochs))
    rank = next((r for c in recipe.adapt if isinstance(r := c.options.get("rank", getattr(c.build(), "rank", None)), int)), None)
    cost = estimate(
        family, found.rows, train.batch, steps, low_rank_size(family, rank) if rank else None, tokens_per_micro_batch=train.tokens_per_micro_batch,
        tokens_per_row=found.tokens * _computed_share(family, found.rows, train, data.train_on) or None, checkpointing=train.gradient_checkpointing,
    )  # fmt: skip
    cost = cost.over(ranks.launched(), ranks.mode(train.parallel, ranks.launched()) == "fsdp")
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return [*found.lines(colour, table=False), *running_text(found.table, colour), *cost.sentences]


def _computed_share(family: Family, rows: Rows, train: Any, train_on: str) -> float:
    """The share of a batch's tokens that is computed: rows that begin alike share their beginning."""
    if not hasattr(family, "forest"):
        return 1.0
    batch = family.collate([rows[i] for i in range(min(len(rows), train.batch))], train_on=train_on)
    parts = batch.split(train.tokens_per_micro_batch, share=family.shares)
    total = sum(len(s) for s in batch.sequences)
    return 1 - sum(family.forest(p.sequences).shared for p in parts if p.sequences) / total if total else 1.0
