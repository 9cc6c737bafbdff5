"""Recipes head to head: the same seeds for all, equal budgets or a word about it, and only what is more than chance is called a difference.

    import luthier
    found = luthier.compare("recipe.yaml", vary={"objective.method": ["sft", "asft"]}, seeds=3)
    print(found.text)

Every run is a run folder of its own below the comparison's. The same folder given again continues: a finished run is never done
again, an interrupted one goes on to the very weights that it would have reached.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from luthier._compare import judge
from luthier._compare.arms import Arm, arms_of, checked, chosen, look_at_rows, planned, unequal, varied
from luthier._compare.judge import Difference, Number
from luthier._compare.work import run
from luthier.core import checkpoint
from luthier.errors import RecipeError, UserError
from luthier.recipe import Recipe

ROOT = Path("comparisons")


@dataclass
class Comparison:
    """What came of a comparison. `text` says it, `page` is the same to look at."""

    folder: Path
    arms: list[Arm]
    reference: str
    """The arm that the others are compared with."""
    seeds: list[int]
    runs: dict[str, dict[int, dict[str, Any]]]
    """Arm -> seed -> numbers before and after, cost, or the sentence of its failure under "error"."""
    numbers: list[Number]
    """What the arms are judged by, the main number first."""
    differences: list[Difference]
    beaten: dict[str, list[str]]
    """For every arm that ended, the arms that are at least as good in everything and better in something (by means)."""
    unequal: list[str]
    """What was not the same for all arms, in words."""
    verdict: list[str]
    notes: list[str] = field(default_factory=list)

    @property
    def failed(self) -> dict[str, dict[int, str]]:
        """Arm -> seed -> what went wrong."""
        found = {name: {s: r["error"] for s, r in by_seed.items() if r["error"]} for name, by_seed in self.runs.items()}
        return {name: errors for name, errors in found.items() if errors}

    @property
    def front(self) -> list[str]:
        """The arms that no other beats in everything."""
        return [name for name, by in self.beaten.items() if not by]

    @property
    def page(self) -> Path:
        return self.folder / "comparison.html"

    @property
    def command(self) -> str:
        """What repeats this comparison from the recipes that it keeps."""
        files = [str(recipe_file(self.folder, arm)) for arm in self.arms]
        counted = self.seeds == list(range(len(self.seeds)))
        seeds = str(len(self.seeds)) if counted else ",".join(map(str, self.seeds)) + ","
        return shlex.join(["luthier", "compare", *files, "--seeds", seeds, "--against", self.reference])

    @property
    def text(self) -> str:
        """The whole comparison in plain words and tables."""
        from luthier._cli.compare import told

        return told(self)

    def difference(self, arm: str, key: str) -> Difference | None:
        """An arm beside the reference in one number; None for the reference itself."""
        return next((d for d in self.differences if (d.arm, d.key) == (arm, key)), None)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        arms = []
        for arm in self.arms:
            runs = self.runs[arm.name]
            means = {n.key: dict(zip(("mean", "low", "high"), judge.mean_of(n, runs))) for n in self.numbers}
            values = {n.key: {str(s): n.of(r) for s, r in runs.items()} for n in self.numbers}
            arms.append({"name": arm.name, "source": arm.source, "differs": arm.differs, "means": means, "values": values, "beaten_by": self.beaten.get(arm.name),
                         "runs": {str(s): r for s, r in runs.items()}})  # fmt: skip
        return {
            "folder": str(self.folder), "reference": self.reference, "seeds": self.seeds, "verdict": self.verdict, "unequal": self.unequal, "notes": self.notes,
            "numbers": [asdict(n) for n in self.numbers], "differences": [{**asdict(d), "smallest": d.smallest} for d in self.differences],
            "front": self.front, "arms": arms, "command": self.command,
        }  # fmt: skip


def compare(
    recipes: Any,
    vary: Mapping[str, Iterable[Any]] | Iterable[str] | str | None = None,
    seeds: int | Iterable[int] = 3,
    against: str | None = None,
    out: str | Path | None = None,
    quiet: bool = True,
    tell: Callable[[str], None] = print,
    tune: Callable[..., Any] | None = None,
) -> Comparison:
    """Run recipes with the same seeds and say what differs by more than chance.

    `recipes`: one or several recipes, files or dicts, or names with recipes. `vary`: recipe keys with values, {"adapt.rank": [8, 16]} or
    "adapt.rank=8,16"; several keys make every combination. `seeds`: a count or the seeds themselves. `against`: the arm that is the
    reference; else the first. `tune`: what runs a recipe in this process, in place of a process for every run."""
    asked = _seeds(seeds)
    arms = arms_of(_recipes(recipes), varied(vary))
    reference = chosen(arms, against).name
    notices = checked(arms, asked)
    look_at_rows(arms)
    budgets = {arm.name: planned(arm) for arm in arms}
    folder = _folder(arms[0], out)
    say = tell if not quiet else lambda sentence: None
    begun = f"{len(arms)} arms with {len(asked)} {'seed' if len(asked) == 1 else 'seeds'} each: {', '.join(a.name for a in arms)}. They go to {folder}."
    for sentence in [*notices, *unequal(budgets), begun]:
        say(sentence)
    for arm in arms:
        checkpoint.replace_text(recipe_file(folder, arm), arm.recipe.to_yaml())
    runs = _run_all(arms, asked, folder, say, tune)
    return _kept(_judged(folder, arms, reference, asked, runs, budgets))


def recipe_file(folder: Path, arm: Arm) -> Path:
    """Where an arm's whole recipe is kept."""
    return folder / "arms" / f"{arm.name}.yaml"


# -- what is asked ---------------------------------------------------------------------------------------------------------


def _recipes(given: Any) -> dict[str, Recipe]:
    """Recipes under the names of their files, or those that they were given."""
    if isinstance(given, Mapping) and given and all(isinstance(r, Recipe) for r in given.values()):
        return dict(given)
    several = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    found: dict[str, Recipe] = {}
    for one in several:
        recipe = one if isinstance(one, Recipe) else Recipe.load(one) if isinstance(one, (str, Path)) else Recipe.from_dict(one)
        name = str(one) if isinstance(one, (str, Path)) else recipe.name or f"recipe {len(found) + 1}"
        found[name if name not in found else f"{name} {len(found) + 1}"] = recipe
    return found


def _seeds(given: int | Iterable[int]) -> list[int]:
    seeds = list(range(given)) if isinstance(given, int) else list(given)
    if not seeds or len(set(seeds)) < len(seeds) or not all(isinstance(s, int) and s >= 0 for s in seeds):
        raise RecipeError(f"Seeds are a count of 1 or more, or different whole numbers from 0 on; not {given}.")
    return seeds


def _folder(first: Arm, out: str | Path | None) -> Path:
    """The comparison's folder. One that holds other things is not written into."""
    name = first.recipe.name or Path(first.source).stem or "recipes"
    folder = Path(out) if out else ROOT / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if folder.exists() and not (folder / "arms").is_dir() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} holds something else and no comparison; name a new or an empty folder with --out.")
    try:
        (folder / "arms").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be written to: {error.strerror or error}. Choose another with --out.") from error
    return folder


# -- running -----------------------------------------------------------------------------------------------------------------


def _run_all(arms: Sequence[Arm], seeds: Sequence[int], folder: Path, say: Callable[[str], None], tune: Any) -> dict[str, dict[int, dict[str, Any]]]:
    """Seed by seed through all arms, so that what is there after an interruption can be compared."""
    runs: dict[str, dict[int, dict[str, Any]]] = {arm.name: {} for arm in arms}
    homes = {arm.name: next(folder.glob(f"runs/*-{arm.digest}"), folder / "runs" / f"{arm.name}-{arm.digest}") for arm in arms}
    done = 0
    for seed in seeds:
        for arm in arms:
            done += 1
            found = runs[arm.name][seed] = run(arm.at(seed), homes[arm.name] / f"seed-{seed}", tune)
            came = f"failed: {found['error']}" if found["error"] else f"{found['cost']['train_seconds']:.1f} s of training"
            say(f"{done} of {len(arms) * len(seeds)}: {arm.name}, seed {seed}: {came}")
    return runs


# -- judging -----------------------------------------------------------------------------------------------------------------


def _judged(folder: Path, arms: list[Arm], reference: str, seeds: list[int], runs: dict[str, dict[int, dict[str, Any]]], budgets: Mapping[str, dict[str, Any]]) -> Comparison:
    numbers = judge.numbers_of(runs)
    found = judge.differences(numbers, runs, reference)
    spent = {name: {**budgets[name], **measured} for name, by_seed in runs.items() if (measured := _spent(by_seed)) is not None}
    said = judge.verdict(numbers, found, runs, reference, seeds)
    made = Comparison(folder, arms, reference, seeds, runs, numbers, found, judge.beaten(numbers, runs), unequal(spent or budgets), said)
    made.notes = [*_looks(folder, seeds), *_notes(made)]
    return made


def _spent(runs: Mapping[int, dict[str, Any]]) -> dict[str, Any] | None:
    """The mean steps and rows of an arm's runs, as the runs tell them; None where none ended."""
    ended = [r["cost"] for r in runs.values() if not r["error"]]
    if not ended:
        return None
    named = {"steps": "steps", "rows learned from": "rows"}
    return {what: f"{sum(c[key] for c in ended) / len(ended):g}" for what, key in named.items() if all(c.get(key) is not None for c in ended)}


def _notes(found: Comparison) -> list[str]:
    """What a reader should know before trusting the numbers."""
    tested = found.arms[0].rows.get("test", {}).get("rows")
    said = []
    if tested:
        said.append(f"The intervals are over seeds; all arms answer the same {tested} test rows, so other test rows may give other numbers.")
    if any(d.key == "memory" and d.mean is None for d in found.differences):
        said.append("Peak memory is known only where every run has a process of its own.")
    if found.failed:
        said.append("Runs that failed are left out of means and differences; what fails is not counted against an arm there.")
    return said


def _looks(folder: Path, seeds: Sequence[int]) -> list[str]:
    """A word of warning where the seeds grew after a look at the result."""
    try:
        earlier = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
        before, said = list(earlier["seeds"]), [n for n in earlier["notes"] if n.startswith("Judged before")]
    except (OSError, ValueError, KeyError):
        return []
    if not set(seeds) - set(before):
        return said
    return [f"Judged before with seeds {', '.join(map(str, before))}. Who adds seeds until a difference shows will find one; trust seeds that were chosen beforehand."]


def _kept(found: Comparison) -> Comparison:
    """The comparison, written as json, text and page."""
    from luthier.report.comparison import page

    checkpoint.replace_text(found.folder / "comparison.json", json.dumps(found.to_dict(), indent=1, ensure_ascii=False))
    checkpoint.replace_text(found.folder / "comparison.txt", found.text)
    checkpoint.replace_text(found.page, page(found))
    return found


class _Callable(types.ModuleType):
    """`luthier.compare` is this module and, called, the comparison: `luthier.compare("a.yaml", vary=...)`."""

    def __call__(self, *args: Any, **options: Any) -> Comparison:
        return compare(*args, **options)


sys.modules[__name__].__class__ = _Callable
