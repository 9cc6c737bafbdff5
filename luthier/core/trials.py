"""A recipe's search: trials are runs of their own below the run's folder, and the best point becomes the recipe."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core import checkpoint, ranks
from luthier.core.context import Context, seed_of
from luthier.errors import RecipeError, UserError

if TYPE_CHECKING:
    from luthier.recipe import Recipe


def search(recipe: Recipe, folder: Path, tune: Callable[..., Any], tell: Callable[[str], None]) -> Recipe:
    """Let the recipe's search method choose values; every trial is a run below `trials`, never done twice.

    What was asked is kept as search.yaml, what was found as search.json; recipe.yaml becomes the chosen recipe."""
    if not recipe.space:
        raise RecipeError("A search needs `space:`, recipe keys with their choices, e.g. `space: {adapt.rank: [4, 16], optimize.lr: [1e-4, 1e-3]}`.")
    # The choice is made on validation rows, so that the test rows still tell what it is worth.
    scored_on = {"data.test": recipe.data.streams["val"]} if "val" in recipe.data.streams else {}
    if not scored_on:
        tell("There are no validation rows, so trials are compared on the test rows; add `data: {val: FILE}` for an honest result.")
    for name in ("search.yaml", "recipe.yaml"):
        if ranks.first() and not (folder / name).exists():
            checkpoint.replace_text(folder / name, recipe.to_yaml())

    def trial(point: Mapping[str, Any]) -> dict[str, float]:
        candidate = recipe.without("search", "space").with_values({**point, **scored_on})
        where = folder / "trials" / f"{seed_of(candidate.to_yaml()):016x}"
        done = tune(candidate, where, resume=True, quiet=True)
        facts = json.loads((where / "report.json").read_text())
        return {k: v for k, v in {**done.numbers(), **facts.get("cost", {})}.items() if isinstance(v, (int, float))}

    found = recipe.search[0].build().search(recipe.space, trial, Context(None, recipe.train.seed, folder=folder))
    if not found:
        raise UserError("The search found nothing worth running.")
    kept = json.dumps(found, indent=1, default=lambda v: v.tolist() if hasattr(v, "tolist") else str(v))
    point = {k: v for k, v in found[0].items() if k in recipe.space}
    tell(f"The search chose {point}.")
    chosen = recipe.without("search", "space").with_values(point)
    if ranks.first():
        checkpoint.replace_text(folder / "search.json", kept)
        checkpoint.replace_text(folder / "recipe.yaml", chosen.to_yaml())
    return chosen
