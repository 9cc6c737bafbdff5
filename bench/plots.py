"""Measured curves as SVG files that stand alone."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from luthier.report.charts import WIDTH, Frame, Scale

STYLE = """<style>text{font:12px system-ui,sans-serif;fill:#333}.end{text-anchor:end}.mid{text-anchor:middle}.grid{stroke:#ddd}.title{font-weight:600}
.curve{fill:none;stroke:#1f6feb;stroke-width:2}.rule{fill:none;stroke:#888;stroke-dasharray:5 4}.mark{fill:#1f6feb}</style>"""
MARGIN = 26


def write(scaling: dict[str, Any], folder: Path) -> list[Path]:
    """One file a curve."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, found in scaling.items():
        if not found.get("points"):
            continue
        made.append(folder / f"{name}.svg")
        made[-1].write_text(svg(found["title"], found["x"], found["y"], found["points"]), encoding="utf-8")
        if found.get("rate"):
            made.append(folder / f"{name}-rate.svg")
            made[-1].write_text(svg(found["title"], found["x"], f"{found['unit']} a second", found["rate"], rate=True), encoding="utf-8")
    return made


def svg(title: str, x: str, y: str, points: list[tuple[float, float]], rate: bool = False) -> str:
    """Points with the straight line from zero to the largest of them, on which lies what grows in proportion; of a `rate`, a level line."""
    last = max(points)
    frame = Frame(Scale.of([0.0, last[0]]), Scale.of([0.0, *(b for _, b in points)]), x, y)
    frame.line([(0.0, last[1] if rate else 0.0), last], "rule")
    frame.line(points, "curve")
    for a, b in points:
        frame.mark(a, b, 0, f"{a:g}: {b:.3g}", 4)
    drawn = frame.svg(title)
    body = drawn[drawn.index(">") + 1 : drawn.rindex("</svg>")]
    tall = frame.height + MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {tall}" width="{WIDTH}" height="{tall}" role="img" aria-label="{escape(title)}">{STYLE}'
        f'<rect width="100%" height="100%" fill="#fff"/><text class="title" x="10" y="18">{escape(title)}</text><g transform="translate(0 {MARGIN})">{body}</g></svg>\n'
    )
