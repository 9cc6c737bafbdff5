"""What the atlas's pages are written with: Markdown from plain text, links between pages, and evidence as words, charts and tables.

The atlas is the site that `make docs` builds: one page a method and a paper, made from the code, papers.yaml and the evidence, so that
nothing is typed twice; around them the hand-written pages of `docs/`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from luthier._cli.claims import effect_text, extras, number
from luthier.catalog import entries
from luthier.papers import Paper, papers
from luthier.report.charts import Interval, intervals

Pages = dict[str, str]
"""Paths below the site's root, and their Markdown."""


# -- Markdown ------------------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Text whose every character means itself; what stands between backticks stays code."""
    parts = re.split(r"(`[^`]+`)", re.sub(r"\s*\n\s*", " ", text))
    return "".join(part if i % 2 else _literal(part) for i, part in enumerate(parts))


def _literal(text: str) -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]|#])", r"\\\1", text)


def prose(doc: str) -> str:
    """A docstring's paragraphs and lists, reflowed."""
    blocks = []
    for block in doc.strip().split("\n\n"):
        parts = re.split(r"\n(?=- )", block)
        listed = [f"- {plain(p[2:].strip())}" if p.startswith("- ") else re.sub(r"^(\d+)\.(?= )", r"\1\\.", plain(p)) for p in parts]
        blocks.append("\n".join(x if i == 0 or not x.startswith("- ") or listed[i - 1].startswith("- ") else f"\n{x}" for i, x in enumerate(listed)))
    return "\n\n".join(blocks)


def code(value: Any) -> str:
    """A value as code in a line or in a table's cell."""
    text = " ".join(str(value).split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}" if text else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are Markdown; an empty one is a dash."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(c or "-" for c in row) + " |" for row in rows)])


def fenced(text: str, language: str) -> str:
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`{3,}", text)), 3)
    return f"{fence}{language}\n{text}\n{fence}"


def front(title: str, about: str = "") -> str:
    """A page's head: its title in the browser and what search engines show."""
    import json

    described = f"description: {json.dumps(about, ensure_ascii=False)}\n" if about else ""
    return f"---\ntitle: {json.dumps(title, ensure_ascii=False)}\n{described}---\n"


# -- links ---------------------------------------------------------------------------------------------------------------


def method_link(method: str, up: str = "") -> str:
    """A method of the catalogue as a link from a page `up` below the root (`../` or `../../`); a planned one by its name."""
    axis, _, name = method.partition("/")
    known = any(e.axis == axis and e.name == name for e in entries(axis))
    return f"[{method}]({up}methods/{axis}/{name}.md)" if known else f"{method} (planned)"


def paper_link(paper: Paper | Mapping[str, Any], up: str = "", words: str = "") -> str:
    slug, title = (paper["slug"], paper["title"]) if isinstance(paper, Mapping) else (paper.slug, paper.title)
    return f"[{plain(words or title)}]({up}papers/{slug}.md)"


def axis_link(axis: str, up: str = "") -> str:
    return f"[{axis}]({up}axes.md#{axis})"


# -- evidence ------------------------------------------------------------------------------------------------------------


def evidence_section(found: dict[str, Any], level: int = 3, up: str = "") -> list[str]:
    """A claim and what came of it: in words, drawn, and with every arm's numbers."""
    facts = [("The claim", found["says"]), ("Published", found["published"]), ("Here", found["departs"])]
    lines = [f"{'#' * level} {_heading(found)}", "", *(f"**{name}.** {plain(text)}\n" for name, text in facts if text)]
    lines += [f"**Result.** {_result(found)}", "", *(f"- {plain(n)}" for n in _notes(found)), ""]
    return [*lines, *_figures(found), "", *_arms(found), "", _tested(found, up), ""]


def _heading(found: dict[str, Any]) -> str:
    """The paper and the verdict: a method's page may show several."""
    return plain(f"{by_number()[found['paper']].slug}: {found['verdict'] or 'no verdict yet'}")


def _result(found: dict[str, Any]) -> str:
    """The effect with what it is measured against."""
    effect = found["effect"]
    if not effect:
        return "The effect is not measured yet."
    return plain(f"{found['metric']}, {effect['method']} against {effect['baseline']}: {effect_text(found)}. {_scale(found)}")


def _scale(found: dict[str, Any]) -> str:
    """How the effect is to be read."""
    wanted = f" The claim asks for more than {number(found['at_least'])}." if found["at_least"] else ""
    return f"Above zero is better; in brackets the 95 % interval. The smallest effect worth speaking of, declared beforehand, is {number(found['smallest'])}.{wanted}"


def _notes(found: dict[str, Any]) -> list[str]:
    waiting = [f"Not all seeds are in; waiting for {', '.join(map(str, found['waiting']))}."] if found["arms"] and found["waiting"] else []
    again = found["repeated"]
    repeated = [f"Repeated on seeds {', '.join(map(str, again['seeds']))}: {again['verdict']}, {effect_text({'effect': again})}."] if again else []
    cost = found.get("cost") or {}
    costs = [f"{name.capitalize()}: {ratio:.2f} times the baseline's." for name, ratio in cost.items() if ratio is not None]
    return [*([found["reason"]] if found["reason"] else []), *found["flags"], *waiting, *repeated, *costs]


def _figures(found: dict[str, Any]) -> list[str]:
    """The method's gain over every other arm, and every arm's values."""
    arms, metric = found["arms"], found["metric"]
    if not arms:
        return []
    charts = []
    if found["effect"]:
        method = found["effect"]["method"]
        gains = [Interval(f"over {a}", e["mean"], e["low"], e["high"], _differences(found, method, a), int(arms[a]["role"] != "baseline")) for a, e in found["against"].items()]
        marks = sorted({found["at_least"] + found["smallest"], found["at_least"] - found["smallest"]})
        about = "Seed by seed; right of zero is better. Bar: 95 % interval of the mean. Small dots: single seeds. Dashed: the smallest effect worth speaking of."
        charts.append(intervals(f"What {method} gains", gains, f"difference in {metric}", about, rules=marks))
    means = [Interval(name, a["means"].get(metric), dots=_finite(a["values"].get(metric, {}).values()), kind=_kind(a["role"])) for name, a in arms.items()]
    charts.append(intervals(f"{metric}, by arm", means, f"{metric} ({found['better']} is better)", "Mark: mean over seeds. Small dots: single seeds.", zero=False))
    return [f"{chart}\n" for chart in charts]


def _kind(role: str) -> int:
    """The method's mark, the baseline's, and that of all others."""
    return {"method": 0, "baseline": 1}.get(role, 2)


def _differences(found: dict[str, Any], method: str, other: str) -> tuple[float, ...]:
    sign = 1 if found["better"] == "higher" else -1
    a, b = (found["arms"][n]["values"].get(found["metric"], {}) for n in (method, other))
    return _finite(None if a[s] is None or b[s] is None else sign * (a[s] - b[s]) for s in sorted(a.keys() & b.keys(), key=int))


def _finite(values: Any) -> tuple[float, ...]:
    return tuple(float(v) for v in values if v is not None)


def _arms(found: dict[str, Any]) -> list[str]:
    metric, rows = found["metric"], []
    for name, a in found["arms"].items():
        settings = ", ".join(f"{k} {v}" for k, v in a["settings"].items())
        rows.append([plain(name), a["role"], number(a["means"].get(metric)), f"{a['seconds']:.0f} s", plain(settings), plain(extras(a["means"], metric))])
    return [table(("arm", "role", plain(metric), "time", "settings", "also"), rows)] if rows else []


def _tested(found: dict[str, Any], up: str) -> str:
    on_trial = ", ".join(method_link(m, up) for m in found["methods"])
    versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
    age = {None: "", False: "", True: " It is stale: the code it rests on has changed since."}[stale(found["slug"])]
    return f"On trial: {on_trial}. Run it yourself: {code('luthier claims run ' + found['slug'])}. Measured with {plain(versions)}.{age}"


def stale(slug: str) -> bool | None:
    """Whether stored evidence rests on other code than there is now; None where that cannot be told."""
    from luthier.claims import find, names
    from luthier.claims.evidence import is_stale

    return is_stale(find(slug)) if slug in names() else None


@functools.cache
def by_number() -> dict[int, Paper]:
    return {p.n: p for p in papers()}
