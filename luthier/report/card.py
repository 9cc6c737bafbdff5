"""The report card: one HTML file about one run, made from the run's own files, whether it finished, failed or was stopped."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from luthier.report import card_parts, compared, cost, verdict
from luthier.report.html import number, page, paragraphs, percent, text
from luthier.report.reading import Facts, read

MAIN = ("task/exact_match", "task/accuracy", "task/score", "task/recall_at_1", "task/pair_accuracy")


def card(folder: str | Path) -> str:
    """The page of the run in `folder`."""
    facts = read(folder)
    name = facts.recipe.get("name") or facts.folder.resolve().name
    parts = [getattr(card_parts, f"{part}_part")(facts) for part in ("gained", "forgotten", "trust", "weights", "data", "training", "examples", "other", "repeat")]
    footer = paragraphs("Made by Luthier from the files of this run. It loads nothing from anywhere; its numbers are in report.json, measures.json and metrics.jsonl beside it.")
    return page(f"Report: {name}", _header(name, facts), parts, footer)


def write(folder: str | Path) -> Path:
    """report.html and report.json of a run."""
    from luthier.core.checkpoint import replace_text

    target = Path(folder) / "report.html"
    replace_text(target, card(folder))
    replace_text(Path(folder) / "report.json", json.dumps(as_values(folder), indent=1, default=str))
    return target


def as_values(folder: str | Path) -> dict[str, Any]:
    """The same facts as plain values; the long series stay in metrics.jsonl, the map's dots in pool.json."""
    facts = read(folder)
    changes = compared(facts.measures)
    return {
        "status": facts.status, "why": facts.why, "verdict": said(facts), "changes": changes, "stages": facts.stages, "seconds": facts.seconds, "cost": cost(facts.stages),
        "model": str(facts.folder / "model"), "run": str(facts.folder), "examples": facts.examples(),
        "data": {stage: {k: v for k, v in found.items() if k != "points"} for stage, found in facts.pools.items()}, "about": facts.about, "recipe": facts.recipe,
    }  # fmt: skip


def said(facts: Facts) -> list[str]:
    """The verdict in up to three sentences; a run that did not end well says that first."""
    if facts.status == "finished":
        return verdict(compared(facts.measures))
    steps = sum(len(curve) and curve[-1].get("step", 0) for curve in facts.curves.values())
    ended = {"failed": "This run failed", "stopped": "This run was stopped"}.get(facts.status, "This run has not finished")
    return [f"{ended}{f' after {steps:,.0f} steps' if steps else ' before its first step'}{f': {facts.why}' if facts.why else '.'}", "What follows is what it left behind; nothing was measured after tuning."]


def _header(name: str, facts: Facts) -> str:
    sentences, changes = said(facts), {c["name"]: c for c in compared(facts.measures)}
    main = next((changes[m] for m in MAIN if m in changes), None)
    lost = changes.get("forgetting/general_score")
    bad = facts.status != "finished" or (main is not None and main["before"] is not None and main["after"] <= main["before"])
    tone = "bad" if bad else "good" if main is not None else ""
    tiles = [
        (main and main["label"], _move(main)), ("general questions", _move(lost)), ("confidence off by", _points(changes.get("calibration/ece"))),
        ("time in all", _seconds(facts.seconds)), ("peak memory", _gigabytes(facts.stages)), ("trained parameters", number(cost(facts.stages).get("parameters"))),
    ]  # fmt: skip
    shown = "".join(f"<li><b>{text(value)}</b><span>{text(label)}</span></li>" for label, value in tiles if label and value != "-")
    return f'<h1>{text(name)}</h1><div class="verdict {tone}">{paragraphs(*sentences)}</div><ul class="tiles">{shown}</ul>'


def _move(change: dict[str, Any] | None) -> str:
    if change is None:
        return "not measured"
    show = percent if change["share"] else number
    return f"{show(change['before'])} → {show(change['after'])}"


def _points(change: dict[str, Any] | None) -> str:
    return "not measured" if change is None else f"{100 * change['after']:.0f} points"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f} s" if value < 120 else f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


def _gigabytes(stages: list[dict[str, Any]]) -> str:
    peak = max((s["outcome"]["peak_memory"] for s in stages if s.get("outcome")), default=0)
    return f"{peak / 2**30:.1f} GiB" if peak and math.isfinite(peak) else "-"


__all__ = ["as_values", "card", "said", "write"]
