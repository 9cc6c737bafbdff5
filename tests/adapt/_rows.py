"""Tiny families whose rows are ids, so that adapter tests need no tokenizer."""

from __future__ import annotations

import types

import numpy as np

from luthier.core.batch import Batch, Sequence
from luthier.core.context import Context
from tests.helpers import tiny_llama

ROWS = [{"ids": [(7 * i + 3 * j) % 40 + 5 for j in range(4 + i % 5)]} for i in range(12)]


def by_ids(model):
    """Let `collate` read rows of the form {"ids": [...]}; the second half is supervised."""

    def collate(self, rows, ids=None, train_on="completion"):
        made = [Sequence(np.array(r["ids"]), np.arange(len(r["ids"])) >= len(r["ids"]) // 2, row=i) for i, r in enumerate(rows)]
        return Batch(list(rows), np.arange(len(rows)), made)

    model.collate = types.MethodType(collate, model)
    return model


def llama(**kw):
    return by_ids(tiny_llama(**{"hidden": 16, "vocab": 48, **kw}))


def context(model=None, rows=ROWS, **streams):
    return Context(model, streams={"train": rows, **streams}, batch_size=6)
