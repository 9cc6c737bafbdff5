"""Both sides of a case, turn by turn in fresh processes, so that whatever else the machine does hits both alike."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import peers
from bench.case import ROOT, WORK, Bench, Case, Row
from bench.worker import Job


class Different(Exception):
    """Both sides did not compute the same numbers, so no ratio of theirs means anything."""


class Failed(Exception):
    """A worker ended without a result."""


def measure(case: Case, bench: Bench, repeats: int) -> Row:
    """The medians of `repeats` turns; refused as soon as the sides differ."""
    job = {**case.job(bench), "threads": bench.threads}
    ours: list[Job] = []
    theirs: list[Job] = []
    difference: float | None = None
    for _ in range(repeats):
        ours.append(work(sys.executable, case.ours, job))
        if case.theirs:
            theirs.append(work(str(peers.python()), case.theirs, job))
            difference = max(difference or 0.0, same(case, ours[-1]["check"], theirs[-1]["check"]))
    return _row(case, bench, job, ours, theirs, difference)


def failed(case: Case, why: str) -> Row:
    """What stands in the table for a row that could not be measured."""
    return Row(case.name, case.work, case.peer, 0.0, case.unit, f"python -m bench {case.name}", 0, goal=asdict(case.goal), settings=case.settings, failed=" ".join(why.split()))


def work(python: str, module: str, job: Job) -> Job:
    """One worker in a process of its own."""
    WORK.mkdir(parents=True, exist_ok=True)
    file = WORK / f"{module}.json"
    file.write_text(json.dumps(job), encoding="utf-8")
    done = subprocess.run([python, "-m", f"bench.{module}", str(file)], cwd=ROOT, env=_environment(job["threads"]), capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise Failed(f"bench.{module} ended with {done.returncode}: {last_line(done.stderr)} `{python} -m bench.{module} {file}` shows the rest.")
    return json.loads(lines[-1])


def last_line(said: str) -> str:
    """The last line of a traceback: what went wrong."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1][-500:] if lines else "it said nothing (out of memory?)"


def _environment(threads: int) -> dict[str, str]:
    own = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(WORK / "datasets"), "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    return {**{k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}, **own}


def same(case: Case, ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest relative difference of what both sides computed; `Different` if it is more than the case allows."""
    if len(ours) != len(theirs) or not ours:
        raise Different(f"{case.name}: our side reports {len(ours)} numbers and {case.peer} {len(theirs)}.")
    # entries near zero are judged by the size of all: an absolute difference far below it is rounding
    size = math.sqrt(sum(v * v for v in theirs) / len(theirs))
    worst, at = 0.0, 0
    for i, (a, b) in enumerate(zip(ours, theirs)):
        apart = abs(a - b) / max(abs(b), 0.01 * size, 1e-12)
        if not apart <= worst:
            worst, at = apart, i
    if not worst <= case.tolerance:
        raise Different(f"{case.name}: number {at} is {ours[at]:.6g} on our side and {theirs[at]:.6g} with {case.peer}; nothing is reported.")
    return worst


def _row(case: Case, bench: Bench, job: Job, ours: list[Job], theirs: list[Job], difference: float | None) -> Row:
    seconds = median(ours, "seconds")
    row = Row(case.name, case.work, case.peer, seconds, case.unit, f"python -m bench {case.name}", extra_of(ours), difference=difference, repeats=len(ours),
              values=len(ours[-1]["check"]), goal=asdict(case.goal), settings=case.settings, rest=case.rest, about=about(bench))  # fmt: skip
    if theirs:
        row.peer_seconds, row.peer_extra_bytes = median(theirs, "seconds"), extra_of(theirs)
        row.cpu_ratio = median(theirs, "cpu_seconds") / median(ours, "cpu_seconds")
    if "whole_seconds" in ours[0]:
        row.whole_seconds = median(ours, "whole_seconds")
    if case.flops is not None:
        count, rate = case.flops(bench, job), median(ours, "flops_per_second")
        row.bound_seconds, row.bound = count / rate, f"{count / 1e9:,.0f} GFLOP that must be done, at {rate / 1e9:.0f} GFLOP/s of a matrix product between the steps"
        row.parts = {**ours[-1]["parts"], "must": case.flops(bench, {**job, "warmup": 0, "rows": job["rows"][: job["batch"]]})}
    elif "floor_seconds" in ours[0]:
        row.bound_seconds, row.bound = min(o["floor_seconds"] for o in ours), case.floor
    return row


def median(results: Sequence[Job], key: str) -> float:
    return statistics.median(value for result in results for value in result[key])


def extra_of(results: Sequence[Job]) -> int:
    return int(statistics.median(result.get("extra_bytes", 0) for result in results))


def about(bench: Bench) -> str:
    """The machine, and how busy it was."""
    import torch

    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{_processor()}, {os.cpu_count()} cores, {bench.threads} threads, torch {torch.__version__}, fp32, {bench.model.name}{load}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        import platform

        return platform.machine()


def as_json(row: Row) -> dict[str, Any]:
    """A row with what follows from it."""
    return {**asdict(row), "ratio": row.ratio, "memory_ratio": row.memory_ratio, "share_of_bound": row.share, "missed": row.missed()}
