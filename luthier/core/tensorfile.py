"""Tensor files: safetensors read name by name and written tensor by tensor, so that memory holds a few tensors, not a model.

A safetensors file begins with a JSON header that states every offset. The writer leaves room for it, appends the tensors as they
come and fills the header in at the end (trailing spaces are allowed there). Files appear under their names only when complete.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from luthier.errors import ModelError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
}  # fmt: skip
BEHIND = 1 << 24
"""So many bytes may wait to be written while the next tensor is computed; a larger tensor is waited for."""
SYNC = 1 << 26
"""After so many bytes the system is asked to put them on the disk."""
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class TensorFiles:
    """Named tensors in one or several safetensors files, read on demand."""

    def __init__(self, files: Mapping[str, Path] | Iterable[Path]) -> None:
        self._open: dict[Path, Any] = {}
        if isinstance(files, Mapping):
            self.where = dict(files)
        else:
            self.where = {}
            for path in files:
                for name in list(self._handle(path).keys()):
                    if name in self.where:
                        raise ModelError(f"The tensor '{name}' is in both {self.where[name].name} and {path.name}; keep one of them.")
                    self.where[name] = path

    def _handle(self, path: Path) -> Any:
        if path not in self._open:
            try:
                self._open[path] = safe_open(str(path), framework="pt", device="cpu")
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{path} cannot be read as a safetensors file: {error}.") from error
        return self._open[path]

    def read(self, name: str) -> Tensor:
        try:
            return self._handle(self.where[name]).get_tensor(name)
        except SafetensorError as error:
            raise ModelError(f"{self.where[name]} has no tensor '{name}': {error}.") from error

    def meta(self, name: str) -> tuple[tuple[int, ...], torch.dtype] | None:
        try:
            found = self._handle(self.where[name]).get_slice(name)
        except SafetensorError as error:
            raise ModelError(f"{self.where[name]} has no tensor '{name}': {error}.") from error
        dtype = DTYPES.get(str(found.get_dtype()))
        return None if dtype is None else (tuple(found.get_shape()), dtype)

    def metadata(self) -> dict[str, str]:
        """What the first file says about itself."""
        first = next(iter(self.where.values()), None)
        return {} if first is None else dict(self._handle(first).metadata() or {})


def open_checkpoint(path: Path) -> TensorFiles:
    """A safetensors file, or a folder with one, several or an index of several."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ModelError(f"{path} is not a safetensors file; save the model with save_pretrained first.")
        return TensorFiles([path])
    if not path.is_dir():
        raise ModelError(f"There is no checkpoint at {path}.")
    indices = sorted(path.glob("*.safetensors.index.json"))
    if indices:
        return TensorFiles(_indexed(indices[0]))
    files = sorted(path.glob("*.safetensors"))
    if not files and (path / "model").is_dir():
        return open_checkpoint(path / "model")
    if not files:
        kind = "only pickled weights" if [*path.glob("*.bin"), *path.glob("*.pt")] else "no weights"
        raise ModelError(f"The folder {path} holds {kind}; a checkpoint needs safetensors files (save_pretrained writes them).")
    return TensorFiles(files)


def _indexed(index: Path) -> dict[str, Path]:
    """Where an index puts each tensor. The index is untrusted: only plain file names next to it are followed."""
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is not a safetensors index: {error}.") from error
    for name, file in where:
        if not isinstance(file, str) or Path(file).name != file or not (index.parent / file).is_file():
            raise ModelError(f"{index} puts the tensor '{name}' into '{file}', which is not a file next to it.")
    return {name: index.parent / file for name, file in where}


class _Writer:
    """One safetensors file that grows tensor by tensor. `names` are all it may ever hold (they bound the header)."""

    def __init__(self, path: Path, names: Iterable[str], metadata: Mapping[str, str]) -> None:
        self.path, self.size = path, 0
        self.entries: dict[str, dict[str, Any]] = {}
        self.metadata = dict(metadata)
        room = len(json.dumps({"__metadata__": self.metadata})) + sum(len(json.dumps(name)) + 256 for name in names)
        self.room = -(-room // 8) * 8
        self.file = path.open("wb")
        self.file.write(b" " * (8 + self.room))
        self.behind = ThreadPoolExecutor(1, "tensorfile")
        self.pending: deque[tuple[int, Future[None]]] = deque()
        self.waiting = self.unsynced = 0

    def add(self, name: str, first: Tensor, others: Iterable[Tensor] = ()) -> None:
        """Append a tensor: `first` alone, or its first rows and then the others block by block."""
        if first.dtype not in _CODES:
            raise ModelError(f"The tensor '{name}' is of the type {first.dtype}, which a safetensors file cannot hold.")
        start, shape, dtype = self.size, list(first.shape), first.dtype
        self._append(first)
        del first
        for rows in others:
            self._append(rows.to(dtype))
            shape[0] += len(rows)
        self.entries[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [start, self.size]}

    def _append(self, tensor: Tensor) -> None:
        tensor = tensor.detach().to("cpu").contiguous()
        size = tensor.numel() * tensor.element_size()
        if size:
            self.pending.append((size, self.behind.submit(self._write, tensor)))
        del tensor
        self.waiting += size
        self._wait(BEHIND)
        self.size += size

    def _write(self, tensor: Tensor) -> None:
        """In a thread of its own, so that the next tensor is computed meanwhile; what is written goes to the disk early, not all at the end."""
        self.unsynced += self.file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        if self.unsynced >= SYNC:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.unsynced = 0

    def _wait(self, most: int) -> None:
        """Until no more than so many bytes are left to be written; an error of the disk is raised here."""
        while self.waiting > most:
            size, written = self.pending.popleft()
            written.result()
            self.waiting -= size

    def abandon(self) -> None:
        """Close the file as it is, if it is still open."""
        self.behind.shutdown(cancel_futures=True)
        self.file.close()

    def close(self) -> None:
        self._wait(0)
        header = json.dumps({"__metadata__": self.metadata, **self.entries}, separators=(",", ":")).encode()
        self.file.seek(0)
        self.file.write(self.room.to_bytes(8, "little") + header.ljust(self.room))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.abandon()

    def finished(self) -> _Shard:
        """Close the file and take `.writing` off its name."""
        self.close()
        path = self.path.with_suffix("")
        os.replace(self.path, path)
        return _Shard(path, self.size, list(self.entries))


def pieces(tensors: Mapping[str, Tensor], name: str) -> Iterator[Tensor]:
    """A tensor in blocks of rows where the mapping can give it so, else in one."""
    parts = getattr(tensors, "pieces", None)
    return iter([tensors[name]]) if parts is None else parts(name)


def _bytes(tensors: Mapping[str, Tensor], name: str, first: Tensor) -> int:
    """The size of a whole tensor of which the first piece is known."""
    meta = tensors.meta(name) if getattr(tensors, "by_rows", False) else None  # type: ignore[attr-defined]
    return (first.numel() if meta is None else math.prod(meta[0])) * first.element_size()


def write_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """One safetensors file, complete or not there at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    writer = _Writer(partial, list(tensors), metadata or {})
    try:
        for name in tensors:
            parts = pieces(tensors, name)
            writer.add(name, next(parts), parts)
        writer.close()
        os.replace(partial, path)
    finally:
        writer.abandon()
        partial.unlink(missing_ok=True)


def write_folder(
    folder: Path,
    tensors: Mapping[str, Tensor],
    names: list[str],
    max_shard_bytes: int,
    progress: Callable[[int, int, str], None] | None = None,
    identity: str = "",
) -> list[Path]:
    """Some of a lazy mapping as `model.safetensors`, or as shards with an index where it is larger than a shard may be.

    `identity`: says what is written; finished shards of an interrupted save with the same one are kept, and kept for the next."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / ".partial"
    finished = _finished(partial, identity)
    done = {name for shard in finished for name in shard.entries}
    writer: _Writer | None = None
    try:
        for place, name in enumerate(names):
            if name not in done:
                parts = pieces(tensors, name)
                first = next(parts)
                if writer is None or (writer.size and writer.size + _bytes(tensors, name, first) > max_shard_bytes):
                    if writer is not None:
                        finished.append(writer.finished())
                    writer = _Writer(partial / f"{len(finished)}.writing", names[place:], {"format": "pt"})
                writer.add(name, first, parts)
                del first
            if progress is not None:
                progress(place + 1, len(names), name)
        if writer is not None or not finished:
            finished.append((writer or _Writer(partial / "0.writing", [], {"format": "pt"})).finished())
        files = _publish(folder, finished)
        shutil.rmtree(partial, ignore_errors=True)
        return files
    finally:
        if writer is not None:
            writer.abandon()
        if not identity:
            shutil.rmtree(partial, ignore_errors=True)


@dataclass
class _Shard:
    """A finished file that does not bear its final name yet."""

    path: Path
    size: int
    entries: list[str]


def _finished(partial: Path, identity: str) -> list[_Shard]:
    """What an interrupted save of the same finished; anything else is removed."""
    mark = partial / "identity"
    found: list[_Shard] = []
    if not identity or not mark.is_file() or mark.read_text() != identity:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        if identity:
            mark.write_text(identity)
        return found
    while (path := partial / f"{len(found)}").is_file():
        with safe_open(str(path), framework="pt") as file:
            found.append(_Shard(path, path.stat().st_size, list(file.keys())))
    return found


def _publish(folder: Path, writers: list[_Shard]) -> list[Path]:
    """Move finished shards to their names, the index last, and drop shards of an earlier save."""
    index = folder / "model.safetensors.index.json"
    total = len(writers)
    single = total == 1
    files = ["model.safetensors" if single else f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
    for writer, file in zip(writers, files):
        os.replace(writer.path, folder / file)
    if single:
        index.unlink(missing_ok=True)
    else:
        where = {name: file for writer, file in zip(writers, files) for name in writer.entries}
        text = json.dumps({"metadata": {"total_size": sum(w.size for w in writers)}, "weight_map": where}, indent=1)
        written = folder / ".partial" / "index"
        written.write_text(text, encoding="utf-8")
        os.replace(written, index)
    for old in folder.glob("model*.safetensors"):
        if old.name not in files:
            old.unlink()
    return [folder / file for file in files]
