"""Our side of the MIG rows: the whole choice, from lists of tags to picks."""

from __future__ import annotations

from collections import Counter
from itertools import chain

from bench.texts import tags
from bench.worker import Job, Memory, main, timed
from luthier.select.mig import mig


def choose(job: Job) -> Job:
    """Seconds a pick, and the first picks."""
    lists, quality = tags(job["number"], job["tags"])
    found: list[float] = []

    def run() -> None:
        found[:] = mig(lists, quality, job["budget"])[: job["compared"]].tolist()

    with Memory() as memory:
        seconds = timed(run, job["warmup"], job["steps"])
    whole = {key: [s / job["budget"] for s in values] for key, values in seconds.items()}
    floor = min(timed(lambda: Counter(chain.from_iterable(lists)), 0, 2)["seconds"]) / job["budget"]
    return {**whole, "check": found, "extra_bytes": memory.extra, "whole_seconds": seconds["seconds"], "floor_seconds": floor}


if __name__ == "__main__":
    main(choose)
