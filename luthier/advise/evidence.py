"""What our own evidence says about a method: never more than was measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from luthier._cli.claims import effect_text
from luthier.claims import find
from luthier.claims.evidence import is_stale
from luthier.errors import UserError
from luthier.papers import evidence_of, paper


@dataclass(frozen=True)
class Evidence:
    """A claim's outcome, as it may be cited."""

    paper: str
    claim: str
    verdict: str | None
    """None: not run, or not to its end."""
    said: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evidence(slug: str) -> Evidence:
    """What is known of a paper's claim."""
    one = paper(slug)
    found = evidence_of(one) or {}
    claim, verdict = one.claim or slug, found.get("verdict")
    if verdict is None:
        begun = f"its claim ({claim}) is not yet run to its end" if found.get("records") else f"its claim ({claim}) has not been run"
        return Evidence(slug, claim, None, f"no evidence: {begun}")
    baseline = (found.get("effect") or {}).get("baseline", "its baseline")
    time = (found.get("cost") or {}).get("time")
    cost = f", at {time:.1f} times its cost" if time else ""
    cost += "; the code has changed since" if _stale(claim) else ""
    return Evidence(slug, claim, verdict, f"{verdict}: {effect_text(found)} {found['metric']} against {baseline}{cost} ({claim})")


def _stale(claim: str) -> bool:
    """Whether the evidence belongs to earlier code; a claim that is not there to be asked is taken at its word."""
    try:
        return bool(is_stale(find(claim)))
    except (UserError, ImportError):
        return False
