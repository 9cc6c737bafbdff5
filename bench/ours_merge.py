"""Our side of the merging rows: `luthier merge`, from checkpoint folders to a model folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.checkpoints import samples
from bench.worker import Job, Memory, main, timed
from luthier.merging import merge as merged


def merge(job: Job) -> Job:
    """Seconds and memory of reading, merging and writing."""
    ties = job["method"] == "ties"
    base, options = (job["base"], {"density": job["density"], "scope": "tensor"}) if ties else (None, {})
    with tempfile.TemporaryDirectory(dir=job["folder"]) as folder, Memory() as memory:
        out = Path(folder) / "out"
        seconds = timed(lambda: merged(job["tuned"], job["method"], out, base, options), job["warmup"], job["steps"])
        extra = memory.extra
        sources = ([job["base"]] if ties else []) + job["tuned"]
        floor = max(timed(work, 0, 1)["seconds"][0] for work in (lambda: read(sources), lambda: written(sources[-1], Path(folder) / "floor")))
        return {**seconds, "check": samples(out), "extra_bytes": extra, "floor_seconds": floor}


def blocks(folder: str) -> Iterator[bytes]:
    with (Path(folder) / "model.safetensors").open("rb") as file:
        while block := file.read(1 << 24):
            yield block


def read(sources: list[str]) -> None:
    """All checkpoints, for nothing."""
    for folder in sources:
        for _ in blocks(folder):
            pass


def written(source: str, target: Path) -> None:
    """One checkpoint copied, safe against a crash."""
    with target.open("wb") as out:
        for block in blocks(source):
            out.write(block)
        out.flush()
        os.fsync(out.fileno())


if __name__ == "__main__":
    main(merge)
