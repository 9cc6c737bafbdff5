"""A page that is one file: its style, its few lines of script and its words, all escaped. It works offline, in print and on a phone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class Raw(str):
    """HTML that is written as it is; every other text is escaped."""


def text(value: Any) -> str:
    """A value as escaped text; `Raw` as it is."""
    if isinstance(value, Raw):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number(value) if value is None or isinstance(value, (int, float)) else escape(_visible(str(value)))


def number(value: float | None) -> str:
    """Three significant digits; what is missing is a dash and never a zero."""
    if value is None or not math.isfinite(value):
        return "-"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) >= 1e-4 else f"{value:.1e}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share in hundredths; the sign stays on the number's line."""
    return "-" if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f}\u00a0%"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "", sortable: bool = False) -> Raw:
    """A table that scrolls by itself where the screen is too narrow."""
    top = "".join(f'<th scope="col">{text(h)}</th>' for h in head)
    body = "".join("<tr>" + "".join(_cell(v, i) for i, v in enumerate(row)) + "</tr>" for row in rows)
    named = f"<caption>{text(caption)}</caption>" if caption else ""
    return Raw(f'<div class="wide" tabindex="0"><table{" data-sort" if sortable else ""}>{named}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>')


def _cell(value: Any, column: int) -> str:
    tag = 'th scope="row"' if column == 0 else "td"
    numeric = value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
    order = f' data-v="{value}"' if numeric and value is not None and math.isfinite(value) else ""
    return f'<{tag}{" class=n" if numeric else ""}{order}>{text(value)}</{tag.split()[0]}>'


def section(title: str, *parts: str, name: str = "") -> Raw:
    """A part of the page with its heading; what is empty is left out."""
    anchor = name or "".join(c if c.isalnum() else "-" for c in title.lower())
    return Raw(f'<section id="{escape(anchor)}"><h2>{text(title)}</h2>{"".join(p for p in parts if p)}</section>')


def paragraphs(*sentences: Any) -> Raw:
    return Raw("".join(f"<p>{text(s)}</p>" for s in sentences if s))


def details(summary: str, *parts: str, opened: bool = False) -> Raw:
    return Raw(f"<details{' open' if opened else ''}><summary>{text(summary)}</summary>{''.join(parts)}</details>")


def code(words: str) -> Raw:
    """Text to copy, in a box that scrolls; the script adds a button to it."""
    return Raw(f'<pre tabindex="0"><code>{escape(_visible(words))}</code></pre>')


def columns(*parts: str) -> Raw:
    """Things side by side where there is room."""
    return Raw(f'<div class="columns">{"".join(p for p in parts if p)}</div>')


def page(title: str, header: str, sections: Sequence[str], footer: str = "") -> str:
    """The whole file. A reader without script sees everything; with it, tables sort and lists filter."""
    import re

    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css.txt", "page.js.txt"))
    links = re.findall(r'<section id="([^"]+)"><h2>(.*?)</h2>', "".join(sections))
    contents = "".join(f'<a href="#{anchor}">{heading}</a>' for anchor, heading in links)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src \'unsafe-inline\'; script-src \'unsafe-inline\'; img-src data:">'
        f'<link rel="icon" href="data:,"><title>{text(title)}</title><style>{style}</style></head><body>\n<a class="skip" href="#main">Skip to the content</a>'
        f'<header>{header}</header><nav aria-label="On this page">{contents}</nav><main id="main">{"".join(sections)}</main><footer>{footer}</footer>'
        f"<script>{script}</script></body></html>\n"
    )


def _visible(words: str) -> str:
    """Control characters, and those that turn the direction of writing, shown as codes: data cannot dress itself up."""
    hidden = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200B, 0x200E, 0x200F, 0xFEFF}
    return "".join(c if c in "\n\t" or (ord(c) >= 32 and ord(c) != 127 and ord(c) not in hidden and not 0xD800 <= ord(c) < 0xE000) else f"\\u{ord(c):04x}" for c in words)
