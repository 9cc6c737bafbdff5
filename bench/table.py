"""What was measured, as bench/results.json and bench/RESULTS.md. Rows that were not run this time stay as they were."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from bench.case import Row
from bench.parts import sentence
from bench.run import as_json

HERE = Path(__file__).parent
HEAD = """# Speed and memory

Measured by `make bench`. Every figure is a ratio within one run on one machine: both sides get the same model, rows, order, precision, threads, batch and
micro-batch, run in turns in fresh processes, and must first compute the same numbers (losses and gradient norms of every step, log-probabilities, picks, merged weights) - else
nothing is reported. Seconds are medians without the first step. Memory is the most that was allocated beyond the loaded model. `of the bound` is the share of
what is possible: the time of the operations that cannot be avoided at the rate of matrix products that the machine shows between the steps, or the floor that is named below, over our time.
"""


def merged(rows: Iterable[Row], file: Path, order: Sequence[str]) -> list[Row]:
    """The new rows with those of the file that they do not replace, in the table's order."""
    known = {f.name for f in fields(Row)}
    old = json.loads(file.read_text(encoding="utf-8")).get("rows", []) if file.exists() else []
    found = {r["name"]: Row(**{k: v for k, v in r.items() if k in known}) for r in old} | {r.name: r for r in rows}
    return [found[name] for name in order if name in found]


def write(rows: Sequence[Row], scaling: dict[str, Any], folder: Path = HERE) -> None:
    """Both files, from the same numbers."""
    found = {"rows": [as_json(row) for row in rows], "scaling": scaling}
    (folder / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (folder / "RESULTS.md").write_text(markdown(rows, scaling), encoding="utf-8")


def markdown(rows: Sequence[Row], scaling: dict[str, Any]) -> str:
    head = "| work | against | times as fast | goal | extra memory, ours / theirs | of the bound | |\n|---|---|---|---|---|---|---|\n"
    text = HEAD + "\n" + head + "".join(_line(row) for row in rows) + "\n" + "\n".join(_details(row) for row in rows)
    if scaling:
        text += "\n## How it grows\n\nMeasured and, dashed, in proportion to the largest size. `python -m bench scaling` repeats it.\n\n"
        text += "".join(f"- {found['title']}: {growth(found['points'])}{rates(found)}\n" if found.get("points") else f"- {name}: failed: {found['failed']}\n" for name, found in sorted(scaling.items()))
        for name, found in sorted(scaling.items()):
            for kind in ("points", "rate"):
                text += f"\n![{found['title']}](plots/{name}{'-rate' * (kind == 'rate')}.svg)" if found.get(kind) else ""
        text += "\n"
    return text


def growth(points: Sequence[Sequence[float]]) -> str:
    """How much more the largest size takes than the smallest."""
    (small, least), (large, most) = min(tuple(p) for p in points), max(tuple(p) for p in points)
    return f"{large / small:g} times the size ({small:g} to {large:g}) takes {most / least:.2f} times as much" if least > 0 else f"from {least:.3g} to {most:.3g}"


def rates(found: dict[str, Any]) -> str:
    """How much is done a second, from the smallest size to the largest."""
    return f"; {found['unit']} a second: {', '.join(f'{rate:,.3g}' if rate < 1000 else f'{rate:,.0f}' for _, rate in found['rate'])}" if found.get("rate") else ""


def _line(row: Row) -> str:
    if row.failed:
        return f"| {row.work} | {row.peer or '-'} | - | {goal_of(row)} | - | - | failed, see below |\n"
    ratio = "-" if row.ratio is None else f"**{row.ratio:.2f}**"
    memory = bytes_of(row.extra_bytes) if row.memory_ratio is None else f"{bytes_of(row.extra_bytes)} / {bytes_of(row.peer_extra_bytes)} = {row.memory_ratio:.2f}"
    share = "-" if row.share is None else f"{100 * row.share:.0f} %"
    return f"| {row.work} | {row.peer or '-'} | {ratio} | {goal_of(row)} | {memory} | {share} | {'missed: ' + ', '.join(row.missed()) if row.missed() else 'reached'} |\n"


def goal_of(row: Row) -> str:
    """The goals in words."""
    words = {"speed": "at least {:.1f} times", "memory": "at most {:.1f} of the memory", "seconds": "at most {:g} s"}
    found = [words[k].format(v) for k, v in row.goal.items() if v is not None and k in words]
    return ", ".join([*found, *([f"at most {bytes_of(row.goal['bytes'])}"] if row.goal.get("bytes") else [])]) or "-"


def _details(row: Row) -> str:
    said = [f"## {row.name}", "", f"{row.work}. `{row.command}` repeats it.", ""]
    if row.failed:
        return "\n".join([*said, f"- failed: {row.failed}", ""])
    said.append(f"- ours: {seconds_of(row.seconds)} a {row.unit}" + (f", {seconds_of(row.whole_seconds)} in all" if row.whole_seconds is not None else ""))
    if row.peer_seconds is not None:
        said.append(f"- {row.peer}: {seconds_of(row.peer_seconds)} a {row.unit}; {row.ratio:.2f} times ours, {row.cpu_ratio:.2f} times in seconds of the cores")
        said.append(f"- the same {row.values} numbers on both sides within {row.difference:.1e}, in each of {row.repeats} turns")
    if row.settings:
        said.append(f"- the peer's settings: {row.settings}")
    if row.bound_seconds is not None:
        said.append(f"- the bound: {row.bound}: {seconds_of(row.bound_seconds)}, {100 * (row.share or 0):.0f} % of which is reached; the rest is {row.rest}")
    if row.parts:
        kernels = row.parts["products"] + row.parts["attention"]
        said.append(f"- where it goes: {sentence(row.parts)}; with products and attention alone, as fast as these are, {100 * (row.share or 0) / kernels:.0f} % of the bound would be reached")
    return "\n".join([*said, f"- on {row.about}", ""])


def seconds_of(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1e3 * seconds:.3g} ms" if seconds >= 1e-4 else f"{1e6 * seconds:.3g} µs"


def bytes_of(size: float | None) -> str:
    return "-" if size is None else f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
