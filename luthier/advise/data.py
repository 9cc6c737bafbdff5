"""Looking at the rows themselves, without a model: how many, how often the same, the same question with another answer, which classes."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from luthier.core.dataset import BESIDE, Rows, row_digest
from luthier.core.preflight import EXAMINED
from luthier.core.rows import answer_of, preference_parts, prompt_turns
from luthier.core.signals import row_text

WORDS = re.compile(r"\w+|[^\w\s]")
ALIKE = 0.8
"""From this overlap of three-word pieces on (Jaccard) two texts count as nearly the same."""
BANDS, DEPTH, COMPARED = 8, 4, 8
"""Of the MinHash search: a pair of overlap 0.8 is missed once in seventy; in a bucket only the first few are compared."""
TEXTUAL = ("prompt-completion", "messages", "preference", "pairs", "text-label", "image-text", "text", "prompt")


@dataclass(frozen=True)
class Signal:
    """One thing that was measured, as a number and as a sentence."""

    name: str
    said: str
    value: float | None = None
    """None: not measured; `said` tells why."""
    facts: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"value": self.value, "said": self.said, **self.facts}


def not_measured(name: str, why: str) -> Signal:
    return Signal(name, f"not measured: {why.rstrip('.')}")


def percent(share: float) -> str:
    """A share for people: one decimal where it is small."""
    if 0 < share < 0.0005:
        return "under 0.1 %"
    return f"{100 * share:.0f} %" if share >= 0.1 or share == 0 else f"{100 * share:.1f} %"


def drawn(rows: Rows, most: int) -> Rows:
    """All rows, or a sample of so many that is always the same one."""
    if len(rows) <= most:
        return rows
    return rows.take(np.sort(np.random.default_rng(0).choice(len(rows), most, replace=False)))


def of_all(part: Rows, rows: Rows) -> str:
    """What was examined, where it was not everything."""
    return "" if len(part) == len(rows) else f" ({len(part):,} of {len(rows):,} rows were examined, always the same ones)"


def look(rows: Rows) -> list[Signal]:
    """All that the rows alone tell."""
    return [size(rows), repeats(rows), near_repeats(rows), conflicts(rows), classes(rows)]


def size(rows: Rows) -> Signal:
    aside = f"; {len(rows.aside):,} bad ones were set aside" if rows.aside else ""
    return Signal("rows", f"{len(rows):,} of the kind {rows.kind}, from {rows.source}{aside}", float(len(rows)), {"kind": rows.kind, "aside": len(rows.aside)})


def repeats(rows: Rows) -> Signal:
    first: dict[bytes, int] = {}
    again = [i for i, content in enumerate(rows.contents()) if first.setdefault(content, i) != i]
    share = len(again) / len(rows)
    return Signal("repeats", f"{percent(share)} of the rows repeat an earlier one exactly{examples(rows, again)}", share)


def examples(rows: Rows, places: Sequence[int], most: int = 5) -> str:
    """Where to look, by the rows' numbers in their source."""
    if not len(places):
        return ""
    return f" (such as row{'s' if len(places) > 1 else ''} {', '.join(str(int(rows.ids[i]) + 1) for i in places[:most])})"


# -- nearly the same -----------------------------------------------------------------------------------------------------------


def near_repeats(rows: Rows) -> Signal:
    """The share of different texts that nearly repeat another one."""
    if rows.kind not in TEXTUAL:
        return not_measured("near repeats", f"rows of the kind {rows.kind} hold no text to compare")
    part = drawn(rows, EXAMINED)
    texts = [row_text(r) for r in part]
    kept = list({text: i for i, text in reversed(list(enumerate(texts)))}.values())[::-1]
    found = near([pieces(texts[i]) for i in kept])
    share = len(found) / len(part)
    more = "" if len(part) == len(rows) else "; of all rows it may be more"
    return Signal("near repeats", f"{percent(share)} of the rows nearly repeat another one{examples(part, [kept[i] for i in sorted(found)])}{of_all(part, rows)}{more}", share)


def pieces(text: str, words: int = 3) -> frozenset[int]:
    """Hashes of a text's runs of three words, case and spaces aside; of a shorter text the whole."""
    found = WORDS.findall(text.lower())
    runs = [found[i : i + words] for i in range(len(found) - words + 1)] or ([found] if found else [])
    return frozenset(zlib.crc32(" ".join(run).encode()) for run in runs)


def near(sets: Sequence[frozenset[int]], least: float = ALIKE) -> dict[int, int]:
    """Sets that overlap another one by at least `least`, each with such another. Only sets that share a band of their MinHash
    signatures are compared, so this is near-linear."""
    signatures = np.ascontiguousarray(_minhash(sets).reshape(len(sets), BANDS, DEPTH))
    found: dict[int, int] = {}
    for band in range(BANDS):
        buckets: dict[bytes, list[int]] = {}
        for i, one in enumerate(sets):
            if not one:
                continue
            others = buckets.setdefault(signatures[i, band].tobytes(), [])
            twin = next((j for j in others[:COMPARED] if len(one & sets[j]) >= least * len(one | sets[j])), None)
            if twin is not None:
                found.setdefault(i, twin)
                found.setdefault(twin, i)
            others.append(i)
    return found


def _minhash(sets: Sequence[frozenset[int]]) -> np.ndarray:
    """[sets, BANDS * DEPTH] least values of random hashes of each set's members (multiply, add, keep the high bits)."""
    rng = np.random.default_rng(0)
    factor = rng.integers(1, 2**63, BANDS * DEPTH, dtype=np.uint64) | np.uint64(1)
    offset = rng.integers(0, 2**63, BANDS * DEPTH, dtype=np.uint64)
    out = np.zeros((len(sets), BANDS * DEPTH), np.uint32)
    for i, one in enumerate(sets):
        if one:
            members = np.fromiter(one, np.uint64, len(one))
            out[i] = ((members[:, None] * factor + offset) >> np.uint64(32)).min(0)
    return out


# -- the same question, another answer -------------------------------------------------------------------------------------------


def conflicts(rows: Rows) -> Signal:
    """The share of rows whose question occurs again with another answer; of preferences, with the other one preferred."""
    parts = [_question_and_answer(row, rows.kind) for row in rows]
    if not len(parts) or parts[0] is None:
        return not_measured("conflicting answers", f"rows of the kind {rows.kind} have no single right answer")
    asked: dict[bytes, set[Hashable]] = {}
    known = [(row_digest({"question": q}) if not isinstance(q, dict) else row_digest(q), a) for q, a in parts]  # type: ignore[misc]
    for question, answer in known:
        asked.setdefault(question, set()).add(answer)
    found = [i for i, (question, _) in enumerate(known) if len(asked[question]) > 1]
    share = len(found) / len(rows)
    what = "the other one preferred" if rows.kind == "preference" else "another answer"
    return Signal("conflicting answers", f"{percent(share)} of the rows repeat another's question with {what}{examples(rows, found)}", share)


def _question_and_answer(row: dict[str, Any], kind: str) -> tuple[Any, Hashable] | None:
    if kind.endswith("-label"):
        return {k: v for k, v in row.items() if k not in BESIDE and k != "label"}, str(row["label"])
    if kind == "preference":
        prompt, *answers = (row_digest({"part": part}) for part in preference_parts(row))
        return [prompt.hex(), *sorted(a.hex() for a in answers)], answers[0]
    if kind in ("prompt-completion", "messages"):
        return prompt_turns(row), (answer_of(row) or "").strip()
    return None


def classes(rows: Rows) -> Signal:
    """How many classes there are, and how unequal."""
    labels = [str(row["label"]) for row in rows if isinstance(row.get("label"), (str, int, np.integer))]
    if not rows.kind.endswith("-label") or not labels:
        return not_measured("classes", "the rows have no class labels")
    counts = Counter(labels).most_common()
    (large, most), (rare, least) = counts[0], counts[-1]
    said = f"{len(counts)} classes; the largest ({large!r}) has {percent(most / len(labels))} of the rows, the rarest ({rare!r}) {least} row{'s' if least > 1 else ''}"
    return Signal("classes", said, float(len(counts)), {"largest": most / len(labels), "rarest": least})
