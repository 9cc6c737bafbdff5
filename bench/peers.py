"""The environment of the libraries that Luthier is measured against: bench/.peers, made when it is first needed, never the user's."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import venv
from pathlib import Path

from bench.case import ROOT

FOLDER = ROOT / "bench" / ".peers"
WANTED, PINNED = ROOT / "bench" / "peers.txt", ROOT / "constraints.txt"


def python() -> Path:
    """The interpreter of the environment, which is made or renewed if the wanted versions changed."""
    stamp, wanted = FOLDER / ".ready", _digest()
    found = FOLDER / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        print(f"Installing the peers into {FOLDER} (minutes, once) ...", file=sys.stderr)
        venv.create(FOLDER, with_pip=True, clear=True)
        torch = next(line for line in WANTED.read_text(encoding="utf-8").splitlines() if line.startswith("torch=="))
        _install(found, torch)  # first and alone, so that the build the index prefers is taken and nothing else pulls another one
        _install(found, "-r", str(WANTED))
        stamp.write_text(wanted, encoding="utf-8")
    return found


def _install(interpreter: Path, *what: str) -> None:
    subprocess.run([str(interpreter), "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", str(PINNED), *what], check=True)


def _digest() -> str:
    return hashlib.sha256(WANTED.read_bytes() + PINNED.read_bytes()).hexdigest()
