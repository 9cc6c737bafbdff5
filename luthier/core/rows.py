"""Data sets, from a file to token sequences. Everything about rows is imported from here.

    rows = load_rows("train.jsonl")             # checked, in the library's columns: core/columns.py, core/readers.py, core/loading.py
    rows.take([3, 1])                           # row ids stay with the rows: core/dataset.py
    encode(rows[0], tokenizer)                  # token ids and what is supervised: core/encode.py, core/chat.py

`core/columns.py` states the column conventions, `core/encode.py` what becomes of each kind of row.
"""

from __future__ import annotations

from luthier.core.columns import KINDS, kind_of, preference_parts
from luthier.core.dataset import Aside, Rows
from luthier.core.encode import (
    TRAIN_ON,
    answer_of,
    encode,
    fit_lengths,
    lengths,
    negatives_of,
    prompt_ids,
    prompt_text,
    prompt_turns,
)
from luthier.core.loading import hold_out, load_rows, load_streams

__all__ = [
    "KINDS",
    "TRAIN_ON",
    "Aside",
    "Rows",
    "answer_of",
    "encode",
    "fit_lengths",
    "hold_out",
    "kind_of",
    "lengths",
    "load_rows",
    "load_streams",
    "negatives_of",
    "preference_parts",
    "prompt_ids",
    "prompt_text",
    "prompt_turns",
]
