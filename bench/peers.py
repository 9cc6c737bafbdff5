"""`python -m bench.peers`: the environment of the libraries that Luthier is measured against, bench/.peers, made when it is first needed, never the user's.

An installation that was interrupted goes on where it stopped: what is there already is kept, and pip keeps what it has loaded."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import venv
from pathlib import Path

from bench.case import ROOT

FOLDER = ROOT / "bench" / ".peers"
WANTED = ROOT / "bench" / "peers.txt"


class NotInstalled(Exception):
    """The peers cannot be had on this machine."""


def python() -> Path:
    """The interpreter of the environment, which is made, finished or brought up to date if it is not what is wanted."""
    stamp, wanted, found = FOLDER / ".ready", _digest(), interpreter()
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return found
    print(f"Installing the peers into {FOLDER} (minutes, once) ...", file=sys.stderr, flush=True)
    if not runs(found):
        _make()
    torch = next(line for line in WANTED.read_text(encoding="utf-8").splitlines() if line.startswith("torch=="))
    install(found, torch)  # first and alone, so that the build the index prefers is taken
    install(found, "--no-deps", "-r", str(WANTED))  # the file names everything, so pip need not search for versions that agree
    stamp.write_text(wanted, encoding="utf-8")
    return found


def interpreter() -> Path:
    return FOLDER / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def runs(found: Path) -> bool:
    """Whether an earlier attempt left an interpreter of this Python with a pip that works."""
    asked = "import sys, pip; print(sys.version_info[:2])"
    try:
        done = subprocess.run([str(found), "-c", asked], capture_output=True, text=True)
    except OSError:
        return False
    return done.returncode == 0 and done.stdout.strip() == str(sys.version_info[:2])


def _make() -> None:
    try:
        venv.create(FOLDER, with_pip=True, clear=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotInstalled(f"The environment {FOLDER} of the peers cannot be made: {error}. It takes Python's venv and 4 GB of disk.") from error


def install(interpreter: Path, *what: str) -> None:
    """pip, whose many lines become one sentence where it fails."""
    command = [str(interpreter), "-m", "pip", "install", "-q", "--no-compile", "--disable-pip-version-check", *what]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise NotInstalled(f"The peers cannot be installed into {FOLDER}: {reason(done.stdout)} `python -m bench.peers` goes on with what is there.")


def reason(said: str) -> str:
    """What pip gives as the cause: its last error, or its last line that is no warning."""
    lines = [line.strip() for line in said.splitlines() if line.strip() and not line.startswith("WARNING:")]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    found = (errors or lines or ["pip was stopped"])[-1]
    return found if found.endswith(".") else found + "."


def _digest() -> str:
    return hashlib.sha256(WANTED.read_bytes()).hexdigest()


if __name__ == "__main__":
    try:
        print(python())
    except NotInstalled as error:
        sys.exit(str(error))
