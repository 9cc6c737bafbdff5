"""One page a paper, planned ones too, and the table of what came of every claim."""

from __future__ import annotations

from html import escape
from typing import Any

from luthier import catalog
from luthier._cli.claims import effect_text, times
from luthier._cli.explain import about_paper
from luthier.papers import Paper, evidence_of, papers
from luthier.report.atlas import (
    Pages,
    axis_link,
    by_number,
    code,
    evidence_section,
    fenced,
    front,
    method_link,
    paper_link,
    plain,
)

UP = "../"
WORDS = {"works": "All of it is there.", "partly": "It is there in part.", "planned": "It is planned: nothing of it can be used yet."}


def paper_pages() -> Pages:
    return {f"papers/{p.slug}.md": page(p) for p in by_number().values()}


def page(paper: Paper) -> str:
    """A paper's page."""
    about = about_paper(paper)
    missing = f" Missing: {', '.join(plain(m) for m in paper.missing)}." if paper.missing else ""
    lines = [front(paper.slug, paper.idea), f"# {plain(paper.title)}", "", plain(paper.idea), ""]
    lines += [f"Paper {paper.n}, {paper.year}. Axis: {axis_link(paper.axis, UP)}. Modality: {plain(paper.modality)}.", "", f"**{WORDS[paper.status]}**{missing}", ""]
    lines += ["## Methods", "", *(f"- {method_link(m['method'], UP)}" + (f": {plain(m['idea'])}" if m["idea"] else "") for m in about["methods"]), ""]
    lines += _use(paper, about)
    lines += ["## Evidence", "", *(evidence_section(about["evidence"], 3, UP) if about["evidence"] else [_unproven(paper), ""])]
    return "\n".join([*lines, *_relatives(paper)]) + "\n"


def _use(paper: Paper, about: dict[str, Any]) -> list[str]:
    """How to run it: its preset, or its methods in a recipe."""
    if not about["recipe"]:
        return []
    if not paper.preset:
        return ["## In a recipe", "", fenced(about["recipe"], "yaml"), ""]
    from luthier.papers import preset_file

    file = preset_file(paper.preset)
    shown, place = fenced(file.read_text(encoding="utf-8").rstrip(), "yaml"), code(file.relative_to(catalog.PACKAGE.parent))
    return ["## In a recipe", "", f"The preset {code(paper.preset)} is its whole system:", "", fenced(about["recipe"], "console"), "", f"It is {place}:", "", shown, ""]


def _unproven(paper: Paper) -> str:
    from luthier.claims import find, names

    if paper.claim not in names():
        return "No claim has been written yet."
    return f"A claim is written and has not been run: {plain(find(paper.claim).says)} Run it: {code('luthier claims run ' + str(paper.claim))}."


def _relatives(paper: Paper) -> list[str]:
    """Other papers that use one of its methods, and others of its axis."""
    lines = [f"- {paper_link(p, UP, p.slug)} also uses {method_link(m, UP)}" for p in by_number().values() if p.n != paper.n for m in p.methods if m in paper.methods]
    same = [paper_link(p, UP, p.slug) for p in by_number().values() if p.axis == paper.axis and p.n != paper.n]
    beside = f"Other papers of the axis {axis_link(paper.axis, UP)}: {', '.join(same)}." if same else ""
    return ["## Related", "", *lines, "", beside, ""]


# -- the table -----------------------------------------------------------------------------------------------------------

COLUMNS = ("n", "paper", "axis", "status", "verdict", "effect", "measure", "time", "memory", "published")


def evidence_table() -> str:
    """All papers in one table. Its rows say their axis, status and verdict, so that a script can filter them; without one all are shown."""
    found = papers()
    rows = "".join(_row(p, evidence_of(p) or {}) for p in found)
    head = "".join(f'<th scope="col">{c}</th>' for c in COLUMNS)
    return f'<div class="wide" tabindex="0"><table class="evidence" data-filter="axis status verdict"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _row(paper: Paper, found: dict[str, Any]) -> str:
    cost, verdict = found.get("cost") or {}, found.get("verdict") or ("incomplete" if found else "none")
    link = f'<a href="papers/{escape(paper.slug)}.html" title="{escape(paper.title)}">{escape(paper.slug)}</a>'
    shown = [paper.axis, paper.status, found.get("verdict"), effect_text(found), found.get("metric"), times(cost.get("time")), times(cost.get("memory")), found.get("published")]
    cells = f'<td>{paper.n}</td><th scope="row">{link}</th>' + "".join(f"<td>{escape(s or '-')}</td>" for s in shown)
    return f'<tr data-axis="{paper.axis}" data-status="{paper.status}" data-verdict="{escape(verdict)}">{cells}</tr>'


def counts() -> str:
    """How many papers are there, and what came of those that were tried."""
    found = papers()
    status = [f"{sum(p.status == s for p in found)} {s}" for s in ("works", "partly", "planned")]
    verdicts = [f"{sum(p.verdict == v for p in found)} {v}" for v in ("reproduced", "not reproduced", "unclear")]
    return f"{len(found)} papers: {', '.join(status)}. Verdicts so far: {', '.join(verdicts)}."
