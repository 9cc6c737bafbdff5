"""Runs commands of luthier in processes of their own and kills them: python -m tests.killed JOBS.json prints what became of each.

The libraries are imported once and every command runs in a fork, so that a kill costs no second import. A job is {"argv": [...],
"kill": ...}; `kill` is null, {"lines": n} (metrics.jsonl has n lines), {"exists": path}, or {"after": seconds}; {"lines": n, "file": path}
watches another file; "signal" names another signal than SIGKILL.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path


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
    """Exit code (negative: the signal), output and error output of one command."""
    from luthier import cli

    out, err = Path(job["log"] + ".out"), Path(job["log"] + ".err")
    child = os.fork()
    if child == 0:
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
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
    kill, started, status = job.get("kill"), time.monotonic(), None
    while status is None:
        done, found = os.waitpid(child, 0 if not kill else os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(found)
        elif due(kill, started):
            os.kill(child, getattr(signal, kill.get("signal", "SIGKILL")))
            kill = None
        else:
            time.sleep(0.001)
    return {"code": status, "out": out.read_text(), "err": err.read_text()}


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
