"""`luthier merge A B C --method M`: its arguments, its progress and what it says."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import Any

from luthier._cli.text import say, say_json
from luthier._cli.words import split_options
from luthier.errors import UserError


def add_arguments(one: argparse.ArgumentParser) -> None:
    one.add_argument("words", nargs="*", metavar="MODEL|option=value", help="folders, runs, adapters, embedded names or hub ids; and the merger's options, e.g. density=0.3")
    one.add_argument("--method", default="uniform-soup", help="a merger, see `luthier methods merge`; default: uniform-soup")
    one.add_argument("--base", help="the model that these were tuned from; adapters name theirs")
    one.add_argument("--out", default="merged", metavar="FOLDER", help="where to write; the folder of an interrupted merge continues it; default: merged")
    one.add_argument("--val", metavar="ROWS", help="validation rows, for mergers that choose by them")
    one.add_argument("--shard", default="5GB", help="the largest file, e.g. 500MB; default: 5GB")
    one.add_argument("--quiet", action="store_true", help="print only the folder")


def merge(args: argparse.Namespace) -> None:
    from luthier.merging import merge as run

    models, options = split_options(args.words)
    args.again = shlex.join(["luthier", "merge", *args.words, *(x for k in ("method", "base", "out", "val", "shard") if getattr(args, k) for x in (f"--{k}", getattr(args, k)))])
    tell = None if args.quiet or args.json else say
    bar = _Bar(not (args.quiet or args.json))
    found = run(models, args.method, args.out, args.base, options, args.val, _bytes(args.shard), bar, tell)
    bar.end()
    if args.json:
        say_json({**vars(found), "folder": str(found.folder)})
    elif args.quiet:
        say(str(found.folder))
    else:
        of = f" with what they changed of {found.base}" if found.base else ""
        say(f"{found.method} of {len(found.models)} models{of}: {found.tensors} tensors, {found.bytes / 1e6:,.1f} MB in {found.folder}")
        for name, value in found.report.items():
            say(f"{name.replace('_', ' ')}: {value}")


def _bytes(text: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = text[:-2], text[-2:].upper()
    try:
        size = int(float(number) * units[unit])
    except (KeyError, ValueError):
        size = 0
    if size < 1:
        raise UserError(f"--shard takes a size such as 500MB or 5GB, not '{text}'.")
    return size


class _Bar:
    """A live line in a terminal, a line for every tenth elsewhere."""

    def __init__(self, show: bool) -> None:
        self.show, self.tenth = show, 0

    def __call__(self, done: int, total: int, name: str) -> Any:
        if not self.show:
            return
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{done} of {total} tensors: {name}")
            sys.stderr.flush()
        elif 10 * done // total > self.tenth:
            self.tenth = 10 * done // total
            say(f"{done} of {total} tensors")

    def end(self) -> None:
        if self.show and sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")
