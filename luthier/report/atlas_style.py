"""The report's chart styles for pages that have styles of their own: every rule that a chart needs, held to charts."""

from __future__ import annotations

import re

from luthier.report.html import HERE

CHART = "figure.chart"
PARTS = re.compile(r"figcaption|svg|details|\.(about|legend|ramp|grid|tick|label|mid|end|rule|dashed|curve|whisker|thin|area|mark|bar|cell|hatch|k\d)\b")
RULE = re.compile(r"(@media[^{]*)\{((?:[^{}]*\{[^{}]*\})*)\}|([^{}]+)\{([^{}]*)\}")


def style() -> str:
    """Colours as they are; rules of a chart's parts with `figure.chart` before them; nothing else."""
    return _kept((HERE / "page.css.txt").read_text(encoding="utf-8"))


def _kept(sheet: str) -> str:
    lines = []
    for media, inner, selectors, body in RULE.findall(sheet):
        if media:
            within = _kept(inner)
            lines += [f"{media}{{\n{within}}}"] if within else []
            continue
        held = [_held(s.strip()) for s in selectors.split(",") if _of_charts(s.strip())]
        lines += [f"{', '.join(held)}{{{body}}}"] if held else []
    return "".join(f"{line}\n" for line in lines)


def _of_charts(selector: str) -> bool:
    return selector == ":root" or selector.startswith(CHART) or bool(PARTS.match(selector))


def _held(selector: str) -> str:
    return selector if selector == ":root" or selector.startswith(CHART) else f"{CHART} {selector}"
