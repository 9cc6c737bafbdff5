"""Runs commands of luthier in processes of their own and kills them: python -m tests.killed JOBS.json prints what became of each.

The libraries are imported once and every command runs in a fork, so that a kill costs no second import. A job is {"argv": [...],
"kill": ...}; `kill` is null, {"lines": n} (metrics.jsonl has n lines), {"exists": path}, or {"after": seconds}; {"lines": n, "file": path}
watches another file; "signal" names another signal than SIGKILL. "processes": n starts it as torchrun would, n times.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import sys
import time
from pathlib import Path

PATIENCE = 8.0
"""Seconds for which a process may outlive another that failed."""


def due(kill: dict, started: float) -> bool:
    if "after" in kill:
        return time.monotonic() - started >= kill["after"]
    if "exists" in kill:
        return Path(kill["exists"]).exists()
    try:
        return Path(kill["file"]).read_bytes().count(b"\n") >= kill["lines"]
    except OSError:
        return False


def attempt(job: dict) -> dict:
    """Exit code (negative: the signal), output and error output of one command; with "processes" those of every process of it."""
    n = job.get("processes", 1)
    logs = [f"{job['log']}.{rank}" if n > 1 else job["log"] for rank in range(n)]
    port = free_port() if n > 1 else 0
    children = [start(job, log, {} if n == 1 else environment(rank, n, port)) for rank, log in enumerate(logs)]
    codes = waited(children, job.get("kill"))
    told = [{"code": code, "out": Path(log + ".out").read_text(), "err": Path(log + ".err").read_text()} for code, log in zip(codes, logs)]
    return told[0] if n == 1 else {"processes": told, **told[0]}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def start(job: dict, log: str, env: dict[str, str]) -> int:
    from luthier import cli

    child = os.fork()
    if child:
        return child
    os.environ.update(env)
    for number, word in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{word}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    code = 1
    try:
        code = cli.main(job["argv"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def waited(children: list[int], kill: dict | None) -> list[int]:
    """Exit codes. `kill` hits the first process, or the one of its "rank"; as under torchrun, a process that fails ends the others."""
    codes: dict[int, int] = {}
    started, failed = time.monotonic(), math.inf
    while len(codes) < len(children):
        for child in children:
            done, found = (0, 0) if child in codes else os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(found)
                failed = min(failed, time.monotonic()) if codes[child] else failed
        if kill and due(kill, started):
            for child in children if kill.get("rank") == "all" else [children[kill.get("rank", 0)]]:
                os.kill(child, getattr(signal, kill.get("signal", "SIGKILL")))
            kill = None
        if time.monotonic() - failed > PATIENCE:
            for child in children:
                if child not in codes:
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.001)
    return [codes[child] for child in children]


def main() -> None:
    import peft  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import luthier.run  # noqa: F401

    torch.set_num_threads(1)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps([attempt(job) for job in jobs]))


if __name__ == "__main__":
    main()
