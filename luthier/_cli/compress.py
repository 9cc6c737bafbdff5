"""`luthier compress RUN --method M`: its arguments and what it says."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from luthier._cli.text import say, say_json, table
from luthier._cli.words import split_options
from luthier.errors import UserError

if TYPE_CHECKING:
    from luthier.compressing import Compressed

NONE = "-"


def add_arguments(one: argparse.ArgumentParser) -> None:
    one.add_argument("words", nargs="*", metavar="MODEL|option=value", help="a run, a folder, an adapter, an embedded name or a hub id; and the compressor's options, e.g. drop=4")
    one.add_argument("--method", required=True, help="a compressor, see `luthier methods compress`")
    one.add_argument("--out", default="compressed", metavar="FOLDER", help="where to write; default: compressed")
    one.add_argument("--data", metavar="ROWS", help="rows to calibrate on; default: the run's training rows")
    one.add_argument("--test", metavar="ROWS", help="rows to measure the loss on; default: the run's test rows, else a tenth of --data")
    one.add_argument("--base", help="the model that this was tuned from; runs and adapters know theirs")
    one.add_argument("--device", default="auto", help="cpu, cuda or mps; default: the best there is")


def compress(args: argparse.Namespace) -> None:
    from luthier.compressing import compress as run

    models, options = split_options(args.words)
    if len(models) != 1:
        raise UserError(f"Name one model to compress, e.g. `luthier compress runs/mine --method {args.method}`" + (f"; these are {len(models)}." if models else "."))
    found = run(models[0], args.method, args.out, options, args.data, args.test, args.base, args.device, None if args.json else say)
    if args.json:
        say_json({**vars(found), "before": vars(found.before), "after": vars(found.after), "folder": str(found.folder)})
        return
    say(f"{found.method} of {found.model}, written to {found.folder} for {'peft' if found.adapter else 'transformers'}\n")
    say(table(("", "before", "after", "change"), lines(found)))
    for note in found.notes:
        say(f"\n{note}")


def lines(found: Compressed) -> list[tuple[str, str, str, str]]:
    """The comparison, a line a figure."""
    old, new = found.before, found.after
    made = [
        _line("weight files, MB", old.disk_bytes, new.disk_bytes, 1e-6),
        _line("packed file, MB", None, new.packed_bytes, 1e-6, old.disk_bytes),
        _line("weights in memory, MB", old.memory_bytes, new.memory_bytes, 1e-6),
        _line("parameters, million", old.parameters, new.parameters, 1e-6),
        _line(f"scored {found.unit} a second", old.scored_per_second, new.scored_per_second),
        _line("decoded tokens a second", old.decoded_per_second, new.decoded_per_second),
        _line(f"loss on {found.rows} held-out rows", old.loss, new.loss),
    ]
    made += [_line(f"{name} ({way} is better)", old.measures.get(name), new.measures.get(name)) for name, way in found.better.items()]
    return [line for line in made if line[1:3] != (NONE, NONE)]


def _line(what: str, old: Any, new: Any, unit: float = 1.0, than: Any = None) -> tuple[str, str, str, str]:
    """The change is a ratio of sizes and speeds, and of losses and measures too where the old one is no zero."""
    start = old if than is None else than
    change = f"x {new / start:.3g}" if start and new is not None else NONE
    return what, *(NONE if value is None else f"{value * unit:,.4g}" for value in (old, new)), change  # type: ignore[return-value]  # four words
