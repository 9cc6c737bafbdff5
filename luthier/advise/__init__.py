"""Advice before tuning: what the data and the model are like, and two or three recipes that follow from it.

    luthier.advise("smollm2-135m", "train.jsonl", folder="advice").proposals[0].yaml()

Every reason is a signal measured on these rows, or our own evidence with its claim; what neither supports is called a default. The
first recipe is the safe one, and a comparison on the user's own rows has the last word.
"""

from __future__ import annotations

import json
import shlex
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.errors import UserError

__all__ = ["Advice", "advise"]


@dataclass
class Advice:
    """What was seen and what follows."""

    signals: list[Any]
    model: Any
    probe: Any
    proposals: list[Any]
    """The plain recipe first."""
    left_out: list[str]
    """Methods that a signal asks for and our evidence speaks against."""
    notices: list[str]

    @property
    def verdict(self) -> str:
        """The advice in a sentence."""
        first, better = self.proposals[0], [p for p in self.proposals[1:] if p.reproduced]
        if better:
            return f"{' and '.join(p.name for p in better)} reproduced here and these rows ask for it; {first.title} is what it has to beat."
        return f"Nothing that these rows ask for has evidence of beating it: {first.title}."

    @property
    def command(self) -> str:
        """What would settle it."""
        return shlex.join(["luthier", "compare", *(p.file or f"{i}-{p.name}.yaml" for i, p in enumerate(self.proposals, 1))])

    def to_dict(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict, "signals": {s.name: s.to_dict() for s in self.signals}, "model": self.model.to_dict(), "probe": self.probe.to_dict(),
            "proposals": [p.to_dict() for p in self.proposals], "left_out": self.left_out, "notices": self.notices, "compare": self.command,
        }  # fmt: skip


def advise(
    model: Any, data: Any, test: Any = None, general: Any = None, probe: float | None = None, folder: str | Path | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Advice:  # fmt: skip
    """Look at rows and a model, and propose recipes.

    model, data, test, general: as a recipe names them. probe: minutes for short runs; None: none. folder: where the recipes are written, and
    signals kept. tell: is given a line of what is being done."""
    from luthier.advise import model as models
    from luthier.advise.data import look
    from luthier.advise.probe import Probe, no_room
    from luthier.advise.probe import probe as probed
    from luthier.advise.propose import Look, plain, propose
    from luthier.advise.reading import read
    from luthier.core.context import Context
    from luthier.core.loading import load_streams
    from luthier.core.models import load
    from luthier.core.preflight import preflight
    from luthier.recipe import Recipe, check

    named = dict(data) if isinstance(data, Mapping) and "train" in data else {"train": data}
    named |= {k: v for k, v in (("test", test), ("general", general)) if v is not None}
    target = _target(folder, model, named)
    recipe = Recipe.from_dict({"model": model, "data": named})
    notices = check(recipe)
    tell("Reading the rows ...")
    streams = load_streams(recipe.data.to_dict(), base=recipe.base, tell=notices.append)
    rows = streams["train"]
    family = load(recipe.model_spec())
    loaded = {"model": family, "data": {**recipe.data.streams, "train": [rows[0]]}}
    check(Recipe.from_dict(loaded))
    tell("Asking the model about them ...")
    fitting = preflight(rows, family, recipe.data.train_on, recipe.data.max_length, "skip")
    notices += [*family.notices, *fitting.notices]
    facts = models.look(family, fitting.rows)
    ctx = Context(family, 0, streams, folder=target, train_on=recipe.data.train_on)
    signals = [*look(rows), *read(rows, fitting.rows, streams.get("general"), family, ctx, recipe.data.max_length)]
    start = {k: v for k, v in recipe.to_dict().items() if k in ("model", "data")}
    seen = Look(start, loaded, rows.kind, facts, {s.name: s for s in signals}, "general" in streams, Probe())
    if probe is not None:
        seen.probe = probed(family, fitting.rows, plain(seen).recipe, probe, tell) if facts.has_room_for_a_copy else no_room()
    proposals, left_out = propose(seen)
    made = Advice(signals, facts, seen.probe, proposals, left_out, list(dict.fromkeys(notices)))
    return made if target is None else _written(made, target)


def _target(folder: str | Path | None, model: Any, named: Mapping[str, Any]) -> Path | None:
    """Where to write; recipes that are there may have been changed by hand, and a file cannot name what exists in memory only."""
    if folder is None:
        return None
    if hasattr(model, "network") or any(not isinstance(one, (str, Path)) for v in named.values() for one in (v if isinstance(v, list) else [v])):
        raise UserError("A recipe file can only name a model and rows that have a name or a path; leave the folder out and take `proposals[0].recipe` instead.")
    target = Path(folder).expanduser()
    if target.is_file():
        raise UserError(f"{target} is a file; name a folder with --out.")
    if any(target.glob("*.yaml")):
        raise UserError(f"{target} already holds recipes; name a new or an empty folder with --out.")
    return target


def _written(made: Advice, folder: Path) -> Advice:
    """Each recipe as a file, its reasons above it, and all that was seen beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, one in enumerate(made.proposals, 1):
        file = folder / f"{number}-{one.name}.yaml"
        one.file = str(file)
        head = "".join(f"# {' '.join(line.split())}\n" for line in [one.title, *(f"- {r.said} [{r.source}]" for r in one.reasons)])
        file.write_text(head + one.yaml(), encoding="utf-8")
    (folder / "advice.json").write_text(json.dumps(made.to_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return made


class _Callable(types.ModuleType):
    """`luthier.advise` is this package and, called, what it is for."""

    def __call__(self, *given: Any, **named: Any) -> Advice:
        return advise(*given, **named)


sys.modules[__name__].__class__ = _Callable
