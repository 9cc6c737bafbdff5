"""What synthesizers share: minimal edits of texts, and rows as plain lists."""

from __future__ import annotations

import re
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any


def mentions(text: str, entity: str) -> bool:
    """Whether the entity stands in the text as whole words, whatever the case."""
    return re.search(_pattern(entity), text, re.IGNORECASE) is not None


def swap(text: str, old: str, new: str) -> str:
    """Every mention of `old`, as whole words, becomes `new`; nothing else changes."""
    return re.sub(_pattern(old), lambda _: new, text, flags=re.IGNORECASE)


def _pattern(entity: str) -> str:
    return rf"(?<!\w){re.escape(entity.strip())}(?!\w)"


def replacement(answer: str, pool: SequenceOf[str], forbidden: SequenceOf[str], rng: Any) -> str | None:
    """Another entity of the pool: not the answer, none of `forbidden`, neither containing the answer nor contained in it."""
    taken = [answer.casefold(), *(f.casefold() for f in forbidden)]
    free = sorted({p for p in pool if p.strip() and not any(p.casefold() in t or t in p.casefold() for t in taken)})
    return str(rng.choice(free)) if free else None


def listed(rows: Any) -> list[dict[str, Any]]:
    """Rows as fresh dicts."""
    return [dict(r) for r in rows]


def need(row: Mapping[str, Any], columns: SequenceOf[str], who: str, index: int) -> None:
    from luthier.errors import DataError

    missing = [c for c in columns if c not in row]
    if missing:
        raise DataError(f"{who} needs the column '{missing[0]}', which row {index} lacks; it has {', '.join(sorted(row))}.")
