"""Our side of the merging rows: `luthier merge`, from checkpoint folders to a model folder."""

from __future__ import annotations

import os
import tempfile
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
        floor = timed(lambda: copied(sources, Path(folder) / "floor"), 0, 1)["seconds"][0]
        return {**seconds, "check": samples(out), "extra_bytes": extra, "floor_seconds": floor}


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
