"""How much memory this process holds, and at most held."""

from __future__ import annotations

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


def peak(device: torch.device) -> int:
    """Bytes at most: tensors on a GPU, else all of the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
