"""Reading data: files, folders, `lab:` tasks, hub data sets and rows in memory, all alike. Data is untrusted: every row is checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from luthier.core.columns import PASSED_ON, REQUIRED, STANDARD, BadRow, Reading, missing, read_row
from luthier.core.dataset import MEDIA, Aside, Rows
from luthier.core.readers import READERS, Record, data_files, split_of
from luthier.errors import DataError, RecipeError, nearest

OnError = Literal["stop", "skip"]
LAB_STREAMS = ("train", "test", "ood", "general", "unlabelled")
OPTIONS = frozenset({"columns", "on_error", "train_on", "limit", "holdout", "max_length", "too_long", "budget", "seed", "template"})
"""Keys of a recipe's `data` that are not row streams."""
HOLDOUT, MOST_HELD_OUT = 0.1, 500
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


# -- one stream -------------------------------------------------------------------------------------------------------------


def load_rows(
    spec: Any,
    name: str = "train",
    columns: Mapping[str, str] | None = None,
    on_error: OnError = "stop",
    limit: int | None = None,
    base: str | Path | None = None,
    tell: Callable[[str], None] | None = None,
) -> Rows:
    """The rows that `spec` names, checked and in the library's columns (see `luthier.core.columns`).

    spec: a .jsonl, .json, .csv, .tsv or .parquet file, a folder of them, a list of such paths, `lab:TASK?knob=value#split`,
    `hub:OWNER/NAME[:config][#split]` (or the bare id), or rows in memory. Without `#split` the stream's `name` says which split.
    columns: `{prompt: my_column}`. on_error: "stop" refuses bad rows, naming the first; "skip" sets them aside and counts them.
    limit: at most so many good rows. base: the folder that relative paths start from. tell: is given each notice as a sentence."""
    if on_error not in ("stop", "skip"):
        raise RecipeError(f"data.on_error is '{on_error}', but must be 'stop' or 'skip'.{nearest(str(on_error), ('stop', 'skip'))}")
    if limit is not None and limit < 1:
        raise RecipeError(f"data.limit is {limit}, but must be 1 or more.")
    if isinstance(spec, str) and spec.startswith("lab:"):
        rows = _lab_rows(spec, name, _make_lab(spec), limit)
    else:
        source, records, text_only, folder = _records(spec, name, base)
        try:
            rows = _gather(records, name, source, columns, on_error, limit, text_only, folder)
        except OSError as error:
            raise DataError(f"{source} cannot be read: {error.strerror or error}.") from error
    if tell is not None:
        for notice in rows.notices:
            tell(notice)
    return rows


def _records(spec: Any, name: str, base: str | Path | None) -> tuple[str, Iterator[Record], bool, Path | None]:
    """(source, records with their places, whether all values are text, the folder media files lie in)."""
    if isinstance(spec, (list, tuple)) and _is_path(spec):
        opened = [_records(s, name, base) for s in spec]
        return ", ".join(o[0] for o in opened), (r for o in opened for r in o[1]), all(o[2] for o in opened), opened[0][3]
    if not isinstance(spec, (str, Path)):
        source = spec.source if isinstance(spec, Rows) and spec.source != "memory" else name
        given = spec if isinstance(spec, list) else Rows.of(spec, name)
        return source, ((f"{source}, row {i}", r) for i, r in enumerate(given, 1)), False, None
    if isinstance(spec, str) and spec.startswith("hub:"):
        return _hub(spec.removeprefix("hub:"), name)
    path = _resolve(Path(spec).expanduser(), base)
    if path is None:
        if isinstance(spec, str) and _looks_like_hub(spec, base):
            return _hub(spec, name)
        raise DataError(_not_found(Path(spec), base))
    files = data_files(path, name)
    source = path.name
    records = (record for file in files for record in READERS[file.suffix.lower()](file))
    return source, records, all(f.suffix.lower() in (".csv", ".tsv") for f in files), files[0].parent


def _is_path(spec: Any) -> bool:
    """A path, or several."""
    several = isinstance(spec, (list, tuple)) and bool(spec) and all(isinstance(s, (str, Path)) for s in spec)
    return several or isinstance(spec, (str, Path))


def _resolve(path: Path, base: str | Path | None) -> Path | None:
    """Where a path lies: below `base`, else below the working folder."""
    tried = [path] if path.is_absolute() or base is None else [Path(base) / path, path]
    return next((p for p in tried if p.exists()), None)


def _looks_like_hub(spec: str, base: str | Path | None) -> bool:
    """OWNER/NAME without a data file's ending; with a folder OWNER here it is more likely a mistyped path."""
    name = spec.partition("#")[0].partition(":")[0]
    return bool(HUB_ID.fullmatch(name)) and Path(name).suffix.lower() not in READERS and _resolve(Path(name).parent, base) is None


def _not_found(path: Path, base: str | Path | None) -> str:
    folder = path.parent if path.is_absolute() or base is None else Path(base) / path.parent
    if not folder.is_dir():
        return f"The data file {path} does not exist: there is no folder {folder}."
    hint = nearest(path.name, [p.name for p in folder.iterdir()])
    hub = f" For a data set of the Hugging Face hub write hub:{path}." if HUB_ID.fullmatch(str(path)) and not path.suffix else ""
    return f"The data file {path} does not exist.{hint}{hub}"


def _gather(
    records: Iterable[Record], name: str, source: str, columns: Mapping[str, str] | None, on_error: OnError, limit: int | None, text_only: bool, folder: Path | None
) -> Rows:
    """Good rows in, bad rows aside; all of one kind."""
    good: list[dict[str, Any]] = []
    ids: list[int] = []
    aside: list[Aside] = []
    first: tuple[str, Reading] | None = None
    notices: list[str] = []
    unused: set[str] = set()
    position = -1
    for position, (where, record) in enumerate(records):
        if limit is not None and len(good) >= limit:
            break
        try:
            if isinstance(record, BadRow):
                raise record
            row, how = read_row(_typed(record) if text_only else record, columns)
            if first is None:
                first = where, how
            elif how.kind != first[1].kind:
                _other_kind(row, where, how, *first)
            row = _with_media(row, folder)
        except BadRow as bad:
            aside.append(Aside(where, str(bad)))
            continue
        if (told := how.told()) and (sentence := f"{source} {told}.") not in notices:
            notices.append(sentence)
        unused.update(c for c in row if c not in STANDARD and c not in PASSED_ON)
        good.append(row)
        ids.append(position)
    if on_error == "stop" and aside:
        raise DataError(_refusal(aside))
    if not good:
        raise DataError(f"{source} is empty: it holds no rows." if position < 0 else f"All {len(aside)} rows of {source} are bad; the first is {aside[0].where}: {aside[0].reason}.")
    assert first is not None
    good = _labels(good) if text_only else good
    return Rows(good, ids, name, source, first[1].kind, aside, notices + _notices(source, good, aside, unused, first[1].kind))


def _other_kind(row: dict[str, Any], where: str, how: Reading, first_where: str, first: Reading) -> None:
    """A row of another kind than the first: bad if it only lacks a column, else the data set is refused."""
    if any(c not in row for c in REQUIRED[first.kind]) and set(REQUIRED[how.kind]) & set(REQUIRED[first.kind]):
        raise BadRow(missing(row, first.kind))
    raise DataError(f"{where} is a row of the kind {how.kind}, but {first_where} is {first.kind}; put the kinds into separate files.")


def _refusal(aside: list[Aside]) -> str:
    others = len(aside) - 1
    more = f" ({others} more row{'s are' if others > 1 else ' is'} bad as well)" if others else ""
    return f"{aside[0].where}: {aside[0].reason}{more}. Mend the data, or set such rows aside with `data: {{on_error: skip}}`."


def _notices(source: str, rows: list[dict[str, Any]], aside: list[Aside], unused: set[str], kind: str) -> list[str]:
    found = []
    if aside:
        found.append(f"{len(aside)} of {len(aside) + len(rows)} rows of {source} were set aside; the first is {aside[0].where}: {aside[0].reason}.")
    if unused:
        names = sorted(unused)
        found.append(f"{source}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''} stay with the rows, but nothing is learned from them.")
    if kind == "pairs" and any("label" in r for r in rows):
        found.append(f"{source} has pairs with a label; contrastive objectives take every pair for a matching one, so drop those that do not match.")
    return found


# -- values --------------------------------------------------------------------------------------------------------------


def _typed(record: Any) -> Any:
    """A record of a file without types: empty cells are absent, weights are numbers."""
    if not isinstance(record, Mapping):
        return record
    row: dict[str, Any] = {k: v for k, v in record.items() if v != "" or k in STANDARD}
    try:
        return {**row, "weight": float(row["weight"])} if "weight" in row else row
    except ValueError as error:
        raise BadRow(f"'weight' is '{row['weight']}', but must be a number") from error


def _labels(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Labels from a file without types are whole numbers if all of them look so."""
    whole = all(re.fullmatch(r"-?\d{1,18}", r["label"].strip()) for r in rows if "label" in r)
    return [{**r, "label": int(r["label"])} if "label" in r and whole else r for r in rows]


def _with_media(row: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """Image and audio file names as full paths; embedded images as uint8 arrays [height, width] or [height, width, 3]."""
    changed = {c: _media(row[c], c, folder) for c in MEDIA if c in row}
    return {**row, **changed} if changed else row


def _media(value: Any, column: str, folder: Path | None) -> Any:
    if isinstance(value, str):
        path = Path(value) if folder is None else folder / value
        if not path.is_file():
            near = nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
            raise BadRow(f"the {column} file {value} does not exist.{near}".rstrip("."))
        return str(path)
    if isinstance(value, Mapping):
        if value.get("bytes") is None and isinstance(value.get("path"), str):
            return _media(value["path"], column, folder)
        value = value.get("bytes", value.get("array"))
    if isinstance(value, (bytes, bytearray)) or hasattr(value, "convert"):
        return _decoded(value, column)
    if isinstance(value, (list, tuple)) and column != "images":
        return np.asarray(value)
    return value


def _decoded(value: Any, column: str) -> Any:
    if column == "audio":
        raise BadRow("'audio' is a compressed sound; give its samples as a list of numbers")
    try:
        import io

        from PIL import Image
    except ImportError as error:
        raise DataError("Pictures inside a data file need the package Pillow: pip install pillow.") from error
    try:
        picture = value if hasattr(value, "convert") else Image.open(io.BytesIO(value))
        return np.asarray(picture if picture.mode in ("L", "RGB") else picture.convert("RGB"))
    except Exception as error:  # Pillow raises many types on broken files
        raise BadRow(f"'{column}' is no readable picture ({type(error).__name__})") from error


# -- the lab and the hub -------------------------------------------------------------------------------------------------


def _make_lab(spec: str) -> Any:
    from luthier import lab

    return lab.make(spec.partition("#")[0])


def _lab_rows(spec: str, name: str, splits: Any, limit: int | None = None) -> Rows:
    """One list of a task's splits. The lab's rows are right by construction and not checked again."""
    wanted = spec.partition("#")[2] or (name if name in LAB_STREAMS else "train")
    if wanted not in LAB_STREAMS:
        raise DataError(f"{spec}: there is no split '{wanted}'.{nearest(wanted, LAB_STREAMS)} The splits are: {', '.join(LAB_STREAMS)}.")
    rows = getattr(splits, wanted)
    if not rows:
        raise DataError(f"{spec}: this task has no '{wanted}' rows. It has: {', '.join(s for s in LAB_STREAMS if getattr(splits, s))}.")
    return Rows(rows[:limit], name=name, source=f"{spec.partition('#')[0]}#{wanted}")


def _hub_splits(spec: str) -> Any:
    """The splits of `OWNER/NAME[:config]`, by the datasets package (which keeps what it has downloaded)."""
    path, _, config = spec.partition("#")[0].partition(":")
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"'{path}' is no file or folder here, so it is taken for a data set of the Hugging Face hub, which needs the package datasets: pip install luthier[hub]."
        ) from error
    try:
        return datasets.load_dataset(path, config or None)
    except Exception as error:  # network, authorisation, unknown ids and unreadable data sets all raise their own types
        why = str(error).splitlines()[0] if str(error) else ""
        raise DataError(f"The data set '{path}' could not be loaded from the Hugging Face hub ({type(error).__name__}: {why}).") from error


def _hub(spec: str, name: str) -> tuple[str, Iterator[Record], bool, Path | None]:
    found, (path, _, split) = _hub_splits(spec), spec.partition("#")
    wanted = split or next((s for s in found if split_of(s) == name), None)
    if wanted not in found:
        raise DataError(
            f"hub:{path} has no split '{split or name}'.{nearest(str(split or name), found)} It has: {', '.join(map(str, found))}; choose one with hub:{path}#SPLIT."
        )
    source = f"hub:{path}#{wanted}"
    return source, ((f"{source}, row {i}", r) for i, r in enumerate(found[wanted], 1)), False, None


# -- all streams of a recipe ---------------------------------------------------------------------------------------------


def load_streams(data: Any, base: str | Path | None = None, tell: Callable[[str], None] | None = None, seed: int = 0, **options: Any) -> dict[str, Rows]:
    """The row streams of a recipe's `data`: every key that is no option (`OPTIONS`) names a stream.

    A bare `lab:TASK` under `train` gives train, test, ood and general (and unlabelled, where the task has any) at once, a folder all
    the splits its file names tell. Without test rows, a tenth of the training rows (at most 500) is held out by a seeded draw;
    rows of equal content stay on one side. `data: {holdout: 0}` keeps them all, another share or count changes how many."""
    data = dict(data) if isinstance(data, Mapping) else {"train": data}
    given = {**data, **options}
    settings = {k: given[k] for k in ("columns", "on_error", "limit") if given.get(k) is not None}
    say = tell if tell is not None else (lambda sentence: None)
    streams: dict[str, Rows] = {}
    for name, spec in data.items():
        if name in OPTIONS or spec is None:
            continue
        if isinstance(spec, (bool, int, float)):
            raise RecipeError(f"data.{name} is {spec!r}, but must name rows: a file, a folder, lab:TASK or a hub id.{nearest(name, OPTIONS)}")
        for stream, rows in _stream(name, spec, data, base, settings).items():
            for notice in rows.notices:
                say(notice)
            streams.setdefault(stream, rows)
    holdout = given.get("holdout")
    if "train" in streams and "test" not in streams and holdout != 0:
        streams |= _held_out(streams["train"], HOLDOUT if holdout is None else holdout, seed, say)
    elif "train" in streams and "test" in streams:
        _tell_overlap(streams["train"], streams["test"], say)
    return streams


def _stream(name: str, spec: Any, data: Mapping[str, Any], base: str | Path | None, settings: Mapping[str, Any]) -> dict[str, Rows]:
    """The streams that one entry gives: itself, and for `train` those that come with it and that no other entry names."""
    if isinstance(spec, Mapping) and _is_path(spec.get("path")):
        settings = {**settings, **{k: v for k, v in spec.items() if k in ("columns", "on_error", "limit")}}
        spec = spec["path"]
    free = [s for s in ("test", "val", "ood", "general", "unlabelled") if data.get(s) is None]
    if isinstance(spec, str) and spec.startswith("lab:") and "#" not in spec and name == "train":
        splits = _make_lab(spec)
        wanted = ["train", *(s for s in LAB_STREAMS[1:] if s in free and getattr(splits, s))]
        return {s: _lab_rows(f"{spec}#{s}", s, splits, settings.get("limit") if s == "train" else None) for s in wanted}
    made = {name: load_rows(spec, name, base=base, **settings)}
    path = _resolve(Path(spec).expanduser(), base) if isinstance(spec, (str, Path)) else None
    beside: set[str | None] = set()
    if path is not None and path.is_dir():
        beside = {split_of(p.stem) for p in path.iterdir() if p.suffix.lower() in READERS}
    elif made[name].source.startswith("hub:") and isinstance(spec, str) and "#" not in spec:
        beside = {split_of(s) for s in _hub_splits(spec.removeprefix("hub:"))}
    if name == "train":
        made |= {s: load_rows(spec, s, base=base, **settings) for s in free if s in beside}
    return made


def _held_out(rows: Rows, share: float, seed: int, say: Callable[[str], None]) -> dict[str, Rows]:
    train, test = hold_out(rows, share, seed)
    if not len(test):
        say(f"{rows.source} has no two different rows, so none is held out for testing.")
        return {}
    say(f"No test rows were named, so {len(test)} of the {len(rows)} rows of {rows.source} were held out for testing (seed {seed}); name your own with `data: {{test: FILE}}`.")
    return {"train": train, "test": test}


def hold_out(rows: Rows, share: float = HOLDOUT, seed: int = 0) -> tuple[Rows, Rows]:
    """(train, test): a share (or count, if 1 or more) of the rows drawn for testing, at most 500 by default, duplicates on one side."""
    from luthier.core.context import seed_of

    groups: dict[bytes, list[int]] = {}
    for i, content in enumerate(rows.contents()):
        groups.setdefault(content, []).append(i)
    members = list(groups.values())
    if len(members) < 2:
        return rows, rows.take([])._like([], [], "test")
    wanted = min(MOST_HELD_OUT, max(1, round(share * len(rows)))) if share < 1 else min(round(share), len(rows) - 1)
    order = [members[i] for i in np.random.default_rng(seed_of(seed, "holdout")).permutation(len(members))]
    test: list[int] = []
    for group in order:
        if len(test) + len(group) <= wanted:
            test += group
    test = test or min(order, key=len)
    kept = sorted(set(range(len(rows))) - set(test))
    chosen = rows.take(sorted(test))
    return rows.take(kept), chosen._like(list(chosen), chosen.ids, "test")


def _tell_overlap(train: Rows, test: Rows, say: Callable[[str], None]) -> None:
    seen = set(train.contents())
    both = sum(c in seen for c in test.contents())
    if both:
        say(f"{both} of the {len(test)} test rows are also training rows, so the test is easier than it looks.")
