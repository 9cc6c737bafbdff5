"""What the processes of both sides do alike: read a job, time steps, watch memory, print one line of JSON. Needs torch alone."""

from __future__ import annotations

import contextlib
import json
import re
import statistics
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Job = dict[str, Any]
STATUS = Path("/proc/self/status")
EVERY = 0.01
"""Seconds between two looks at the memory."""


def main(work: Callable[[Job], Job]) -> None:
    """Run `work` on the job whose file the command line names; its result is the last line of the output."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    with contextlib.redirect_stdout(sys.stderr):
        result = work(job)
    print(json.dumps(result))


class Clock:
    """Seconds between the ends of successive steps: of the wall, and of all the processor's cores, which other work disturbs less.

    The first `warmup` steps (at least one) start the clock. After each step `between` is called while it stands still; what it returns is kept."""

    def __init__(self, warmup: int, between: Callable[[], float] | None = None) -> None:
        self.warmup, self.between = max(1, warmup), between
        self.ends: list[tuple[float, float]] = []
        self.starts: list[tuple[float, float]] = []
        self.found: list[float] = []

    def tick(self) -> None:
        self.ends.append(self._now())
        if self.between is not None:
            self.found.append(self.between())
        self.starts.append(self._now())

    def _now(self) -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    @property
    def result(self) -> dict[str, list[float]]:
        steps = list(zip(self.starts[self.warmup - 1 :], self.ends[self.warmup :]))
        return {name: [b[i] - a[i] for a, b in steps] for i, name in enumerate(("seconds", "cpu_seconds"))}


def timed(run: Callable[[], Any], warmup: int, steps: int, between: Callable[[], float] | None = None) -> dict[str, list[float]]:
    """Seconds of each of `steps` calls, after `warmup` that do not count; and as `between` what that found before, between and after them."""
    for _ in range(warmup):
        run()
    clock = Clock(1, between)
    clock.tick()
    for _ in range(steps):
        run()
        clock.tick()
    return {**clock.result, "between": clock.found}


class Memory:
    """The most memory that this process held beyond what it held at the start, looked at every few milliseconds.

    Counted is anonymous memory: what was allocated, not the pages of files that the system may drop. Made after the model is loaded,
    so that the weights and the libraries do not count."""

    def __init__(self) -> None:
        self.start = self.peak = anonymous_bytes()
        self.over = threading.Event()

    def __enter__(self) -> Memory:
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.watcher.join()

    def _watch(self) -> None:
        while not self.over.wait(EVERY):
            self.peak = max(self.peak, anonymous_bytes())

    @property
    def extra(self) -> int:
        return self.peak - self.start


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind; where the system does not say, the greatest resident size so far."""
    if STATUS.exists():
        return 1024 * sum(int(n) for n in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+)", STATUS.read_text(), re.MULTILINE))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def matmul_rate(size: int = 1024, times: int = 7) -> float:
    """Floating-point operations a second of a square fp32 product: what this machine does just now."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / statistics.median(timed(lambda: a @ b, 1, times)["seconds"])


def start_adapter(network: torch.nn.Module, scale: float = 0.02) -> None:
    """Fill LoRA's factors by the names of their layers, none of them with zeros: both sides start alike and every gradient counts."""
    with torch.no_grad():
        for name, param in network.named_parameters():
            if "lora_" in name:
                seed = zlib.crc32(name[name.index("layers.") :].encode())
                param.normal_(0, scale, generator=torch.Generator().manual_seed(seed))


def without_dropout(network: torch.nn.Module) -> None:
    """So that both sides compute the same numbers."""
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def sample_of(tensor: torch.Tensor, name: str, number: int = 64) -> list[float]:
    """The norm of a tensor and some of its entries, at places that its name decides."""
    flat = tensor.detach().flatten()
    places = torch.randint(flat.numel(), (number,), generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    return [float(flat.double().norm()), *flat[places].double().tolist()]
