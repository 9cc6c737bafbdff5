"""CMUdict spelling to phonemes."""

from __future__ import annotations

import functools
from pathlib import Path

FILE = Path(__file__).with_name("sounds.txt")


@functools.cache
def entries() -> list[tuple[str, tuple[str, ...]]]:
    """(word, phonemes): 23,000 words of 3-7 letters with one pronunciation, frozen from CMUdict."""
    lines = (line.split() for line in FILE.read_text().splitlines())
    return [(word, tuple(phonemes)) for word, *phonemes in lines]
