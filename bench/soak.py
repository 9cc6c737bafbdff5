"""`python -m bench.soak --minutes 60`: a long run at toy size, in a process of its own, that is stopped and continued; writes bench/SOAK.md.

What must hold: memory does not grow, as many checkpoints stay as the recipe says, SIGTERM ends the run with a checkpoint and
`--resume` goes on from it, a full disk ends it with a sentence and costs nothing that was saved. Exit code 1 where one of them fails.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
KEEP = 3
SETTLED = 0.2
"""The share of the run in which caches fill; growth is looked for after it."""
GROWTH = 0.02
"""Growth of memory over the rest of the run that is still called flat."""
RECIPE = ["model=lab:lm-s", "data=lab:traces?n=400&skills=sort", "adapt=lora", "optimize.lr=1e-4", "train.steps=100000000", "train.schedule=constant", "train.warmup=0", "train.batch=16",
          "train.save_every=50", f"train.keep={KEEP}", "train.log_every=5", "measure=[]"]  # fmt: skip


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "luthier", "tune", *words, "--quiet"]
    return subprocess.Popen(command + ([] if "--resume" in words else ["--run", str(folder)]), stderr=subprocess.PIPE, text=True)


def lines(folder: Path) -> list[dict[str, float]]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []


def checkpoints(folder: Path) -> int:
    return len(list((folder / "checkpoints").glob("step-*")))


def soaked(folder: Path, minutes: float) -> tuple[list[str], list[str]]:
    """What was seen, and what was wrong, in one long run that is stopped by SIGTERM and continued."""
    run, began, most = start(folder, *RECIPE), time.monotonic(), 0
    while time.monotonic() - began < 60 * minutes and run.poll() is None:
        most = max(most, checkpoints(folder))
        time.sleep(1)
    run.send_signal(signal.SIGTERM)
    said = run.communicate(timeout=120)[1].strip()
    told = lines(folder)
    memory = np.array([line["memory_gib"] for line in told])
    rest = memory[int(SETTLED * len(memory)) :]
    slope = float(np.polyfit(np.linspace(0, 1, len(rest)), rest, 1)[0] / rest.mean()) if len(rest) > 2 else float("nan")
    step = int(told[-1]["step"]) if told else 0
    seen = [
        f"{minutes:g} minutes, {step:,} steps, {step // 50:,} checkpoints written, at most {most} on disk at once (keep = {KEEP}; one more while one is being written).",
        f"Memory of the process: {rest.min():.3f} to {rest.max():.3f} GiB after the first {SETTLED:.0%}; the fitted line grows by {slope:+.2%} over the rest.",
        f"SIGTERM: exit code {run.returncode}, \"{said.splitlines()[0] if said else ''}\"",
    ]
    wrong = [word for word, bad in (("memory grows", not slope < GROWTH), ("too many checkpoints", most > KEEP + 1), ("SIGTERM is not heeded", run.returncode != 143)) if bad]
    again = start(folder, str(folder), "--resume")
    _until(lambda: bool(lines(folder)) and lines(folder)[-1]["step"] > step + 100, again)
    again.send_signal(signal.SIGTERM)
    again.communicate(timeout=120)
    after = [line["step"] for line in lines(folder)]
    whole = after == sorted(set(after)) and after[-1] > step
    seen.append(f"Continued to step {int(after[-1]):,}; every logged step is there {'once' if whole else 'NOT once'}.")
    return seen, wrong + ([] if whole else ["the continued run's log has holes or repetitions"])


def filled(disk: Path) -> tuple[list[str], list[str]]:
    """The same on a disk of a few MB that somebody else fills."""
    folder = disk / "run"
    run = start(folder, *RECIPE)
    _until(lambda: checkpoints(folder) > 0, run)
    hog = disk / "hog"
    with open(hog, "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 4096)
        except OSError:
            pass
    said = run.communicate(timeout=600)[1].strip().replace(str(disk), "DISK")
    kept = lines(folder)
    hog.unlink()
    again = start(folder, str(folder), "--resume")
    _until(lambda: bool(lines(folder)) and lines(folder)[-1]["step"] > kept[-1]["step"] + 60, again)
    again.send_signal(signal.SIGTERM)
    again.communicate(timeout=120)
    told = "disk is full" in said and "--resume" in said
    seen = [f"Full disk: exit code {run.returncode}, \"{said.splitlines()[0] if said else ''}\"; with room again it went on to step {int(lines(folder)[-1]['step']):,}."]
    return seen, ([] if run.returncode == 2 and told else ["a full disk is not told"])


def _until(done: Callable[[], bool], run: subprocess.Popen[str], seconds: float = 600) -> None:
    began = time.monotonic()
    while not done() and run.poll() is None and time.monotonic() - began < seconds:
        time.sleep(0.2)


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A disk of 24 MB in memory, where this user may mount one."""
    folder.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], capture_output=True)


def main() -> int:
    parser = argparse.ArgumentParser("python -m bench.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--out", type=Path, default=HERE)
    given = parser.parse_args()
    work = HERE / ".work" / f"soak-{time.strftime('%Y%m%d-%H%M%S')}"
    seen, wrong = soaked(work / "run", given.minutes)
    with small_disk(work / "disk") as disk:
        more, worse = ([], []) if disk is None else filled(disk)
    seen += more or ["Full disk: not tried, since no small disk could be mounted (that takes root)."]
    text = f"# A long run\n\nMeasured by `python -m bench.soak --minutes {given.minutes:g}`.\n\n" + "".join(f"- {s}\n" for s in seen)
    (given.out / "SOAK.md").write_text(text + ("\n" + "".join(f"WRONG: {w}\n" for w in wrong + worse) if wrong + worse else ""), encoding="utf-8")
    print(text, *[f"WRONG: {w}" for w in wrong + worse], sep="\n")
    return 1 if wrong + worse else 0


if __name__ == "__main__":
    sys.exit(main())
