"""Checkpoints: nested plain state as one json file and one safetensors file, written so that a kill at any moment loses nothing.

A checkpoint is a folder `step-00000120`. It is written under another name, synced to disk and renamed; only then does the file
`latest` name it. Nothing is ever unpickled. Where weights are split over processes, each adds its rows as a file of its own; any
number of processes can read them again.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from luthier.core import ranks, sharding
from luthier.errors import TrainingError


def pack(value: Any, tensors: dict[str, torch.Tensor], key: str = "s") -> Any:
    """A json tree of `value`; its tensors and arrays go into `tensors` under keys that the tree names."""
    if isinstance(value, torch.Tensor):
        word = "@shards" if sharding.by_rows(value) else "@tensor"
        held = sharding.local(value.detach()) if word == "@shards" else sharding.full_tensor(value.detach())
        tensors[key] = held.cpu().contiguous().clone()
        return {word: key}
    if isinstance(value, np.ndarray):
        tensors[key] = torch.from_numpy(np.array(value, copy=True, order="C"))
        return {"@array": key}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, tuple):
        return {"@tuple": [pack(v, tensors, f"{key}.{i}") for i, v in enumerate(value)]}
    if isinstance(value, list):
        return [pack(v, tensors, f"{key}.{i}") for i, v in enumerate(value)]
    if isinstance(value, dict):
        if all(isinstance(k, str) and not k.startswith("@") for k in value):
            return {k: pack(v, tensors, f"{key}.{k}") for k, v in value.items()}
        return {"@items": [[pack(k, tensors, f"{key}.k{i}"), pack(v, tensors, f"{key}.v{i}")] for i, (k, v) in enumerate(value.items())]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"State of type {type(value).__name__} cannot be checkpointed (at {key}); use numbers, strings, lists, dicts, arrays or tensors.")


def unpack(tree: Any, tensors: dict[str, torch.Tensor], folder: Path | None = None) -> Any:
    """The inverse of `pack`. What was split over processes stays in the `folder` until it is asked for."""
    if isinstance(tree, list):
        return [unpack(v, tensors, folder) for v in tree]
    if not isinstance(tree, dict):
        return tree
    if "@tensor" in tree:
        return tensors[tree["@tensor"]]
    if "@shards" in tree:
        return Shards(folder or Path(), tree["@shards"])
    if "@array" in tree:
        return tensors[tree["@array"]].numpy()
    if "@tuple" in tree:
        return tuple(unpack(v, tensors, folder) for v in tree["@tuple"])
    if "@items" in tree:
        return {unpack(k, tensors, folder): unpack(v, tensors, folder) for k, v in tree["@items"]}
    return {k: unpack(v, tensors, folder) for k, v in tree.items()}


@dataclass
class Shards:
    """A tensor that several processes wrote, each its rows."""

    folder: Path
    key: str

    def rows(self, start: int = 0, end: int | None = None) -> torch.Tensor:
        """Rows from `start` to `end`, whoever wrote them."""
        found: list[torch.Tensor] = []
        at = 0
        for path in sorted(self.folder.glob("rows-*.safetensors")):
            with safe_open(path, framework="pt") as file:
                part = file.get_slice(self.key)
                n = part.get_shape()[0]
                a, b = max(start, at), at + n if end is None else min(end, at + n)
                if a < b or not found:
                    found.append(part[max(0, a - at) : max(0, b - at)])
                at += n
        return torch.cat(found)


def assembled(state: Any) -> Any:
    """Nested state with what was split read whole."""
    if isinstance(state, Shards):
        return state.rows()
    if isinstance(state, (list, tuple)):
        return type(state)(assembled(v) for v in state)
    return {k: assembled(v) for k, v in state.items()} if isinstance(state, dict) else state


def rng_state() -> dict[str, Any]:
    """Every global random state that training code may use."""
    state = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(legacy=False), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def save(folder: Path, step: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Write one checkpoint below `folder` and let `latest` name it; older ones beyond `keep` are removed.

    All processes of a run call this; the first writes what all have in common, and each the rows that only it has."""
    final, fresh, old = (folder / f"{word}-{step:08d}" for word in ("step", ".writing", ".old"))
    tensors: dict[str, torch.Tensor] = {}
    tree = pack(state, tensors)
    own = {key: tensors.pop(key) for key in list(_split(tree))}
    with disk_errors(folder, "checkpoint"):
        with ranks.by_first() as mine:
            if mine:
                folder.mkdir(parents=True, exist_ok=True)
                for left in (*folder.glob(".writing-*"), *folder.glob(".old-*")):  # by a run that was killed
                    shutil.rmtree(left, ignore_errors=True)
                fresh.mkdir()
        try:
            if own:
                _write_rows(fresh / f"rows-{ranks.rank():05d}.safetensors", own)
            with ranks.by_first() as mine:
                if mine:
                    _write_whole(fresh, tensors, tree)
                    if final.exists():
                        final.rename(old)
                    fresh.rename(final)
                    replace_text(folder / "latest", final.name)
                    prune(folder, keep)
        finally:
            if ranks.first():
                shutil.rmtree(fresh, ignore_errors=True)
                shutil.rmtree(old, ignore_errors=True)
    return final


def _write_whole(fresh: Path, tensors: dict[str, torch.Tensor], tree: Any) -> None:
    save_file(tensors, fresh / "state.safetensors")
    write_synced(fresh / "state.json", json.dumps(tree))
    _sync(fresh / "state.safetensors")
    _sync(fresh)


def _write_rows(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """One process's rows. If one of them fails, all do."""
    problem = None
    try:
        save_file(tensors, path)
        _sync(path)
    except (OSError, SafetensorError) as error:
        problem = error
    found = ranks.gather(str(problem) if problem else None)
    if problem is not None:
        raise problem
    if any(found):
        raise ranks.PeerFailed(f"The checkpoint could not be written by another process of this run: {next(filter(None, found))}")


def _split(tree: Any) -> Iterator[str]:
    """The keys of tensors of which this process has some rows."""
    if isinstance(tree, dict):
        if "@shards" in tree:
            yield tree["@shards"]
        tree = list(tree.values())
    if isinstance(tree, list):
        for part in tree:
            yield from _split(part)


REASONS = {
    errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up", errno.EACCES: "the folder may not be written to",
    errno.EROFS: "the disk is read-only", errno.EIO: "the disk fails",
}  # fmt: skip


@contextmanager
def disk_errors(folder: Path, what: str, only: tuple[int, ...] = ()) -> Iterator[None]:
    """Tell what went wrong with the disk in a sentence. `only`: these error numbers, the others pass."""
    try:
        yield
    except OSError as error:
        if only and error.errno not in only:
            raise
        raise disk_error(error, folder, what) from error
    except SafetensorError as error:  # safetensors wraps a full disk in its own type
        number = next((n for n in REASONS if f"os error {n})" in str(error)), None)
        if number is None:
            raise
        raise disk_error(OSError(number, REASONS[number]), folder, what) from error


def disk_error(error: OSError, folder: Path, what: str = "checkpoint") -> TrainingError:
    """What a user must know when something could not be written."""
    last = latest(folder) or latest(folder / "checkpoints")
    kept = f"The last checkpoint, {last.name}, is intact" if last else "What was saved before is intact"
    reason = REASONS.get(error.errno or 0) or error.strerror or str(error)
    return TrainingError(f"The {what} could not be written to {folder}: {reason}. {kept}; mend the disk and continue with --resume.")


def prune(folder: Path, keep: int) -> None:
    """Remove the oldest checkpoints, never the one that `latest` names."""
    last = latest(folder)
    steps = sorted(p for p in folder.glob("step-*") if p.is_dir() and p != last)
    for old in steps[: max(0, len(steps) - max(0, keep - 1))]:
        shutil.rmtree(old, ignore_errors=True)


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None. A folder gets its name when it is whole, so any that has one will do if `latest` is lost."""
    pointer = folder / "latest"
    named = [folder / pointer.read_text().strip()] if pointer.is_file() else []
    known = (p for p in (*named, *sorted(folder.glob("step-*"), reverse=True)) if (p / "state.json").is_file())
    return next(known, None)


def before(folder: Path, step: int) -> Path | None:
    """The newest checkpoint from before `step`; later ones, which turned out to be broken, are removed."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        if path.name < f"step-{step:08d}":
            replace_text(folder / "latest", path.name)
            break
        (folder / "latest").unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
    return latest(folder)


def load(path: Path) -> dict[str, Any]:
    """The state of a checkpoint folder."""
    try:
        return unpack(json.loads((path / "state.json").read_text()), load_file(path / "state.safetensors"), path)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise TrainingError(f"The checkpoint {path} cannot be read ({error}). Remove it to continue from the one before, if there is one.") from error


def write_synced(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    """Replace a small file in one step: readers see the old text or the new, never half."""
    fresh = path.with_name(f".{path.name}.new")
    write_synced(fresh, text)
    os.replace(fresh, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
