"""What the conformance checks share: the method under test with toy rows and models, and how a finding is told."""

from __future__ import annotations

import copy
import functools
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from luthier.core.batch import Batch
from luthier.core.context import Context
from luthier.errors import UserError
from luthier.testing import tiny, toys


class NotConforming(AssertionError):
    """What a method does not hold to, in one sentence."""


class Case:
    """One method under test, with toy rows and models for it."""

    def __init__(self, cls: Any, options: dict[str, Any], family: str | None = None) -> None:
        self.cls, self.options, self.given = cls, {**cls.toy, **options}, options
        self.family = family or toys.shared_family([cls]) or "causal-lm"
        self.columns = toys.columns_for([cls], self.family)
        self.whole: Any = None
        """The finished run of `runs_in_a_recipe`, and its recipe."""
        self.plan: dict[str, Any] = {}

    @functools.cached_property
    def folder(self) -> Path:
        """Where runs of this method go; removed at the end."""
        return Path(tempfile.mkdtemp(prefix="luthier-check-"))

    @functools.cached_property
    def families(self) -> list[Case]:
        """The same case for every family of models that the method serves, its first one first."""
        return [self, *(Case(self.cls, self.given, f) for f in toys.FAMILIES if f in self.cls.families and f != self.family)]

    @functools.cached_property
    def attached(self) -> tuple[Any, Any, Any, torch.Tensor]:
        """A model with the method attached, the method, its parts (None where it is refused), and the model's outputs before."""
        model, plugin = self.model(), self.build()
        with torch.no_grad():
            before = outputs(self, model.eval())
        return model, plugin, allowed(plugin.attach, model, self.context(model)), before

    def build(self) -> Any:
        return self.cls(**copy.deepcopy(self.options))

    def model(self, seed: int = 0) -> Any:
        make: Any = {
            "causal-lm": tiny.tiny_llama, "text-encoder": lambda seed: tiny.tiny_bert(seed=seed, classes=3),
            "image-classifier": tiny.tiny_vit, "dual-encoder": tiny.tiny_clip,
        }[self.family]  # fmt: skip
        return make(seed=seed)

    def rows(self, n: int = 6) -> Any:
        from luthier.core.rows import Rows

        return Rows.of(toys.rows(self.columns, n))

    def context(self, model: Any = None, n: int = 6) -> Context:
        from luthier.core.rows import Rows

        model = model or self.model()
        streams = {name: self.rows(n) for name in ("train", "test", "val", "general")}
        streams |= {name: Rows.of(toys.rows(own, n)) for name, own in getattr(self.cls, "toy_streams", {}).items()}
        frozen = model.frozen_copy()
        models = dict.fromkeys(("base", "stage", "previous", *getattr(self.cls, "toy_models", ())), frozen)
        ctx = Context(model, 0, streams, models)
        ctx.clock.steps = 8
        ctx.evaluator = lambda source: float(sum(v.float().sum() for v in dict(source).values() if v.is_floating_point()) % 1)
        return ctx

    def batch(self, plugin: Any, ctx: Context, n: int = 4) -> Batch:
        rows = self.rows(n)
        return plugin.collate(list(rows), rows.ids, ctx) if hasattr(plugin, "collate") else ctx.current.collate(list(rows), rows.ids)  # type: ignore[union-attr]


def ensure(condition: Any, sentence: str) -> None:
    if not condition:
        raise NotConforming(sentence)


def allowed(work: Callable[..., Any], *given: Any) -> Any:
    """What the work gives; None where it is refused with a sentence."""
    try:
        return work(*given)
    except UserError:
        return None


def outputs(case: Case, model: Any) -> torch.Tensor:
    """What the model makes of three rows: numbers that depend on its weights."""
    batch = model.collate(list(case.rows(3)))
    if "score" in model.verbs:
        return model.score(batch).logp
    return model.classify(batch) if "classify" in model.verbs else torch.cat([model.embed(batch, branch).flatten() for branch in ("image", "text")])


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, through nested containers."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    return bool(a == b) or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))
