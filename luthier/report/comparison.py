"""A comparison as a page: what came of it, quality against forgetting and every other pair of numbers, costs, and how to repeat it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from luthier._compare.judge import WORDS, Difference, Number, interval, mean_of, shortest
from luthier.report.charts import Interval, Point, intervals, scatter
from luthier.report.html import Raw, code, columns, details, paragraphs, section, table, text
from luthier.report.html import page as whole

if TYPE_CHECKING:
    from luthier.compare import Comparison

QUIET = Raw("<noscript><style>.filters{display:none}</style></noscript>")
"""Buttons that do nothing without script are not shown without it."""


def page(found: Comparison) -> str:
    """The whole file."""
    names = [a.name for a in found.arms]
    sections = [
        section("What came of it", _verdict(found), _forest(found)),
        section("Side by side", _planes(found)),
        section("All numbers", _means(found), details("Every seed", _seeds(found))),
        section("Differences", _differences(found)),
        section("Cost", _cost(found)),
        section("What differs", _recipes(found)),
        section("Repeat it", code(found.command), paragraphs(f"The recipes are in {found.folder / 'arms'}, the runs in {found.folder / 'runs'}."), paragraphs(*found.notes)),
    ]
    seeds = ", ".join(map(str, found.seeds))
    words = f"{len(names)} arms, {'seed' if len(found.seeds) == 1 else 'seeds'} {seeds}, compared with {found.reference}."
    header = f"<h1>{text(', '.join(names))}</h1>{paragraphs(words)}"
    return whole(f"Comparison: {', '.join(names)}", header, sections, "Made by luthier compare.")


# -- what came of it -----------------------------------------------------------------------------------------------------------


def _verdict(found: Comparison) -> Raw:
    first, *rest = found.verdict
    outcomes = {d.outcome for d in found.differences if d.key == found.numbers[0].key}
    mood = " good" if "better" in outcomes else " bad" if outcomes == {"worse"} else ""
    failures = [f"Failed: {name}, seed {seed}: {why}" for name, errors in found.failed.items() for seed, why in errors.items()]
    warned = Raw("".join(f'<p class="bad">{text(s)}</p>' for s in (*found.unequal, *failures)))
    return Raw(f'<div class="verdict{mood}"><p>{text(first)}</p></div>' + paragraphs(*rest) + warned)


def _forest(found: Comparison) -> str:
    """The main number of every arm less that of the reference, with its interval and every seed."""
    main = found.numbers[0]
    k = WORDS[main.unit][0]
    drawn = [d for d in found.differences if d.key == main.key]
    rows = [Interval(d.arm, _times(d.mean, k), _times(d.low, k), _times(d.high, k), tuple(v * k for v in d.each)) for d in drawn]
    title, unit = f"{main.label}, less that of {found.reference}", WORDS[main.unit][3]
    joint = " that hold together for all arms" if len(drawn) > 1 else ""
    about = f"Mean paired differences with 95 % intervals{joint}; small dots are single seeds. {main.better.capitalize()} is better."
    return intervals(title, rows, f"{main.label}, {unit}" if unit else main.label, about)


# -- pairs of numbers ----------------------------------------------------------------------------------------------------------


def _planes(found: Comparison) -> Raw:
    """A scatter for every pair of numbers that were measured; with script one at a time, chosen by its button."""
    known = [n for n in found.numbers if any(n.of(r) is not None for runs in found.runs.values() for r in runs.values())]
    pairs = list(itertools.combinations(known, 2))
    if not pairs:
        return Raw("")
    buttons = "".join(f'<button type="button" value="{a.key}-{b.key}">{a.key} and {b.key}</button>' for a, b in pairs)
    planes = "".join(f'<div class="plane" data-is="{a.key}-{b.key}">{_plane(found, b, a)}</div>' for a, b in pairs)
    return Raw(f'{QUIET}<div class="filters" data-of=".plane" role="group" aria-label="Which two numbers">{buttons}</div>{planes}')


def _plane(found: Comparison, x: Number, y: Number) -> str:
    """Arms in one plane: means with whiskers, and every seed as a dot."""
    points = []
    for kind, arm in enumerate(found.arms):
        runs = found.runs[arm.name]
        (a, *across), (b, *up) = ([_times(v, WORDS[n.unit][0]) for v in mean_of(n, runs)] for n in (x, y))
        points.append(Point(a, b, arm.name, kind, (across[0], across[1]), (up[0], up[1]), 5.5))
        each = [(_times(x.of(r), WORDS[x.unit][0]), _times(y.of(r), WORDS[y.unit][0])) for r in runs.values()]
        points += [Point(c, d, kind=kind, size=2.2) for c, d in each if c is not None and d is not None and len(each) > 1]
    about = f"Large marks are means with 95 % intervals over the seeds, small ones single seeds. {x.better.capitalize()} is better across, {y.better} upwards."
    return scatter(f"{y.key.capitalize()} against {x.key}", points, _axis(x), _axis(y), [a.name for a in found.arms], about, named=True, numbers=False)


def _axis(number: Number) -> str:
    unit = WORDS[number.unit][2]
    return f"{number.label}, {unit}" if unit else number.label


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


# -- tables ----------------------------------------------------------------------------------------------------------------------


def _means(found: Comparison) -> Raw:
    rows: list[Sequence[Any]] = []
    for arm in found.arms:
        runs = found.runs[arm.name]
        ended = sum(not r["error"] for r in runs.values())
        rows.append((arm.name, *(_spread(n, runs) for n in found.numbers), f"{ended} of {len(runs)}", _standing(found, arm.name)))
    about = "Means over the seeds with their 95 % intervals. ↑: higher is better, ↓: lower is."
    return table(("arm", *(f"{n.label} {'↑' if n.better == 'higher' else '↓'}" for n in found.numbers), "seeds", "by means"), rows, about)


def _spread(number: Number, runs: Any) -> str:
    mean, low, high = mean_of(number, runs)
    return number.show(mean) + ("" if low is None else f" ({number.show(low)} to {number.show(high)})")


def _standing(found: Comparison, arm: str) -> str:
    by = found.beaten.get(arm)
    return "failed" if by is None else f"beaten by {', '.join(by)}" if by else "unbeaten"


def _seeds(found: Comparison) -> Raw:
    rows = [
        (arm.name, str(seed), *(n.show(n.of(r)) for n in found.numbers), r["error"] or _report(found, r))
        for arm in found.arms for seed, r in found.runs[arm.name].items()
    ]  # fmt: skip
    return table(("arm", "seed", *(n.label for n in found.numbers), ""), rows, "Every run.")


def _report(found: Comparison, run: dict[str, Any]) -> str:
    """A link to the run's own report, which lies below this page."""
    report = Path(run["run"]) / "report.html"
    return Raw(f'<a href="{quote(report.relative_to(found.folder).as_posix())}">its report</a>') if report.is_file() else "ended"


def _differences(found: Comparison) -> Raw:
    others = [a.name for a in found.arms if a.name != found.reference]
    by = {(d.arm, d.key): d for d in found.differences}
    rows = [(name, *(_difference(n, by[name, n.key]) for n in found.numbers)) for name in others]
    least = [(name, *(shortest(n, by[name, n.key].smallest) for n in found.numbers)) for name in others]
    heads = ("arm", *(n.label for n in found.numbers))
    return Raw(
        table(heads, rows, f"Arm less {found.reference}, seed by seed: mean and 95 % interval. Green and red are told apart from chance.")
        + details("What could have shown", table(heads, least, "The smallest mean difference that these seeds could have told from chance."))
    )  # fmt: skip


def _difference(number: Number, d: Difference) -> Raw:
    words = text(interval(number, d))
    return Raw(f'<span class="{"good" if d.outcome == "better" else "bad"}">{words} {d.outcome}</span>' if d.outcome in ("better", "worse") else words)


def _cost(found: Comparison) -> Raw:
    from luthier._cli.compare import COSTS, cost_rows

    about = "Of one run, on average. The training is the loop alone; the whole run has choosing rows and measuring in it."
    return table(("arm", *(name for _, name, _ in COSTS)), cost_rows(found), about)


def _recipes(found: Comparison) -> Raw:
    rows = [(key, *(a.differs[key] for a in found.arms)) for key in found.arms[0].differs]
    whole_recipes = [details(f"The whole recipe of {a.name}", code(a.recipe.to_yaml())) for a in found.arms]
    return Raw(table(("", *(a.name for a in found.arms)), rows) + columns(*whole_recipes))
