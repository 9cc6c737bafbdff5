"""Seconds until a command has answered, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

from bench.worker import Job, main, timed


def start(job: Job) -> Job:
    command = [sys.executable, "-m", "luthier", *job["arguments"]]
    seconds = timed(lambda: subprocess.run(command, check=True, capture_output=True), 1, job["times"])
    floor = timed(lambda: subprocess.run([sys.executable, "-c", "pass"], check=True), 1, job["times"])
    return {**seconds, "check": [0.0], "floor_seconds": sorted(floor["seconds"])[job["times"] // 2]}


if __name__ == "__main__":
    main(start)
