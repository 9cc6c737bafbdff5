"""Charts as SVG in a figure: nothing to install, nothing to load, readable in print, on a phone and by a screen reader.

Every chart takes plain numbers, leaves out what is None or not finite and says how much that was, and carries its numbers as a table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from luthier.report.html import number, table

WIDTH, HEIGHT = 520, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 46
KINDS = 6
"""Colours and shapes that differ; a seventh kind looks like the first."""


@dataclass(frozen=True)
class Point:
    """One mark of a scatter, with whiskers where intervals are given."""

    x: float | None
    y: float | None
    label: str = ""
    kind: int = 0
    x_interval: tuple[float | None, float | None] = (None, None)
    y_interval: tuple[float | None, float | None] = (None, None)
    size: float = 4.0


def scatter(
    title: str, points: Sequence[Point], x: str, y: str, kinds: Sequence[str] = (), about: str = "", diagonal: bool = False, named: bool = False, numbers: bool = True
) -> str:
    """Points in a plane. `kinds` names the kinds in the legend; `diagonal` draws y = x; `named` writes the labels beside the marks."""
    known = [p for p in points if _finite(p.x) and _finite(p.y)]
    spread = [v for p in known for v in (p.x, *p.x_interval) if _finite(v)], [v for p in known for v in (p.y, *p.y_interval) if _finite(v)]
    frame = Frame(Scale.of(spread[0] + (spread[1] if diagonal else [])), Scale.of(spread[1] + (spread[0] if diagonal else [])), x, y)
    if diagonal:
        frame.line([(frame.x.low, frame.x.low), (frame.x.high, frame.x.high)], "rule dashed")
    for p in known:
        frame.whiskers(p)
    for p in known:
        frame.mark(p.x, p.y, p.kind, p.label, p.size)  # type: ignore[arg-type]  # known to be finite
        if named and p.label:
            frame.text(p.x, p.y, p.label)  # type: ignore[arg-type]
    rows = [(p.label, *([kinds[p.kind]] if kinds else []), p.x, p.y) for p in points] if numbers else []
    return figure(title, frame.svg(title), about, len(points) - len(known), ("", *(["kind"] if kinds else []), x, y), rows, kinds)


def lines(title: str, series: Mapping[str, Sequence[tuple[float | None, float | None]]], x: str, y: str, about: str = "", log: bool = False,
          marks: Sequence[tuple[float, str]] = (), area: bool = False, numbers: bool = True) -> str:  # fmt: skip
    """Curves. `log` for the upright axis; `marks` are upright rules with a name; `area` fills below the first curve."""
    known = {name: [(a, b) for a, b in curve if _finite(a) and _finite(b) and (not log or b > 0)] for name, curve in series.items()}  # type: ignore[operator]
    xs, ys = ([p[i] for curve in known.values() for p in curve] for i in (0, 1))
    frame = Frame(Scale.of([*xs, *(m for m, _ in marks)], tight=True), Scale.of(ys, log=log), x, y)
    for kind, curve in enumerate(known.values()):
        if area and kind == 0 and curve:
            frame.line([(curve[0][0], frame.y.low), *curve, (curve[-1][0], frame.y.low)], "area")
        frame.line(curve, f"curve k{kind % KINDS}")
    for at, name in marks:
        frame.line([(at, frame.y.low), (at, frame.y.high)], "rule")
        frame.text(at, frame.y.high, name, below=True)
    missing = sum(len(c) for c in series.values()) - sum(len(c) for c in known.values())
    rows = [(name, *point) for name, curve in series.items() for point in _thinned(curve)] if numbers else []
    return figure(title, frame.svg(title), about, missing, ("", x, y), rows, list(series) if len(series) > 1 else ())


@dataclass(frozen=True)
class Interval:
    """One row of a forest plot. `dots` are the single values behind it, such as one a seed."""

    label: str
    mean: float | None
    low: float | None = None
    high: float | None = None
    dots: tuple[float, ...] = ()
    kind: int = 0


def intervals(title: str, rows: Sequence[Interval], x: str, about: str = "", zero: bool = True, rules: Sequence[float] = ()) -> str:
    """Means with their intervals, one below the other. `zero` draws the line of no difference; `rules` are further upright lines."""
    values = [v for r in rows for v in (r.mean, r.low, r.high, *r.dots) if _finite(v)]
    step, indent = 30, 170
    frame = Frame(Scale.of([*values, *([0.0] if zero else []), *rules]), Scale(0.0, float(max(1, len(rows)))), x, "", left=indent, height=TOP + BOTTOM + step * max(1, len(rows)), bare=True)
    for at in [*([0.0] if zero else []), *rules]:
        frame.line([(at, 0.0), (at, float(len(rows)))], "rule" if at == 0 else "rule dashed")
    for i, row in enumerate(rows):
        at = len(rows) - i - 0.5
        frame.margin(at, row.label)
        for dot in row.dots:
            frame.mark(dot, at - 0.22, KINDS - 1, f"{row.label}: {number(dot)}", 2.2)
        if _finite(row.low) and _finite(row.high):
            frame.line([(row.low, at), (row.high, at)], f"whisker k{row.kind % KINDS}")  # type: ignore[list-item]
        if _finite(row.mean):
            frame.mark(row.mean, at, row.kind, f"{row.label}: {number(row.mean)}", 5)  # type: ignore[arg-type]
        else:
            frame.text((frame.x.low + frame.x.high) / 2, at, "not measured")
    missing = sum(not _finite(r.mean) for r in rows)
    return figure(title, frame.svg(title), about, missing, ("", x, "from", "to"), [(r.label, r.mean, r.low, r.high) for r in rows], ())


def heat(title: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]], unit: str, about: str = "") -> str:
    """A grid whose cells are the darker the larger the value; a cell without a value is hatched."""
    known = [v for line in values for v in line if _finite(v)]
    top = max(known, default=0.0) or 1.0  # type: ignore[type-var]
    left, side = 44, (WIDTH - 44 - RIGHT) / max(1, len(columns))
    tall = max(9.0, min(26.0, 420 / max(1, len(rows))))
    head = 12 + 7.2 * max((len(c) for c in columns), default=0) * 0.72
    parts = ['<defs><pattern id="none" width="5" height="5" patternUnits="userSpaceOnUse"><path d="M0 5L5 0" class="hatch"/></pattern></defs>']
    for j, name in enumerate(columns):
        parts.append(f'<text class="tick" transform="translate({left + (j + 0.55) * side:.1f} {head - 6:.1f}) rotate(-45)">{escape(name)}</text>')
    every = max(1, round(15 / tall))
    for i, (name, line) in enumerate(zip(rows, values)):
        if i % every == 0:
            parts.append(f'<text class="tick end" x="{left - 6}" y="{head + (i + 0.5) * tall + 4:.1f}">{escape(name)}</text>')
        for j, value in enumerate(line):
            place = f'x="{left + j * side:.1f}" y="{head + i * tall:.1f}" width="{side - 1:.1f}" height="{tall - 1:.1f}"'
            said = f"<title>{escape(name)}, {escape(columns[j])}: {number(value)} {escape(unit)}</title>"
            parts.append(f'<rect {place} class="cell" style="--v:{value / top:.3f}">{said}</rect>' if _finite(value) else f'<rect {place} fill="url(#none)">{said}</rect>')  # type: ignore[operator]
    height = head + len(rows) * tall + 8
    svg = f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    scale = f'<p class="legend"><span class="ramp"></span> 0 to {number(top)} {escape(unit)}</p>' if known else ""
    missing = sum(len(line) for line in values) - len(known)
    return figure(title, svg + scale, about, missing, ("", *columns), [(n, *line) for n, line in zip(rows, values)], ())


def bars(title: str, rows: Sequence[tuple[str, float | None]], x: str, about: str = "") -> str:
    """Lying bars from zero."""
    known = [v for _, v in rows if _finite(v)]
    frame = Frame(Scale.of([0.0, *known]), Scale(0.0, float(max(1, len(rows)))), x, "", left=170, height=TOP + BOTTOM + 26 * max(1, len(rows)), bare=True)  # type: ignore[list-item]
    for i, (label, value) in enumerate(rows):
        at = len(rows) - i - 0.5
        frame.margin(at, label)
        if _finite(value):
            frame.bar(value, at, f"{label}: {number(value)}")  # type: ignore[arg-type]
    return figure(title, frame.svg(title), about, len(rows) - len(known), ("", x), rows, ())


# -- the frame -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    low: float
    high: float
    log: bool = False

    @classmethod
    def of(cls, values: Iterable[float | None], log: bool = False, tight: bool = False) -> Scale:
        """From the least to the greatest value, with a little room around them."""
        known = [float(v) for v in values if v is not None and math.isfinite(v)]
        if not known:
            return cls(1.0 if log else 0.0, 10.0 if log else 1.0, log)
        low, high = min(known), max(known)
        if log:
            return cls(low / 1.2, high * 1.2, True)
        room = 0.0 if tight and high > low else 0.06 * (high - low) or 0.5 * abs(high) or 0.5
        return cls(low - (0.0 if low == 0 < high else room), high + room)

    def place(self, value: float) -> float:
        """0 at the lower end, 1 at the upper."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, most: int = 5) -> list[float]:
        """Round values inside the scale."""
        if self.log:
            powers = [10.0**k for k in range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)]
            found = [v for v in powers if self.low <= v <= self.high]
            fine = [m * v for v in powers for m in (1, 2, 5) if self.low <= m * v <= self.high]
            return found if len(found) > 2 else fine[: most + 3]
        raw = (self.high - self.low) / most
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


@dataclass
class Frame:
    """Axes and what is drawn between them."""

    x: Scale
    y: Scale
    x_label: str
    y_label: str
    left: int = LEFT
    height: int = HEIGHT
    bare: bool = False
    """No upright axis: its places are rows and not values."""
    parts: list[str] = field(default_factory=list)

    def at(self, x: float, y: float) -> tuple[float, float]:
        return self.left + self.x.place(x) * (WIDTH - RIGHT - self.left), self.height - BOTTOM - self.y.place(y) * (self.height - TOP - BOTTOM)

    def line(self, points: Sequence[tuple[float | None, float | None]], style: str) -> None:
        if points:
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (self.at(x, y) for x, y in points))  # type: ignore[arg-type]
            self.parts.append(f'<polyline class="{style}" points="{path}"/>')

    def mark(self, x: float, y: float, kind: int, label: str, size: float) -> None:
        self.parts.append(_mark(*self.at(x, y), kind, size, f"<title>{escape(label)}</title>"))

    def whiskers(self, p: Point) -> None:
        for (low, high), flat in ((p.x_interval, True), (p.y_interval, False)):
            if _finite(low) and _finite(high):
                self.line([(low, p.y), (high, p.y)] if flat else [(p.x, low), (p.x, high)], f"whisker thin k{p.kind % KINDS}")

    def bar(self, value: float, at: float, label: str) -> None:
        (a, b), (c, _) = self.at(0.0, at), self.at(value, at)
        self.parts.append(f'<rect class="bar" x="{min(a, c):.1f}" y="{b - 8:.1f}" width="{max(0.5, abs(c - a)):.1f}" height="16"><title>{escape(label)}</title></rect>')

    def text(self, x: float, y: float, words: str, below: bool = False) -> None:
        a, b = self.at(x, y)
        side = "end" if a > 0.7 * WIDTH else ""
        self.parts.append(f'<text class="tick {side}" x="{a + (-7 if side else 7):.1f}" y="{b + (12 if below else -6):.1f}">{escape(words)}</text>')

    def margin(self, y: float, words: str) -> None:
        """A row's name, left of the frame; a long one loses its end, which its tooltip keeps."""
        shown = words if len(words) <= 22 else words[:21] + "…"
        self.parts.append(f'<text class="tick end" x="{self.left - 8}" y="{self.at(self.x.low, y)[1] + 4:.1f}"><title>{escape(words)}</title>{escape(shown)}</text>')

    def svg(self, title: str) -> str:
        bottom, grid = self.height - BOTTOM, []
        for tick in self.x.ticks():
            a = self.at(tick, self.y.low)[0]
            grid.append(f'<line class="grid" x1="{a:.1f}" x2="{a:.1f}" y1="{TOP}" y2="{bottom}"/><text class="tick mid" x="{a:.1f}" y="{bottom + 16}">{_tick(tick)}</text>')
        for tick in [] if self.bare else self.y.ticks():
            b = self.at(self.x.low, tick)[1]
            grid.append(f'<line class="grid" x1="{self.left}" x2="{WIDTH - RIGHT}" y1="{b:.1f}" y2="{b:.1f}"/><text class="tick end" x="{self.left - 6}" y="{b + 4:.1f}">{_tick(tick)}</text>')
        labels = f'<text class="label mid" x="{(self.left + WIDTH - RIGHT) / 2:.0f}" y="{self.height - 10}">{escape(self.x_label)}</text>'
        if self.y_label:
            labels += f'<text class="label mid" transform="translate(13 {(TOP + bottom) / 2:.0f}) rotate(-90)">{escape(self.y_label)}</text>'
        return f'<svg viewBox="0 0 {WIDTH} {self.height}" role="img" aria-label="{escape(title)}">{"".join(grid)}{"".join(self.parts)}{labels}</svg>'


def figure(title: str, body: str, about: str, missing: int, head: Sequence[str], rows: Sequence[Sequence[object]], kinds: Sequence[str]) -> str:
    """A chart with its name, its legend, what it tells, and its numbers."""
    legend = "".join(f'<span><svg viewBox="0 0 12 12" aria-hidden="true">{_mark(6, 6, i, 4)}</svg>{escape(k)}</span>' for i, k in enumerate(kinds))
    lost = f" {missing} {'value was' if missing == 1 else 'values were'} not measured and {'is' if missing == 1 else 'are'} left out." if missing else ""
    numbers = f"<details><summary>The numbers</summary>{table(head, rows)}</details>" if rows else ""
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{body}' + (f'<p class="legend">{legend}</p>' if legend else "")
        + (f'<p class="about">{escape((about + lost).strip())}</p>' if about or lost else "") + numbers + "</figure>"
    )  # fmt: skip


def _mark(a: float, b: float, kind: int, size: float, inside: str = "") -> str:
    """A circle, square, triangle or diamond: kinds differ in shape and not in colour alone."""
    kind %= KINDS
    shape = (
        f'circle cx="{a:.1f}" cy="{b:.1f}" r="{size}"', f'rect x="{a - size:.1f}" y="{b - size:.1f}" width="{2 * size}" height="{2 * size}"',
        f'path d="M{a:.1f} {b - 1.3 * size:.1f}l{1.2 * size:.1f} {2.2 * size:.1f}h{-2.4 * size:.1f}z"',
        f'path d="M{a:.1f} {b - 1.4 * size:.1f}l{1.4 * size:.1f} {1.4 * size:.1f}l{-1.4 * size:.1f} {1.4 * size:.1f}l{-1.4 * size:.1f} {-1.4 * size:.1f}z"',
    )[kind if kind < 4 else 0]  # fmt: skip
    return f'<{shape} class="mark k{kind}">{inside}</{shape.split()[0]}>'


def _thinned(curve: Sequence[tuple[float | None, float | None]], most: int = 60) -> list[tuple[float | None, float | None]]:
    """Evenly spaced points of a long curve, the last among them."""
    if len(curve) <= most:
        return list(curve)
    return [curve[round(i * (len(curve) - 1) / (most - 1))] for i in range(most)]


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _tick(value: float) -> str:
    size = abs(value)
    if size < 1e-12:
        return "0"
    if 999.5 <= size < 1e5:
        return f"{value:,.0f}"
    return f"{value:.3g}" if 1e-3 <= size < 1e3 else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
