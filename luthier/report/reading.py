"""A run's files as plain values for its report. Whatever is missing or broken is left out, never invented."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.errors import UserError


@dataclass
class Facts:
    """All that a run left behind."""

    folder: Path
    recipe: dict[str, Any]
    recipe_text: str
    status: str
    """finished, failed, stopped or unfinished."""
    why: str = ""
    measures: dict[str, dict[str, Any]] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)
    seconds: float | None = None
    about: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """By stage: the lines of metrics.jsonl."""
    pools: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By stage: the data at a glance."""

    def numbers(self, name: str, when: str = "after") -> dict[str, Any]:
        found: dict[str, Any] = self.measures.get(when, {}).get(name, {}).get("numbers", {})
        return found

    def table(self, name: str, table: str, when: str = "after") -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.measures.get(when, {}).get(name, {}).get("tables", {}).get(table, [])
        return found

    def examples(self) -> dict[str, list[dict[str, Any]]]:
        """Rows that were answered before and after, by stream: worst regressions first, then what is still wrong, then the rest."""
        found = {}
        for measure, stream in (("task", "test"), ("task", "ood"), ("forgetting", "general")):
            after, before = (self.table(measure, f"{stream} answers", when) for when in ("after", "before"))
            earlier = {row.get("row"): row for row in before}
            rows = [{**row, "before": earlier.get(row.get("row"), {}).get("answer"), "score_before": earlier.get(row.get("row"), {}).get("score")} for row in after]
            if rows:
                found[stream] = sorted(rows, key=lambda r: ((r["score"] or 0) - (r["score_before"] or 0), r["score"] or 0, -(r.get("confidence") or 0)))
        return found


def read(folder: str | Path) -> Facts:
    """The facts of a run's folder."""
    import yaml

    folder = Path(folder)
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} is no run folder: it holds no recipe.yaml.")
    words = (folder / "recipe.yaml").read_text(encoding="utf-8")
    facts = Facts(folder, _or(lambda: yaml.safe_load(words), {}), words, "unfinished")
    report, ended = _json(folder / "report.json", {}), _json(folder / "ended.json", {})
    facts.status = ended.get("how") or ("finished" if report.get("status", "finished" if report else None) == "finished" else "unfinished")
    facts.why = str(ended.get("why", ""))
    facts.measures, facts.about = _json(folder / "measures.json", {}), _json(folder / "about.json", {})
    facts.stages, facts.seconds = report.get("stages", []), report.get("seconds")
    for path in sorted({*folder.glob("metrics.jsonl"), *folder.glob("stages/**/metrics.jsonl")}):
        facts.curves[_stage(folder, path)] = _lines(path)
    for path in sorted({*folder.glob("pool.json"), *folder.glob("stages/**/pool.json")}):
        if found := _json(path, {}):
            facts.pools[_stage(folder, path)] = found
    return facts


def _stage(folder: Path, path: Path) -> str:
    return "" if path.parent == folder else str(path.parent.relative_to(folder / "stages"))


def _lines(path: Path) -> list[dict[str, Any]]:
    """Every whole line; a line that a crash cut off is left out."""
    found = (_or(lambda line=line: json.loads(line), None) for line in path.read_text(encoding="utf-8", errors="replace").splitlines())  # type: ignore[misc]
    return [line for line in found if isinstance(line, dict)]


def _json(path: Path, default: Any) -> Any:
    found = _or(lambda: json.loads(path.read_text(encoding="utf-8")), default) if path.is_file() else default
    return found if isinstance(found, type(default)) else default


def _or(read: Callable[[], Any], default: Any) -> Any:
    try:
        return read()
    except (ValueError, OSError):
        return default
