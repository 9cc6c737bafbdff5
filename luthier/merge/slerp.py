"""SLERP: from one model to another along the great circle between them, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from luthier.catalog import register
from luthier.core.modelmap import depth
from luthier.core.source import TensorSource, aligned, left_out, working
from luthier.errors import RecipeError
from luthier.merge import Merger
from luthier.merge._shared import models

if TYPE_CHECKING:
    from luthier.core.context import Context

PARALLEL = 0.9995
"""Tensors whose cosine is beyond this (either way) are mixed along the straight line."""
ZERO = 1e-8
"""A tensor of this norm or less has no direction."""


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """sin((1-t) w) / sin(w) a + sin(t w) / sin(w) b, w the angle between the tensors as flat vectors; (1-t) a + t b where |cos w| > 0.9995.

    Norms are not evened out: what is mixed are the tensors themselves. In fp32 (fp64 for fp64), in the type of `a`. A tensor of zeros
    counts as orthogonal to the other."""
    dtype = working(torch.promote_types(a.dtype, b.dtype) if a.dtype.itemsize > 1 else torch.float32)
    x, y = a.to(dtype), b.to(a.device, dtype)
    cosine = (_direction(x) * _direction(y)).sum().clamp(-1, 1)
    if abs(float(cosine)) > PARALLEL:
        mixed = (1 - t) * x + t * y
    else:
        angle = torch.acos(cosine)
        mixed = (torch.sin((1 - t) * angle) / torch.sin(angle)) * x + (torch.sin(t * angle) / torch.sin(angle)) * y
    return mixed.to(a.dtype)


def _direction(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x)
    return x / norm if float(norm) > ZERO else x


def factors(t: Any, names: Iterable[str]) -> dict[str, float]:
    """The t of every tensor. A list of numbers is a gradient over depth: block l of L lies at l / (L - 1) of it, what lies outside the
    blocks takes its first number; a list of {filter, value} gives every tensor the value of the first filter that its name contains."""
    found: dict[str, float] = {}
    for name, place in depth(names).items():
        fraction = 0.0 if place is None else place[0] / (place[1] - 1) if place[1] > 1 else 1.0
        value = _value(t, name, fraction)
        if value is None:
            raise RecipeError(f"No filter in `t` of slerp matches the tensor '{name}'; end the list with a value that has no filter, e.g. `- value: 0.5`.")
        found[name] = value
    return found


def _value(t: Any, name: str, fraction: float) -> float | None:
    if not isinstance(t, (list, tuple)):
        return float(t)
    if isinstance(t[0], Mapping):
        chosen = next((one for one in t if one.get("filter") in (None, "*") or str(one["filter"]) in name), None)
        return None if chosen is None else _value(chosen["value"], name, fraction)
    scaled = fraction * (len(t) - 1)
    low = int(scaled)
    share = scaled - low
    return (1 - share) * float(t[low]) + share * float(t[min(len(t) - 1, low + 1)])


def _refuse_bad(t: Any, filters: bool = True) -> None:
    """One clear sentence for a `t` that is none of the three forms."""
    if isinstance(t, (list, tuple)) and t:
        if filters and all(isinstance(one, Mapping) for one in t):
            for one in t:
                if "value" not in one or set(one) - {"filter", "value"}:
                    raise RecipeError(f"An entry of `t` of slerp is {dict(one)}; it needs `value`, and `filter` where only some tensors are meant.")
                _refuse_bad(one["value"], filters=False)
            return
        if all(_is_share(one) for one in t):
            return
    elif _is_share(t):
        return
    raise RecipeError(f"`t` of slerp is {t!r}; give a number from 0 (the first model) to 1 (the second), a list of them over depth, or a list of `filter` and `value`.")


def _is_share(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and 0 <= x <= 1


@register("slerp", paper=(89, 110, 165))
@dataclass
class Slerp(Merger):
    """Mix two models along the arc between their weights, which keeps the length of the weights where a straight line cuts the corner.

    For every tensor, as one flat vector: w = arccos(<a, b> / (|a| |b|)), theta = sin((1-t) w) / sin(w) a + sin(t w) / sin(w) b, with a
    and b as they are, not normalised; (1-t) a + t b where they are nearly parallel or opposite (|cos w| > 0.9995). One tuned model is
    mixed with the base (t = 0 is the base, 1 the tuned model); two tuned models with each other, and the base then only says types and
    what is left out. Of fine-tunes with small updates all tensors are nearly parallel, and slerp is the plain average.

    `t` is a number, a gradient over depth ([0, 0.5, 0.3, 0.7, 1]: piecewise linear from the first block to the last, each tower for
    itself, the first number outside the blocks), or a list of {filter, value} in which the first filter that the tensor's name contains
    decides. Paper 89 mixes the instruct model (base) with the domain model by

        t: [{filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}, {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}, {value: 0.5}]

    The forms, the threshold and the treatment of tensors of zeros (orthogonal to anything) are mergekit's, so its settings carry over;
    the default 0.5 is paper 110's. Integer tensors are the base's."""

    t: Any = 0.5
    """How far to go from the first model (0) to the second (1): a number, a list over depth, or a list of {filter, value}."""
    skip: list[str] = field(default_factory=list)
    """Tensors to leave as the base has them: names, leading parts of names, or globs. Task heads belong here."""

    def __post_init__(self) -> None:
        _refuse_bad(self.t)

    def check(self, recipe: Any) -> str | None:
        named = [n for n in getattr(recipe, "merge_of", None) or [] if n != "base"]
        return _TOO_MANY.format(len(named)) if len(named) > 2 else None

    def merge(self, base: Any, tuned: SequenceOf[Any], ctx: Context | None = None) -> TensorSource:
        listed = models(tuned)
        if len(listed) > 2:
            raise RecipeError(_TOO_MANY.format(len(listed)))
        home = TensorSource.of(listed[0] if base is None else base)
        first, second = (listed if len(listed) == 2 else (home, listed[0]))
        if base is None and len(listed) == 1:
            raise RecipeError("slerp of one model needs a base to mix it with; name a second model in `of`.")
        a, b = (aligned(home, TensorSource.of(one, home), self.skip) for one in (first, second))
        share = factors(self.t, [n for n in home if not left_out(n, self.skip)])

        def read(name: str) -> Tensor:
            own = home[name]
            if name not in share or not own.is_floating_point():
                return own.clone()
            return slerp(a[name], b[name], share[home.aliases.get(name, name)]).to(own.device, own.dtype)

        return TensorSource(home, read, home.meta, home.aliases)


_TOO_MANY = "slerp mixes two models, but {} are named in `of`; name two of them, or use linear or uniform-soup."
