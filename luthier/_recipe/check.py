"""Impossible combinations, refused before a model or a data set is loaded. Nothing here knows a method by name."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier._recipe.family import family_of
from luthier._recipe.settings import STREAMS
from luthier._recipe.write import is_path
from luthier.errors import DataError, RecipeError, nearest

if TYPE_CHECKING:
    from luthier._recipe.choice import Choice
    from luthier.recipe import Recipe

Built = list[tuple["Choice", Any]]
SUPPLIED = frozenset({"reference", "embedder", "base", "stage", "round", "previous"})
"""Needs that every run can meet; other words are row streams, named models or helpers."""
DATA_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
TRAINING = ("select", "adapt", "objective", "optimize", "compress", "measure")
"""Axes whose methods take part in the loop."""


def check(recipe: Recipe) -> list[str]:
    """Sentences worth reading; a recipe that cannot run is refused with one that says what clashes and what to do."""
    if recipe.model is None:
        raise RecipeError("The recipe names no model; add `model:` (an embedded name such as smollm2-135m, a hub id or a folder).")
    if "train" not in recipe.data.streams:
        raise RecipeError("The recipe's data has no 'train' rows; add `data: {train: FILE}`.")
    _models_exist(recipe)
    _data_exists(recipe)
    family = family_of(recipe.model_spec())
    row, kind = _first_row(recipe)
    notices: list[str] = []
    for stage in recipe.stage_recipes():
        notices += _stage(stage, family, row, kind)
    _space(recipe)
    if isinstance(recipe.model, Mapping) and recipe.model.get("trust_remote_code"):
        notices.append(f"trust_remote_code is on: code that comes with {recipe.model['id']} will run on this machine.")
    if not _has_stream(recipe, "test"):
        notices.append("There are no test rows, so little can be said about the result; add `data: {test: FILE}`.")
    return list(dict.fromkeys(notices))


def _stage(recipe: Recipe, family: str | None, row: Mapping[str, Any] | None, kind: str) -> list[str]:
    chosen = list(recipe.choices())
    if not recipe.objective and family is not None and kind not in ("", "other"):
        chosen += recipe.objective_for(family, kind)
    built = [(c, c.build()) for c in chosen]
    _one_definer(built)
    _families_meet(built)
    notices = _serves(built, family, recipe)
    for choice, plugin in built:
        sentence = plugin.check(recipe)
        if sentence:
            raise _error(choice, sentence)
        _parallel(choice, plugin)
        notices += _needs(choice, plugin, recipe, family)
    if row is not None and not recipe.synthesize:
        _columns(built, row)
    return notices


def _error(choice: Choice, sentence: str) -> RecipeError:
    return choice.frame.error(choice.place, sentence)


def _title(choice: Choice) -> str:
    return f"{choice.axis} '{choice.method}'"


# -- methods among themselves --------------------------------------------------------------------------------------------


def _one_definer(built: Built) -> None:
    from luthier.core.plugin import SINGLE_DEFINER, defines

    for hook in SINGLE_DEFINER:
        found = [c for c, p in built if c.axis in TRAINING and defines(p, hook)]
        if len(found) > 1:
            raise _error(found[1], f"Both {_title(found[0])} and {_title(found[1])} decide '{hook}'; keep one of them.")


def _families_meet(built: Built) -> None:
    """There is a family of models that all methods serve."""
    before: Built = []
    shared: frozenset[str] | None = None
    for choice, plugin in built:
        if choice.axis in ("measure", "search"):
            continue
        now = plugin.families if shared is None else shared & plugin.families
        if not now:
            other = next((b for b in before if not b[1].families & plugin.families), before[-1])
            raise _error(choice, f"{_title(other[0])} serves {_list(other[1].families)}, but {_title(choice)} serves {_list(plugin.families)}; no model is both. Change one of them.")
        if now != shared:
            before.append((choice, plugin))
        shared = now


def _serves(built: Built, family: str | None, recipe: Recipe) -> list[str]:
    """Every method serves the model's family; a measure that does not is left out."""
    notices = []
    for choice, plugin in built if family is not None else []:
        if choice.axis == "search" or family in plugin.families:
            continue
        sentence = f"{_title(choice)} serves {_list(plugin.families)}; the model is of the family '{family}'"
        if choice.axis != "measure":
            raise _error(choice, f"{sentence}. Choose another {choice.axis} or another model.")
        notices.append(f"{sentence}, so it is left out.")
    return notices


def _list(words: Any) -> str:
    return ", ".join(sorted(words)) or "nothing"


def _parallel(choice: Choice, plugin: Any) -> None:
    from luthier.core import ranks

    if ranks.launched() > 1 and choice.axis in TRAINING and not {"ddp", "fsdp"} & ranks.modes(plugin):
        raise _error(choice, f"{_title(choice)} runs in one process only, but {ranks.launched()} were started; run it without a launcher.")


# -- what methods need ---------------------------------------------------------------------------------------------------


def _needs(choice: Choice, plugin: Any, recipe: Recipe, family: str | None) -> list[str]:
    lacking = [sentence for need in sorted(plugin.needs) if (sentence := _lacking(need, recipe, family))]
    if lacking and choice.axis == "measure" and "measure" not in recipe.raw:
        return [f"{_title(choice)} {lacking[0]}"]
    if lacking:
        raise _error(choice, f"{_title(choice)} {lacking[0]}")
    return []


def _lacking(need: str, recipe: Recipe, family: str | None) -> str | None:
    """The end of a sentence that says what is missing."""
    word, _, name = need.partition(":")
    if word == "generation":
        return None if family in (None, "causal-lm") else f"needs a model that generates answers; a {family} does not."
    if word in ("helper", "helpers"):
        missing = name not in recipe.helpers if name else not recipe.helpers
        return f"needs a helper{f' {name!r}' if name else ''}; add `helpers: {{{name or 'ROLE'}: ./mine.py:FUNCTION}}`." if missing else None
    if word in ("model", "models"):
        missing = name not in recipe.models if name else not recipe.models
        return f"needs another model; add `models: {{{name or 'NAME'}: MODEL}}`." if missing else None
    if need in STREAMS or word in ("rows", "stream"):
        stream = name or need
        return None if _has_stream(recipe, stream) else f"needs '{stream}' rows; add `data: {{{stream}: FILE}}`."
    if need in SUPPLIED or need in recipe.helpers or need in recipe.models or _has_stream(recipe, need, given=True):
        return None
    return f"needs '{need}'; add `helpers: {{{need}: ./mine.py:FUNCTION}}`."


def _has_stream(recipe: Recipe, name: str, given: bool = False) -> bool:
    """Whether the data names these rows, or may bring them along (a lab task, a folder, held-out rows)."""
    streams = recipe.data.streams
    if name in streams or given:
        return name in streams
    train = streams.get("train")
    if name == "test" and recipe.data.holdout != 0 and train is not None:
        return True
    if not isinstance(train, str) or "#" in train:
        return False
    return train.startswith(("lab:", "hub:")) or not Path(train).suffix or recipe.frame.path(train).is_dir()


def _columns(built: Built, row: Mapping[str, Any]) -> None:
    """The first training row has the columns that the objectives learn from."""
    have = set(row)
    for choice, plugin in built:
        if choice.axis != "objective" or not plugin.columns or any(need <= have for need in plugin.columns):
            continue
        closest = min(plugin.columns, key=lambda need: len(need - have))
        wanted = " or ".join(" + ".join(sorted(need)) for need in plugin.columns)
        missing = ", ".join(sorted(closest - have))
        raise _error(choice, f"{_title(choice)} needs the columns {wanted}; the training rows have {', '.join(sorted(have))}, so {missing} is missing. Rename columns with `data: {{columns: {{{sorted(closest - have)[0]}: YOURS}}}}`.")


# -- files ---------------------------------------------------------------------------------------------------------------


def _models_exist(recipe: Recipe) -> None:
    for place, spec in [(("model",), recipe.model), *((("models", k), v) for k, v in recipe.models.items())]:
        if hasattr(spec, "network"):
            continue
        path = recipe.frame.path(spec["id"])
        if is_path(spec["id"]) and not path.exists():
            near = nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
            raise recipe.frame.error(place, f"{recipe.frame.key(place)}: {path} does not exist.{near}")
        if is_path(spec["id"]) and path.is_dir() and not any((path / f).exists() for f in ("config.json", "adapter_config.json", "recipe.yaml", "model")):
            raise recipe.frame.error(place, f"{recipe.frame.key(place)}: {path} holds no model (no config.json).")
    for name in recipe.merge_of or []:
        if is_path(name) and not Path(name).expanduser().exists() and name not in recipe.models:
            raise recipe.frame.error((*recipe.merge[0].place, "of"), f"merge.of: {name} does not exist; name a run, a folder, one of `models`, 'base' or 'this'.")


def _data_exists(recipe: Recipe) -> None:
    for stage in [recipe, *recipe.stage_recipes()]:
        for stream, source in stage.data.streams.items():
            source = source["path"] if isinstance(source, Mapping) and "path" in source else source
            for text in source if isinstance(source, list) and isinstance(source[0], str) else [source]:
                _file_exists(stage, stream, text)


def _file_exists(recipe: Recipe, stream: str, text: Any) -> None:
    if not isinstance(text, str) or text.startswith(("lab:", "hub:")):
        return
    path = recipe.frame.path(text)
    local = is_path(text) or path.suffix.lower() in DATA_FILES
    if local and not path.exists() and not Path(text).exists():
        near = nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise recipe.frame.error(("data", stream), f"data.{stream}: the file {path} does not exist.{near}")


def _first_row(recipe: Recipe) -> tuple[Mapping[str, Any] | None, str]:
    """The first training row in the library's columns, and the kind of rows; (None, "") where only loading would tell."""
    from luthier.core.columns import BadRow, read_row

    source, columns = recipe.data.streams["train"], recipe.data.columns
    if isinstance(source, Mapping) and "path" in source:
        source, columns = source["path"], source.get("columns", columns)
    where, record = _first_record(recipe, source[0] if isinstance(source, list) and source and isinstance(source[0], str) else source)
    if record is None:
        return None, ""
    try:
        row, how = read_row(record, columns)
    except BadRow as bad:
        if recipe.data.on_error == "skip":
            return None, ""
        raise DataError(f"{where}: {bad}. Mend the data, or set such rows aside with `data: {{on_error: skip}}`.") from bad
    return row, how.kind


def _first_record(recipe: Recipe, source: Any) -> tuple[str, Any]:
    if isinstance(source, str):
        path = recipe.frame.path(source)
        path = path if path.exists() else Path(source)
        if path.suffix.lower() not in DATA_FILES or not path.is_file():
            return source, None
        from luthier.core.columns import BadRow
        from luthier.core.readers import READERS

        try:
            where, record = next(iter(READERS[path.suffix.lower()](path)), (source, None))
        except (DataError, OSError):
            return source, None
        return where, None if isinstance(record, BadRow) else record
    if isinstance(source, Mapping):
        return "data.train", {k: v[0] for k, v in source.items() if len(v)}
    return "data.train, row 1", next(itertools.islice(iter(source), 1), None)


def _space(recipe: Recipe) -> None:
    if recipe.search and not recipe.space:
        raise _error(recipe.search[0], "A search needs `space:`, recipe keys with their choices, e.g. `space: {adapt.rank: [4, 16], optimize.lr: [1e-4, 1e-3]}`.")
    plain = recipe.without("search", "space") if recipe.space else recipe
    for key, values in recipe.space.items():
        for value in values:
            if value is not None:
                plain.with_values({key: value})
