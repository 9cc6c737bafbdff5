"""The arms of a comparison: recipes that differ, short names from what differs, and what is known of their budgets beforehand."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from luthier import catalog
from luthier._recipe.source import parse
from luthier._recipe.write import plain
from luthier.catalog import AXES
from luthier.errors import RecipeError, nearest
from luthier.recipe import Choice, Recipe, check

LONGEST = 40
"""Characters of an arm's name."""
MOST_PARTS = 3
"""Differences that a name may tell; an arm that differs in more is called after its file."""
Facts = dict[str, dict[str, Any]]
"""For each stream of rows how many there are, where from, and their fingerprint."""


@dataclass
class Arm:
    """One of the recipes."""

    recipe: Recipe
    source: str = ""
    """What its recipe is called: the file, or `name:`."""
    name: str = ""
    differs: dict[str, str] = field(default_factory=dict)
    """Its values under the keys in which the arms differ."""
    rows: Facts = field(default_factory=dict)

    def at(self, seed: int) -> Recipe:
        """The recipe with a seed of the comparison."""
        return self.recipe.with_values({"train.seed": seed})

    @property
    def digest(self) -> str:
        """Changes with the recipe and with the content of its rows, so that a run is never taken for another one."""
        said = json.dumps([plain(_facets(self.recipe)), {k: v["fingerprint"] for k, v in self.rows.items()}], sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()[:8]


# -- making ----------------------------------------------------------------------------------------------------------------


def arms_of(recipes: Mapping[str, Recipe], vary: Mapping[str, Sequence[Any]]) -> list[Arm]:
    """Every recipe with every combination of the varied values; refused where nothing differs."""
    keys = list(vary)
    points = [dict(zip(keys, values)) for values in itertools.product(*vary.values())]
    arms = [Arm(recipe.with_values(point) if point else recipe, source) for source, recipe in recipes.items() for point in points]
    if len(arms) < 2:
        raise RecipeError("One recipe alone is nothing to compare; name another, or vary a value: --vary objective.method=sft,asft.")
    facets = [_facets(arm.recipe) for arm in arms]
    for (i, a), (j, b) in itertools.combinations(enumerate(arms), 2):
        if facets[i] == facets[j]:
            raise RecipeError(f"Arm {i + 1} and arm {j + 1}{_from(a, b)} are the same recipe; there is nothing to compare in them. Leave one out.")
    for key, values in _differences([a.recipe for a in arms], facets).items():
        for arm, value in zip(arms, values):
            arm.differs[key] = value
    for arm, name in zip(arms, _names(arms)):
        arm.name = name
    return arms


def varied(vary: Mapping[str, Iterable[Any]] | Iterable[str] | str | None) -> dict[str, list[Any]]:
    """Keys with their values, from a mapping or from texts such as "adapt.rank=8,16"."""
    if isinstance(vary, str):
        vary = [vary]
    found: dict[str, list[Any]] = {}
    for item in vary or []:
        key, values = _spelled(item) if not isinstance(vary, Mapping) else (item, [vary[item]] if isinstance(vary[item], str) else list(vary[item]))
        if key == "train.seed":
            raise RecipeError("The seed is not varied but paired: every arm runs with the same seeds. Use --seeds 5, or --seeds 0,3,7.")
        if key in found:
            raise RecipeError(f"'{key}' is varied twice; write all its values at once: --vary {key}=A,B.")
        if not values:
            raise RecipeError(f"'{key}' is varied over no values; write --vary {key}=A,B.")
        found[key] = values
    return found


def _spelled(text: str) -> tuple[str, list[Any]]:
    """A key and its values, which are parted by commas and typed as YAML has it."""
    key, sign, rest = text.partition("=")
    if not sign or not key.strip() or not rest.strip():
        raise RecipeError(f"'{text}' cannot be varied; write KEY=VALUE,VALUE, e.g. --vary adapt.rank=8,16.")
    values, _ = parse(f"[{rest}]", f"--vary {key.strip()}")
    return key.strip(), values[0] if len(values) == 1 and isinstance(values[0], list) else values


def checked(arms: Sequence[Arm], seeds: Sequence[int]) -> list[str]:
    """Notices of all arms; nothing is loaded. Refuses what cannot run, and what the seeds of the comparison would not reach."""
    notices: list[str] = []
    for arm in arms:
        if any(hasattr(m, "network") for m in (arm.recipe.model, *arm.recipe.models.values())):
            raise RecipeError("A comparison starts every run from the same model, but a run changes a model in memory; save it and name its folder.")
        try:
            notices += check(arm.recipe)
        except RecipeError as error:
            raise RecipeError(f"{arm.name}: {error}") from error
        for stage in arm.at(seeds[0] + 1).stage_recipes():
            if stage.train.seed != seeds[0] + 1:
                raise RecipeError(f"{arm.name}: a stage sets train.seed itself, so all seeds of the comparison would be one; take it out of the stage.")
    return list(dict.fromkeys(notices))


def chosen(arms: Sequence[Arm], against: str | None) -> Arm:
    """The arm that the others are compared with."""
    found = [a for a in arms if against in (None, a.name)] or [a for a in arms if against in (a.source, Path(a.source).stem)]
    if not found:
        raise RecipeError(f"There is no arm '{against}' to compare with.{nearest(str(against), [a.name for a in arms])} The arms are: {', '.join(a.name for a in arms)}.")
    return found[0]


def _from(a: Arm, b: Arm) -> str:
    return f" ({a.source} and {b.source})" if a.source != b.source else ""


# -- what differs ----------------------------------------------------------------------------------------------------------


def _facets(recipe: Recipe) -> dict[str, Any]:
    """All that a recipe decides, by dotted key, with the methods' own defaults filled in. Its name, folder and seed decide nothing."""
    found = _own(recipe)
    if recipe.stages:
        found["stages"] = [[e.name, e.start, len(e.recipes), e.times, e.until] for e in recipe.stages]
        for number, stage in enumerate(recipe.stage_recipes()):
            found |= {f"stages.{number}.{k}": v for k, v in _own(stage).items()}
    return found


def _own(recipe: Recipe) -> dict[str, Any]:
    written = yaml.safe_load(recipe.to_yaml())
    found: dict[str, Any] = {"model": written.get("model")}
    for key in ("models", "helpers", "data", "space"):
        found |= {f"{key}.{k}": v for k, v in written.get(key, {}).items()}
    for axis in AXES:
        entries: list[Choice] = getattr(recipe, axis)
        found[axis] = [c.spec for c in entries]
        for i, choice in enumerate(entries):
            built = choice.build()
            fields = {f.name: getattr(built, f.name) for f in catalog.fields_of(type(built))}
            within = axis if len(entries) == 1 else f"{axis}.{i}"
            found |= {f"{within}.{k}": v for k, v in plain({**choice.extras, **fields}).items()}
    return found | {f"train.{k}": v for k, v in written["train"].items() if k != "seed"}


def _differences(recipes: Sequence[Recipe], facets: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Keys in which recipes differ, and each one's value as text. Where methods differ, their fields are told with them."""
    found: dict[str, list[str]] = {}
    for key in dict.fromkeys(k for f in facets for k in f):
        values = [f.get(key) for f in facets]
        parts = key.split(".")
        above = next((".".join(parts[:i]) for i in range(1, len(parts)) if ".".join(parts[:i]) in found), None)
        if all(v == values[0] for v in values) or above is not None:
            continue
        texts = [_given(r, key) for r in recipes] if key in AXES else [_shown(v) for v in values]
        if parts[0] != "stages" or found.get(".".join(parts[2:])) != texts:  # what a stage inherits is told at the top
            found[key] = texts
    return found


def _given(recipe: Recipe, axis: str) -> str:
    """An axis as the recipe has it: methods with the fields that are given."""
    said = [" ".join([_method(c.method), *(f"{k}={_shown(v)}" for k, v in {**c.extras, **c.options}.items())]) for c in getattr(recipe, axis)]
    return " + ".join(said) or "none"


def _methods(recipe: Recipe, axis: str) -> str:
    return "+".join(_method(c.method) for c in getattr(recipe, axis)) or "none"


def _method(name: str) -> str:
    return Path(name).name if ".py" in name else name


def _shown(value: Any) -> str:
    value = plain(value)
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# -- names -----------------------------------------------------------------------------------------------------------------


def _names(arms: Sequence[Arm]) -> list[str]:
    """Short names that tell the arms apart; fit for a command line and a folder."""
    top = [k for k in arms[0].differs if not k.startswith("stages.")] or list(arms[0].differs)
    top.sort(key=lambda k: k not in AXES)  # methods first
    sources = [_clean(Path(a.source).stem) for a in arms]
    shortest = ["+".join(_token(k, _methods(arm.recipe, k) if k in AXES else arm.differs[k]) for k in top) for arm in arms]
    fuller = ["+".join(_token(k, arm.differs[k]) for k in top) for arm in arms]
    names = []
    for i, name in enumerate(shortest):
        name = fuller[i] if shortest.count(name) > 1 else name
        if (len(top) > MOST_PARTS or len(name) > LONGEST) and sources[i] and sources.count(sources[i]) == 1:
            name = sources[i]
        names.append(name[:LONGEST].strip("-+") or f"arm-{i + 1}")
    return [name if names.count(name) == 1 else f"{name}-{names[: i + 1].count(name)}" for i, name in enumerate(names)]


def _token(key: str, value: str) -> str:
    """One difference as a word: the method on an axis, field=value elsewhere, a file's or a model's own name."""
    head, _, last = key.rpartition(".")
    if key in AXES:
        return _clean(value) if value != "none" else f"no-{key}"
    if key == "model" or head in ("models", "data"):
        return _clean(Path(value).stem if "/" in value else value.removeprefix("lab:"))
    return _clean(f"{last}={value}")


def _clean(text: str) -> str:
    return re.sub(r"[^\w.=+%-]+", "-", text).strip("-")


# -- rows and budgets --------------------------------------------------------------------------------------------------------


def look_at_rows(arms: Sequence[Arm]) -> None:
    """Read every arm's rows and keep how many there are and their fingerprints; different test rows are refused."""
    from luthier.core.rows import load_streams

    known: dict[str, Facts] = {}
    for arm in arms:
        for place, recipe in [("", arm.recipe), *((f"stages.{i}.", r) for i, r in enumerate(arm.recipe.stage_recipes()) if arm.recipe.stages)]:
            data = json.dumps({k: v for k, v in _own(recipe).items() if k.startswith("data.")}, sort_keys=True)
            if data not in known:
                streams = load_streams(recipe.data.to_dict(), base=recipe.base)
                known[data] = {k: {"rows": len(r), "source": r.source, "fingerprint": r.fingerprint} for k, r in streams.items()}
            arm.rows |= {f"{place}{k}": v for k, v in known[data].items()}
    first = arms[0]
    for arm in arms[1:]:
        mine, theirs = (a.rows.get("test", {}) for a in (arm, first))
        if mine.get("fingerprint") != theirs.get("fingerprint"):
            both = f"{first.name} is tested on {_rows(theirs)}, {arm.name} on {_rows(mine)}"
            raise RecipeError(f"{both}; what they come to cannot be compared. Give all arms the same test rows: data.test=FILE.")


def _rows(facts: Mapping[str, Any]) -> str:
    return f"{facts['rows']} rows of {facts['source']}" if facts else "none"


def planned(arm: Arm) -> dict[str, Any]:
    """What an arm is going to spend and how it is measured: values that are equal in a fair comparison."""
    from luthier.select import budget_of

    steps = learned = 0
    stages = arm.recipe.stage_recipes()
    times = [e.times if e.loop else 1 for e in arm.recipe.stage_list() for _ in (e.recipes if e.loop else [e])]
    for number, (stage, turns) in enumerate(zip(stages, times)):
        rows = arm.rows[f"stages.{number}.train" if arm.recipe.stages else "train"]["rows"]
        kept = budget_of(stage.budget, rows) if stage.select else rows
        learned += kept
        steps += turns * (stage.train.steps or max(1, round(-(-kept // stage.train.batch) * stage.train.epochs)))
    return {
        "steps": steps, "rows learned from": learned, "rows a step": _joined(s.train.batch for s in stages),
        "epochs": _joined("as the steps say" if s.train.steps else s.train.epochs for s in stages),
        **{f"{k} rows": f"{v['rows']} ({v['fingerprint'][:6]})" for k, v in arm.rows.items() if k != "test"},
        "measures": _given(arm.recipe, "measure"), "search": _given(arm.recipe, "search"),
    }  # fmt: skip


def _joined(values: Iterable[Any]) -> str:
    return ", then ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)


def unequal(spent: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """In plain words, what is not the same for all arms. `spent`: arm to its budget."""
    found = []
    for what in dict.fromkeys(k for budget in spent.values() for k in budget):
        values = {name: budget.get(what) for name, budget in spent.items()}
        if any(v != next(iter(values.values())) for v in values.values()):
            found.append(f"unequal {what}: " + ", ".join(f"{name} {_shown(v)}" for name, v in values.items()) + ".")
    return found
