"""Our side of the merging rows: from checkpoint folders to a checkpoint file."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from bench.checkpoints import samples
from bench.worker import Job, Memory, main, timed
from luthier.core.source import TensorSource
from luthier.merge.ties import Ties
from luthier.merge.uniform_soup import UniformSoup


def merge(job: Job) -> Job:
    """Seconds and memory of reading, merging and writing."""
    merger = Ties(density=job["density"], scope="tensor") if job["method"] == "ties" else UniformSoup()
    with tempfile.TemporaryDirectory(dir=job["folder"]) as folder, Memory() as memory:
        seconds = timed(lambda: TensorSource.of(merger.merge(job["base"], job["tuned"])).save(folder), job["warmup"], job["steps"])
        extra = memory.extra
        sources = ([job["base"]] if job["method"] == "ties" else []) + job["tuned"]
        floor = timed(lambda: copied(sources, Path(folder) / "floor"), 0, 1)["seconds"][0]
        (Path(folder) / "floor").unlink()
        return {**seconds, "check": samples(Path(folder)), "extra_bytes": extra, "floor_seconds": floor}


def copied(sources: list[str], target: Path) -> None:
    """Read all checkpoints, write the last one."""
    with target.open("wb") as out:
        for folder in sources:
            with (Path(folder) / "model.safetensors").open("rb") as file:
                while block := file.read(1 << 24):
                    if folder == sources[-1]:
                        out.write(block)
        out.flush()
        os.fsync(out.fileno())


if __name__ == "__main__":
    main(merge)
