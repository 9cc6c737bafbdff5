"""GGUF files of Llama-type models."""

from __future__ import annotations

from pathlib import Path


def export_gguf(directory: str | Path, out: str | Path) -> Path:
    raise NotImplementedError
