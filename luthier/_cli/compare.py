"""`luthier compare ...`: its arguments, and a comparison as plain text."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier._cli.text import paragraph, say, say_json, table
from luthier.errors import UserError

if TYPE_CHECKING:
    from luthier.compare import Comparison


class SomeFailed(UserError):
    """The comparison stands, without some runs."""

    exit_code = 1


def add_arguments(one: argparse.ArgumentParser) -> None:
    one.add_argument("words", nargs="*", metavar="RECIPE|key=value", help="recipe files, presets or run folders; and values to change in all of them, e.g. train.steps=100")
    one.add_argument("--vary", action="append", metavar="KEY=A,B", help="a key and its values, e.g. objective.method=sft,asft; several make every combination")
    one.add_argument("--seeds", default="3", help="how many seeds (3: 0, 1 and 2), or which, e.g. 0,5,7; default: 3")
    one.add_argument("--against", metavar="NAME", help="the arm that the others are compared with; default: the first")
    one.add_argument("--model", help="an embedded name, a hub id or a folder")
    one.add_argument("--data", help="training rows: a file, a folder, lab:TASK or a hub id")
    one.add_argument("--test", help="test rows")
    one.add_argument("--out", metavar="FOLDER", help="where to write; the folder of an interrupted comparison continues it")


def compare(args: argparse.Namespace, recipe_of: Callable[[argparse.Namespace], Any]) -> None:
    """`recipe_of` makes one recipe of a name, overrides, --model, --data and --test."""
    from luthier.compare import ROOT
    from luthier.compare import compare as run

    names = [w for w in args.words if "=" not in w or Path(w).is_file()]
    overrides = [w for w in args.words if w not in names]
    if not names and not (args.model and args.data):
        example = "luthier compare --model smollm2-135m --data train.jsonl --vary objective=sft,asft"
        raise UserError(f"Name recipes (luthier compare a.yaml b.yaml), or a model, data and what to vary: {example}")
    given = {"model": args.model, "data": args.data, "test": args.test, "run": None}
    recipes = {n: recipe_of(argparse.Namespace(words=[*([n] if n else []), *overrides], **given)) for n in names or [""]}
    out = args.out or str(ROOT / f"{Path((names or ['recipes'])[0]).stem}-{time.strftime('%Y%m%d-%H%M%S')}")
    args.again = _again(args, out)
    stream = sys.stderr if args.json else sys.stdout
    found = run(recipes, args.vary, _seeds(args.seeds), args.against, out, quiet=False, tell=lambda line: print(line, file=stream, flush=True))
    if args.json:
        say_json(found.to_dict())
    else:
        say("\n" + found.text.rstrip())
    if found.failed:
        raise SomeFailed(f"{sum(map(len, found.failed.values()))} of {len(found.arms) * len(found.seeds)} runs failed; try these again with: {args.again}")


def _seeds(text: str) -> int | list[int]:
    try:
        return [int(s) for s in text.split(",") if s.strip()] if "," in text else int(text)
    except ValueError:
        raise UserError(f"--seeds takes a count such as 3, or seeds such as 0,5,7; not '{text}'.") from None


def _again(args: argparse.Namespace, out: str) -> str:
    """The command that continues this comparison."""
    options = [("--vary", v) for v in args.vary or []] + [(f"--{k}", getattr(args, k)) for k in ("seeds", "against", "model", "data", "test") if getattr(args, k)]
    return shlex.join(["luthier", "compare", *args.words, *(word for pair in options for word in pair), "--out", out])


# -- as text -----------------------------------------------------------------------------------------------------------------


def told(found: Comparison) -> str:
    """A comparison in words and tables."""
    reference, names = found.reference, [a.name for a in found.arms]
    parts = [
        [paragraph(f"{len(names)} arms over {len(found.seeds)} {'seed' if len(found.seeds) == 1 else 'seeds'} ({', '.join(map(str, found.seeds))}), compared with {reference}.")],
        [paragraph(sentence) for sentence in found.verdict],
        [paragraph(sentence) for sentence in found.unequal],
        [f"FAILED: {name}, seed {seed}: {why}" for name, errors in found.failed.items() for seed, why in errors.items()],
        ["Means over the seeds (*: no other arm is as good in everything and better in something)", _means(found)],
        [f"Less {reference}: mean difference, seed by seed (95 % interval)", _differences(found)],
        ["Cost of a run, on average", _cost(found)],
        ["What differs", table(("", *names), [(key, *(a.differs[key] for a in found.arms)) for key in found.arms[0].differs])],
        [paragraph(sentence) for sentence in found.notes],
        [f"Again: {found.command}", f"Look at: {found.page}"],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _means(found: Comparison) -> str:
    from luthier._compare.judge import mean_of

    rows = []
    for arm in found.arms:
        runs = found.runs[arm.name]
        ended = sum(not r["error"] for r in runs.values())
        rows.append((arm.name, *(n.show(mean_of(n, runs)[0]) for n in found.numbers), f"{ended} of {len(runs)}", "failed" if not ended else "*" if arm.name in found.front else ""))
    return table(("arm", *(n.label for n in found.numbers), "seeds", ""), rows)


def _differences(found: Comparison) -> str:
    from luthier._compare.judge import interval

    rows = []
    for arm in found.arms:
        if arm.name != found.reference:
            told = [(n, d) for n in found.numbers if (d := found.difference(arm.name, n.key))]
            rows += [(arm.name if i == 0 else "", n.label, interval(n, d), OUTCOMES.get(d.outcome, d.outcome)) for i, (n, d) in enumerate(told)]
    return table(("arm", "number", "difference", ""), rows)


OUTCOMES = {"unclear": "not told apart", "same": "", "constant": "no spread"}
"""What a table says of a difference; the others say themselves."""
COSTS = (
    ("train_seconds", "training", "{:.1f} s"), ("seconds", "whole run", "{:.1f} s"), ("steps", "steps", "{:,.0f}"), ("rows", "rows", "{:,.0f}"),
    ("tokens", "tokens", "{:,.0f}"), ("parameters", "trained parameters", "{:,.0f}"),
)  # fmt: skip
"""Parts of the cost, their names and how they are written. Peak memory is among the numbers."""


def cost_rows(found: Comparison) -> list[tuple[str, ...]]:
    """An arm a row: the mean of each part of the cost."""
    rows = []
    for arm in found.arms:
        ended = [r["cost"] for r in found.runs[arm.name].values() if not r["error"]]
        means = [_mean([c.get(key) for c in ended]) for key, _, _ in COSTS]
        rows.append((arm.name, *("-" if m is None else how.format(m) for m, (_, _, how) in zip(means, COSTS))))
    return rows


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _cost(found: Comparison) -> str:
    return table(("arm", *(name for _, name, _ in COSTS)), cost_rows(found))
