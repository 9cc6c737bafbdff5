"""Data files as records with their places. A record that cannot be read is a `BadRow` in the stream, so that reading goes on."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from luthier.core.columns import BadRow
from luthier.errors import DataError, nearest

Record = tuple[str, Any]
"""A place such as `train.jsonl:17`, and the row there or what is wrong with it."""
SPLITS = {
    "train": ("train", "training"), "test": ("test", "testing", "eval", "evaluation"), "val": ("val", "valid", "validation", "dev"),
    "ood": ("ood",), "general": ("general",), "unlabelled": ("unlabelled", "unlabeled", "unsupervised"), "calibration": ("calibration",),
}  # fmt: skip
NOT_UTF8 = "it holds bytes that are not valid UTF-8"


def split_of(stem: str) -> str | None:
    """The split that a file name tells: train.jsonl, test-00000-of-00002.parquet, my_val.csv."""
    words = re.split(r"[^a-z]+", stem.lower())
    return next((split for split, names in SPLITS.items() if any(w in names for w in (words[0], words[-1]))), None)


def data_files(path: Path, name: str) -> list[Path]:
    """The files of a folder that make up the stream `name`, or the file itself."""
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise DataError(f"{path.name}: files of the type '{path.suffix or path.name}' are not understood; use {', '.join(READERS)}.")
        return [path]
    files = sorted(p for p in path.iterdir() if p.is_file() and p.suffix.lower() in READERS and not p.name.startswith("."))
    if not files:
        raise DataError(f"The folder {path} holds no data files ({', '.join(READERS)}).")
    by_split = [split_of(p.stem) for p in files]
    if not any(by_split):
        return files
    chosen = [p for p, split in zip(files, by_split) if split == name]
    if not chosen:
        known = sorted({s for s in by_split if s})
        raise DataError(f"The folder {path} has no '{name}' file.{nearest(name, known)} It has: {', '.join(known)}.")
    return chosen


def _fault(error: ValueError) -> str:
    """What json says, in the place of a sentence's end."""
    if isinstance(error, json.JSONDecodeError):
        return f"malformed JSON ({error.msg[0].lower()}{error.msg[1:]} at column {error.colno})"
    return f"malformed JSON ({error})"


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_jsonl(path: Path) -> Iterator[Record]:
    """One JSON object a line; blank lines are passed over but counted."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            where = f"{path.name}:{number}"
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip("\r\n\t ")
                if text:
                    yield where, _parse(text)
            except UnicodeDecodeError:
                yield where, BadRow(NOT_UTF8)
            except ValueError as error:
                yield where, BadRow(_fault(error))


def read_json(path: Path) -> Iterator[Record]:
    """A list of objects, an object of columns, or an object whose one list holds the rows; lines of objects are read as .jsonl."""
    raw = path.read_bytes()
    try:
        whole = _parse(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name}:{raw[: error.start].count(10) + 1}: {NOT_UTF8}.") from error
    except json.JSONDecodeError as error:
        if not raw.strip():
            return
        if error.msg == "Extra data" and error.lineno > 1:
            yield from read_jsonl(path)
            return
        raise DataError(f"{path.name}:{error.lineno}: {_fault(error)}.") from error
    except ValueError as error:
        raise DataError(f"{path.name}: {_fault(error)}.") from error
    for number, row in enumerate(_rows_in(whole, path), 1):
        yield f"{path.name}, row {number}", row


def _rows_in(whole: Any, path: Path) -> list[Any]:
    if isinstance(whole, list):
        return whole
    if isinstance(whole, dict):
        lists = {k: v for k, v in whole.items() if isinstance(v, list)}
        if lists and len(lists) == len(whole) and len({len(v) for v in lists.values()}) == 1 and not any(isinstance(v[0], dict) for v in lists.values() if v):
            return [dict(zip(lists, values)) for values in zip(*lists.values())]
        holds_rows = [v for v in lists.values() if v and all(isinstance(r, dict) for r in v)]
        if len(holds_rows) == 1 and not {"messages", "conversations", "prompt", "chosen"} & set(whole):
            return holds_rows[0]
        return [whole]
    raise DataError(f"{path.name}: the file must hold a list of objects, not a single value.")


def _read_table(path: Path, delimiter: str) -> Iterator[Record]:
    """Every value is text. A row's place is the line on which it begins."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            header = next(reader, None)
            if header is None:
                return
            names = [h.strip() for h in header]
            if len(set(names)) < len(names):
                twice = next(n for n in names if names.count(n) > 1)
                raise DataError(f"{path.name}:1: the column '{twice}' occurs twice.")
            while True:
                line = reader.line_num + 1
                values = next(reader, None)
                if values is None:
                    return
                if values:
                    yield f"{path.name}:{line}", _table_row(names, values)
    except csv.Error as error:
        yield f"{path.name}:{reader.line_num}", BadRow(f"malformed table ({error}); the rest of the file cannot be read")
    finally:
        csv.field_size_limit(limit)


def _table_row(names: list[str], values: list[str]) -> Any:
    if len(values) != len(names):
        return BadRow(f"the row has {len(values)} cells, but there are {len(names)} columns")
    try:
        "".join(values).encode()
    except UnicodeEncodeError:
        return BadRow(NOT_UTF8)
    return dict(zip(names, values))


def read_csv(path: Path) -> Iterator[Record]:
    return _read_table(path, ",")


def read_tsv(path: Path) -> Iterator[Record]:
    return _read_table(path, "\t")


def read_parquet(path: Path) -> Iterator[Record]:
    """Rows in their order, numbered from 1."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=4096):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path.name}, row {number}", {k: _plain(v) for k, v in row.items()}
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path.name} is no readable parquet file ({str(error).splitlines()[0]}).") from error


def _plain(value: Any) -> Any:
    """Dates and decimals as text and numbers; json has neither."""
    if hasattr(value, "isoformat"):
        return value.isoformat()
    return float(value) if type(value).__name__ == "Decimal" else value


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": read_jsonl, ".ndjson": read_jsonl, ".json": read_json, ".csv": read_csv, ".tsv": read_tsv, ".parquet": read_parquet,
}  # fmt: skip
