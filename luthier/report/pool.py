"""The training rows at a glance: a map of them with what was learned from, what occurs twice, and what looks wrong."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from luthier.core.dataset import Rows, row_digest
from luthier.core.encode import answer_of, prompt_text

SHOWN, EXAMINED, LISTED = 1200, 100_000, 30
"""Dots on the map; rows that are looked at for duplicates and contradictions; suspicious rows in the list."""
ALIKE = 0.95
"""Two texts are near-duplicates from this cosine of their TF-IDF vectors on."""


def pool(given: Rows, learned: Rows, changed: bool = False, why: dict[int, float] | None = None, seed: int = 0) -> dict[str, Any]:
    """What the report shows of the `given` rows, of which those in `learned` were trained on.

    Rows of more than one method's making are known by their content (`changed`), else by their ids. `why` holds a selector's score
    of the row at a position. Large data is looked at in a fixed sample, of which half was learned from where there are as many."""
    taken = _taken(given, learned, changed)
    examined = given.take(range(min(len(given), EXAMINED)))
    suspects = _suspicious(examined)
    places = _sample(taken, np.random.default_rng(seed))
    shown = given.take(places.tolist())
    vectors = _vectors(shown)
    near, where = (_near(vectors), _plane(vectors)) if vectors is not None else (np.zeros(len(shown), bool), None)
    digests = Counter(examined.contents()) if given.kind != "other" else Counter()
    return {
        "rows": len(given), "examined": len(examined), "learned": len(learned), "taken": int(taken.sum()), "shown": len(shown), "sampled": len(shown) < len(given),
        "repeated": sum(n - 1 for n in digests.values()), "near": int(near.sum()), "aside": [{"where": a.where, "reason": a.reason} for a in given.aside[:LISTED]],
        "set_aside": len(given.aside), "suspicious": len(suspects), "suspects": [{"where": given.where(i), "reason": r, "text": _text(given[i])[:300]} for i, r in list(suspects.items())[:LISTED]],
        "points": [] if where is None else [
            {"x": round(float(x), 4), "y": round(float(y), 4), "taken": bool(taken[i]), "near": bool(n), "suspect": int(i) in suspects, "why": (why or {}).get(int(i)), "text": _text(given[int(i)])[:90]}
            for i, (x, y), n in zip(places, where, near)
        ],
    }  # fmt: skip


def _taken(given: Rows, learned: Rows, changed: bool) -> np.ndarray:
    if not changed:
        return np.isin(given.ids, learned.ids)
    known = {row_digest(r) for r in learned}
    return np.array([row_digest(r) in known for r in given], bool)


def _sample(taken: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if len(taken) <= SHOWN:
        return np.arange(len(taken))
    inside, outside = np.flatnonzero(taken), np.flatnonzero(~taken)
    number = min(len(inside), max(SHOWN // 2, SHOWN - len(outside)))
    return np.sort(np.concatenate([rng.choice(inside, number, replace=False), rng.choice(outside, SHOWN - number, replace=False)]))


def _text(row: dict[str, Any]) -> str:
    said = prompt_text(row) or str(row.get("text", ""))
    answer = answer_of(row) if said else None
    label = row.get("label")
    return said + (f" → {answer}" if answer else f" → {label}" if label is not None else "")


def _vectors(rows: Rows) -> Any:
    """TF-IDF of the words of texts, or the pixels of pictures of one size; None where there is neither."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = [_text(r) for r in rows]
    if len(rows) < 3:
        return None
    if sum(map(bool, (t.strip(" →0123456789") for t in texts))) > len(texts) // 2:
        try:
            return TfidfVectorizer(token_pattern=r"(?u)\S+", sublinear_tf=True).fit_transform(t[:4000] for t in texts)
        except ValueError:  # no words at all
            return None
    pictures = [np.asarray(r["image"], dtype=np.float32) for r in rows if _is_picture(r.get("image"))]
    if len(pictures) < len(rows) or len({p.shape for p in pictures}) != 1:
        return None
    flat = np.stack([p.ravel() for p in pictures])
    return flat - flat.mean(0)


def _is_picture(value: Any) -> bool:
    return isinstance(value, np.ndarray) or (isinstance(value, list) and bool(value)) or hasattr(value, "convert")


def _plane(vectors: Any) -> np.ndarray:
    """The two directions along which the rows differ most."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.preprocessing import normalize

    if vectors.shape[1] < 3:
        dense = np.asarray(vectors.todense() if hasattr(vectors, "todense") else vectors)
        return np.pad(dense, ((0, 0), (0, max(0, 2 - dense.shape[1]))))[:, :2]
    found = TruncatedSVD(3, random_state=0).fit_transform(normalize(vectors))
    return np.asarray(found[:, 1:] if hasattr(vectors, "todense") else found[:, :2])  # words share one mean direction, pictures are centred


def _near(vectors: Any) -> np.ndarray:
    """Whether an earlier row is almost the same."""
    from sklearn.preprocessing import normalize

    unit = normalize(vectors)
    alike = unit @ unit.T
    alike = np.asarray(alike.todense() if hasattr(alike, "todense") else alike)
    return np.asarray((np.tril(alike, -1) >= ALIKE).any(1))


def _suspicious(rows: Rows) -> dict[int, str]:
    """Position and reason: other answers to the same prompt, no answer, an answer of unheard-of length."""
    found: dict[int, str] = {}
    answers = [answer_of(r) for r in rows]
    lengths = np.array([len(a) for a in answers if a])
    usual = float(np.median(lengths)) if len(lengths) else 0.0
    first: dict[str, tuple[int, str]] = {}
    for i, (row, answer) in enumerate(zip(rows, answers)):
        if "chosen" in row and "rejected" in row:
            if row["chosen"] == row["rejected"]:
                found[i] = "the chosen and the rejected answer are the same"
            continue
        said = answer if answer is not None else None if row.get("label") is None else str(row["label"])
        if said is None:
            continue
        if not said.strip():
            found[i] = "the answer is empty"
        elif answer and len(answer) > 12 * usual + 200:
            found[i] = f"the answer has {len(answer)} characters, the usual one {usual:.0f}"
        prompt = _asked(row)
        if not prompt:
            continue
        at, before = first.setdefault(prompt, (i, said))
        if before != said:
            found[i] = f"{rows.where(at)} asks the same and answers {before[:60]!r}, this one {said[:60]!r}"
    return found


def _asked(row: dict[str, Any]) -> str:
    """All that comes before the answer."""
    if "messages" in row:
        turns = [m for m in row["messages"] if isinstance(m, dict)]
        return repr([(m.get("role"), m.get("content")) for m in turns[: max((i for i, m in enumerate(turns) if m.get("role") == "assistant"), default=0)]])
    return f"{row.get('system', '')}\n{prompt_text(row)}" if prompt_text(row) else ""
