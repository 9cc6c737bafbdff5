"""How much memory this process holds, and at most held."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from pathlib import Path

import torch

STATM = Path("/proc/self/statm")


def held(device: torch.device) -> int:
    """Bytes now: what torch has reserved of a GPU, else of main memory (its peak where the system tells no more)."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    if STATM.exists():
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak(device)


def settle() -> None:
    """Give freed memory back and forget the peak so far, so that what was done before is not charged to what comes. Linux only."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc's alone
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_since() -> int:
    """Bytes of main memory at most since `settle`; 0 where the system does not tell."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return 0


def peak(device: torch.device) -> int:
    """Bytes at most: tensors on a GPU, else all of the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
