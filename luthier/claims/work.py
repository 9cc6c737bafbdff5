"""Running claims: one process a claim and seed, one thread each, as many at once as there are cores.

A worker prints one line of JSON for every arm it has finished, and the parent stores it at once; so a crash or a kill costs no more
than the arms in flight, and running again goes on where it stopped.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier.claims import GRID_SEED, Arm, Claim, find
from luthier.claims.evidence import Store, finite

MARK = "\x1eluthier-claim "
"""Begins a worker's line of results; everything else it prints is chatter."""


@dataclass(frozen=True)
class Job:
    """One process: some arms of a claim at one seed."""

    claim: Claim
    seed: int
    quick: bool
    arms: tuple[str, ...]
    points: Mapping[str, Sequence[dict[str, Any]]] = field(default_factory=dict)
    """Settings to try for each of the arms: a grid search."""


def run(slugs: Iterable[str], quick: bool = False, seeds: Iterable[int] | None = None, cores: int | None = None, tell: Callable[[str], None] = print) -> None:
    """Run claims until their evidence is whole; what is stored already is not run again."""
    claims = [find(s) for s in slugs]
    stores = {c.slug: Store(c) for c in claims}
    cores = cores or os.cpu_count() or 1
    _each(_grid_jobs(claims, stores, quick, cores), stores, cores, tell)
    _each(_jobs(claims, stores, quick, None if seeds is None else list(seeds)), stores, cores, tell)
    for store in stores.values():
        store.save()


def _grid_jobs(claims: list[Claim], stores: dict[str, Store], quick: bool, cores: int) -> list[Job]:
    """Searches that are still to do. A quick run makes do with what is stored, else with a grid's middle."""
    jobs: list[Job] = []
    for claim in [] if quick else claims:
        still = {arm.name: [p for p in points(arm) if stores[claim.slug].grid_value(arm, p) is None] for arm in claim.arms.values() if len(points(arm)) > 1}
        jobs += [Job(claim, GRID_SEED, False, tuple(share), share) for share in _shares({arm: found for arm, found in still.items() if found}, cores)]
    return jobs


def _shares(arms: Mapping[str, list[dict[str, Any]]], cores: int) -> list[dict[str, list[dict[str, Any]]]]:
    """Arms for about equally busy processes, no more of them than cores: what the arms of one process have in common is made once."""
    shares: list[dict[str, list[dict[str, Any]]]] = [{} for _ in range(min(cores, len(arms)))]
    for name, found in sorted(arms.items(), key=lambda item: -len(item[1])):
        min(shares, key=lambda share: sum(map(len, share.values())))[name] = found
    return shares


def _jobs(claims: list[Claim], stores: dict[str, Store], quick: bool, seeds: list[int] | None) -> list[Job]:
    """Seeds go first around the claims, so that every claim has something early."""
    jobs: list[Job] = []
    for turn in range(max((len(seeds or c.seeds) for c in claims), default=0)):
        for claim in claims:
            mine = (seeds or claim.seeds)[: 1 if quick and seeds is None else None]
            if turn < len(mine):
                arms = tuple(a.name for a in claim.chosen_arms(quick) if not stores[claim.slug].has(a.name, mine[turn], quick))
                if arms:
                    jobs.append(Job(claim, mine[turn], quick, arms))
    return jobs


def points(arm: Arm) -> list[dict[str, Any]]:
    """Every combination of an arm's grid."""
    found: list[dict[str, Any]] = [{}]
    for key, values in arm.grid.items():
        found = [{**p, key: v} for p in found for v in values]
    return found


def _each(jobs: list[Job], stores: dict[str, Store], cores: int, tell: Callable[[str], None]) -> None:
    """Jobs on so many threads; each thread minds one process at a time."""
    waiting, lock = list(jobs), threading.Lock()
    processes: list[subprocess.Popen[str]] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            while True:
                with lock:
                    if not waiting:
                        return
                    job = waiting.pop(0)
                _one(job, stores[job.claim.slug], processes, lock, tell)
        except BaseException as error:  # a full disk, say; it is raised where the user hears it
            errors.append(error)
            with lock:
                waiting.clear()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(max(1, min(cores, len(jobs))))]
    for thread in threads:
        thread.start()
    try:
        while any(t.is_alive() for t in threads):
            time.sleep(0.1)
    finally:
        with lock:
            waiting.clear()
        for process in processes:
            if process.poll() is None:
                process.terminate()
    if errors:
        raise errors[0]


def _one(job: Job, store: Store, processes: list[subprocess.Popen[str]], lock: threading.Lock, tell: Callable[[str], None]) -> None:
    """A job's process; what it tells is stored as it comes."""
    request = json.dumps([str(job.claim.file), job.seed, job.quick, job.arms, job.points, store.chosen()])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen([sys.executable, "-m", "luthier.claims.work", request], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    with lock:
        processes.append(process)
    said: list[str] = []
    listener = threading.Thread(target=lambda: said.extend(process.stderr or ()), daemon=True)
    listener.start()
    finished = set()
    for line in process.stdout or ():
        if not line.startswith(MARK):
            continue
        record = json.loads(line[len(MARK) :])
        finished.add(record["arm"])
        with lock:
            store.take(record, grid=bool(job.points))
        tell(_line(job, record))
    code = process.wait()
    listener.join(1)
    lost = [a for a in job.arms if a not in finished]
    if code and lost:
        why = next((s.strip() for s in reversed(said) if s.strip()), f"exit code {code}")
        record = {"arm": lost[0], "seed": job.seed, "quick": job.quick, "error": f"the process ended early: {why}"}
        with lock:
            store.take(record)
        tell(_line(job, record))


def _line(job: Job, record: dict[str, Any]) -> str:
    claim = job.claim
    if "error" in record:
        return f"{claim.slug} seed {job.seed}: {record['arm']} FAILED: {record['error']}"
    value = record["metrics"].get(claim.metric)
    shown = "not a number" if value is None else f"{value:.4g}"
    where = f"grid {json.dumps(record['settings'])}" if job.points else f"seed {job.seed}{' (quick)' if job.quick else ''}"
    return f"{claim.slug} {where}: {record['arm']}: {claim.metric} {shown} in {record['seconds']:.0f} s"


# -- in the worker -----------------------------------------------------------------------------------------------------------


def _worker(slug: str, seed: int, quick: bool, arms: list[str], settings: dict[str, list[dict[str, Any]]], chosen: dict[str, dict[str, Any]]) -> None:
    import torch

    from luthier.claims.trial import Shared
    from luthier.core import memory

    global IDLE
    torch.set_num_threads(1)
    claim, shared = find(slug), Shared()
    for name in ("luthier.core.stage", "peft", "sklearn.linear_model", "scipy.stats") if claim.methods else ():
        importlib.import_module(name)  # what every arm may import is no arm's cost
    memory.settle()
    IDLE = memory.held(torch.device("cpu"))
    for name in arms:
        arm = claim.arms[name]
        middle = {k: v[len(v) // 2] for k, v in arm.grid.items()}
        for point in settings.get(name) or [chosen.get(name, middle)]:
            try:
                record = _arm(claim, arm, seed, quick, point, shared)
            except Exception as error:  # the other arms can still tell something
                traceback.print_exc()
                record = {"arm": name, "seed": seed, "quick": quick, "settings": point, "error": f"{type(error).__name__}: {error}"}
            print(MARK + json.dumps(record), flush=True)


def _arm(claim: Claim, arm: Arm, seed: int, quick: bool, point: dict[str, Any], shared: Any) -> dict[str, Any]:
    import torch

    from luthier.claims.trial import Trial
    from luthier.core import memory

    torch.manual_seed(seed)
    trial = Trial(seed, arm.name, point, quick, shared)
    memory.settle()
    started = time.process_time()  # CPU time of one thread: what else the machine does is not the arm's cost
    try:
        metrics = dict(arm.run(trial))
    finally:
        trial.close()
    if claim.metric not in metrics:
        raise KeyError(f"the arm '{arm.name}' gives no '{claim.metric}'")
    return {
        "arm": arm.name, "seed": seed, "quick": quick, "settings": point, "metrics": {k: finite(v) for k, v in metrics.items()}, "spent": trial.spent,
        "notes": trial.notes, "seconds": round(time.process_time() - started, 2), "memory_mb": round(max(0, memory.peak_since() - IDLE) / 2**20, 1), "threads": torch.get_num_threads(),
    }  # fmt: skip


IDLE = 0
"""Bytes of a worker that has done nothing yet; an arm's memory is its peak beyond them."""


if __name__ == "__main__":
    _worker(*json.loads(sys.argv[1]))
