"""`luthier advise`: what the data and the model are like, and which recipes follow from it."""

from __future__ import annotations

import argparse
import sys
import textwrap
from typing import TYPE_CHECKING

from luthier._cli.text import paragraph, say, say_json, width

if TYPE_CHECKING:
    from luthier.advise import Advice
    from luthier.advise.data import Signal

MINUTES = 2.0
LAST = "Evidence comes from the lab's small models and tasks; only a comparison on your own rows tells what holds there:"


def add_arguments(one: argparse.ArgumentParser) -> None:
    one.add_argument("--model", required=True, help="an embedded name, a hub id or a folder")
    one.add_argument("--data", required=True, help="training rows: a file, a folder, lab:TASK or a hub id")
    one.add_argument("--test", help="test rows")
    one.add_argument("--general", help="rows of what the model must not forget")
    about = f"choose the learning rate and see whether more rows would help, by short runs of so many minutes in all (default {MINUTES:g})"
    one.add_argument("--probe", nargs="?", const=MINUTES, type=float, metavar="MINUTES", help=about)
    one.add_argument("--out", metavar="FOLDER", help="write the recipes and what was seen")


def advise(args: argparse.Namespace) -> None:
    from luthier.advise import advise as look
    from luthier.errors import UserError

    if args.probe is not None and not 0 < args.probe < float("inf"):
        raise UserError(f"--probe takes a number of minutes above 0, not {args.probe:g}.")
    made = look(args.model, args.data, args.test, args.general, args.probe, args.out, lambda line: print(line, file=sys.stderr, flush=True))
    if args.json:
        say_json(made.to_dict())
    else:
        say(text(made))


def text(made: Advice) -> str:
    """All of it, for reading."""
    parts = ["\n".join(_seen("The rows", _measured(made.signals))), "\n".join(_seen("The model", made.model.lines))]
    if made.probe.lines:
        parts.append("\n".join(_seen("Short runs", made.probe.lines)))
    if made.notices:
        parts.append("\n".join(["Worth knowing", *(_hung("  - ", n, 4) for n in made.notices)]))
    for number, one in enumerate(made.proposals, 1):
        reasons = [_hung("  - ", f"{r.said} [{r.source}]", 4) for r in one.reasons]
        recipe = [] if one.file else ["", *(f"    {line}" for line in one.yaml().splitlines())]
        parts.append("\n".join([f"{number}. {one.title}" + (f"   {one.file}" if one.file else ""), *reasons, *recipe]))
    if made.left_out:
        parts.append("\n".join(["Not proposed", *(_hung("  - ", line, 4) for line in made.left_out)]))
    unwritten = "" if made.proposals[0].file else "   (write the recipes with --out FOLDER)"
    return "\n\n".join([*parts, paragraph(made.verdict), f"{paragraph(LAST)}\n  {made.command}{unwritten}"])


def _measured(signals: list[Signal]) -> list[tuple[str, str]]:
    """What was measured, then what was not, by its reason."""
    missing: dict[str, list[str]] = {}
    for one in signals:
        if one.value is None:
            missing.setdefault(one.said.removeprefix("not measured: "), []).append(one.name)
    return [*((s.name, s.said) for s in signals if s.value is not None), *(("not measured", f"{', '.join(names)}: {why}") for why, names in missing.items())]


def _seen(title: str, lines: list[tuple[str, str]]) -> list[str]:
    """Names in a column, what is said of each wrapped beside it."""
    column = max(len(name) for name, _ in lines) + 4
    return [title, *(_hung(f"  {name}".ljust(column), said, column) for name, said in lines)]


def _hung(head: str, said: str, column: int) -> str:
    return textwrap.fill(said, min(width(), 100), initial_indent=head, subsequent_indent=" " * column)
