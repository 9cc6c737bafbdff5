"""The papers that the library embodies, and how much of each is there."""

from __future__ import annotations

import functools
import json
import re
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from luthier import catalog
from luthier.errors import RecipeError, nearest

Status = Literal["works", "partly", "planned"]


@dataclass(frozen=True)
class Paper:
    """One paper: what it proposes, what holds it, and whether its claim has been run."""

    n: int
    slug: str
    title: str
    year: int
    axis: str
    modality: str
    idea: str
    methods: tuple[str, ...]
    """As axis/name."""
    seeds: tuple[str, ...] = ()
    preset: str | None = None
    claim: str | None = None
    missing: tuple[str, ...] = ()
    """What is not there yet: methods, preset, evidence."""
    verdict: str | None = None
    """What the claim's evidence says: reproduced, not reproduced or unclear."""
    status: Status = "planned"
    """works: methods, preset and evidence with a verdict are all there; partly: some method is."""
    present: tuple[str, ...] = field(default=(), repr=False)
    """The methods that are in the catalogue."""

    @property
    def works(self) -> bool:
        return self.status == "works"

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        names = ("n", "slug", "title", "year", "axis", "modality", "idea", "methods", "preset", "claim", "status", "missing", "verdict")
        return {k: list(v) if isinstance(v := getattr(self, k), tuple) else v for k in names} | {"works": self.works}


def papers() -> list[Paper]:
    """All papers in order, each with what is there of it now."""
    known = {f"{e.axis}/{e.name}" for e in catalog.entries()}
    return [_judged(record, known, catalog.PACKAGE) for record in _records()]


def paper(which: str | int) -> Paper:
    """One paper by its number or slug."""
    everything = papers()
    for one in everything:
        if str(which).strip() in (str(one.n), f"{one.n:03d}", one.slug, one.claim):
            return one
    raise RecipeError(f"There is no paper '{which}'.{nearest(str(which), [p.slug for p in everything])} `luthier papers` lists them.")


@functools.cache
def _records() -> tuple[dict[str, Any], ...]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return tuple(yaml.load((catalog.PACKAGE / "papers.yaml").read_text(encoding="utf-8"), Loader=loader))


def _judged(record: dict[str, Any], known: set[str], package: Path) -> Paper:
    present = tuple(m for m in record["methods"] if m in known)
    missing = [m for m in record["methods"] if m not in known]
    if record["preset"] and not preset_file(record["preset"], package).is_file():
        missing.append(f"preset {record['preset']}")
    evidence = package / "evidence" / f"{record['claim']}.json"
    verdict = _verdict(evidence)
    if verdict is None:
        missing.append("evidence")
    status: Status = "works" if not missing else "partly" if present else "planned"
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
    return Paper(**given, missing=tuple(missing), verdict=verdict, status=status, present=present)


def preset_file(name: str, package: Path = catalog.PACKAGE) -> Path:
    """Where a preset lies."""
    return package / "presets" / f"{re.sub(r'[^a-z0-9]', '_', name)}.yaml"


def evidence_of(one: Paper) -> dict[str, Any] | None:
    """The stored result of a paper's claim, if it was run."""
    try:
        found = json.loads((catalog.PACKAGE / "evidence" / f"{one.claim}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _verdict(file: Path) -> str | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return str(found["verdict"]) if isinstance(found, dict) and found.get("verdict") else None


class _Callable(types.ModuleType):
    """`luthier.papers` is this module and, called, the list: `luthier.papers()`."""

    def __call__(self) -> list[Paper]:
        return papers()


sys.modules[__name__].__class__ = _Callable
