"""Plain tables and paragraphs, as wide as the terminal."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any


def width() -> int:
    """Columns to fill: the terminal's, or no limit in a pipe."""
    return shutil.get_terminal_size((100, 24)).columns if sys.stdout.isatty() else 10_000


def say(line: str = "") -> None:
    """A line on standard output."""
    sys.stdout.write(line + "\n")


def say_json(value: Any) -> None:
    """A value as JSON on standard output."""
    say(json.dumps(value, indent=1, ensure_ascii=False, default=str))


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns side by side; the last one is cut at the terminal's edge."""
    cells = [[str(c) for c in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head) - 1)]
    left = max(20, width() - sum(widths) - 2 * len(widths))
    lines = []
    for row in cells:
        last = row[-1] if len(row[-1]) <= left else row[-1][: left - 1] + "…"
        lines.append(("".join(c.ljust(w + 2) for c, w in zip(row, widths)) + last).rstrip())
    return "\n".join(lines)


def paragraph(text: str, indent: str = "") -> str:
    """Text wrapped at 100 columns or the terminal's edge; blank lines stay."""
    parts = [textwrap.fill(" ".join(p.split()), min(width(), 100), initial_indent=indent, subsequent_indent=indent) for p in text.split("\n\n")]
    return "\n\n".join(parts)
