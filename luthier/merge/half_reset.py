"""Half-Reset: put a random, balanced half of a fine-tune's matrices back to the base's."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from luthier.adapt.hft import half
from luthier.catalog import register
from luthier.core.context import seed_of
from luthier.core.modelmap import category, depth
from luthier.core.source import TensorSource, aligned, left_out
from luthier.errors import RecipeError
from luthier.merge import Merger
from luthier.merge._shared import models

if TYPE_CHECKING:
    from luthier.core.context import Context

Granularity = Literal["category", "layer", "model"]
Piece = tuple[int, int, int]
"""Rows (or columns) of a tensor: the dimension, from, to."""


def half_reset(base: Any, tuned: Any, keep: float = 0.5, granularity: Granularity = "category", embed: bool = False, seed: int = 0, skip: SequenceOf[str] = ()) -> TensorSource:
    """theta = M theta_tuned + (1 - M) theta_base, M in {0, 1} constant per matrix, lazily; see `HalfReset` for how M is drawn."""
    base = TensorSource.of(base)
    other = aligned(base, TensorSource.of(tuned, base), skip)
    found = pieces(base, skip)
    names = list(found)
    kept = half(names, [k for _, k, _ in found.values()], [b for *_, b in found.values()], seed_of(seed, "half-reset"), keep, granularity)
    inside = {at for places, *_ in found.values() for at in places}

    def read(name: str) -> Tensor:
        first, out = base.aliases.get(name, name), base[name].clone()
        if left_out(name, skip) or not out.is_floating_point():
            return out
        if first not in inside:
            return out if embed else other[name].to(out.dtype)
        for unit in names:
            piece = found[unit][0].get(first, ())
            if unit in kept and piece is None:
                return other[name].to(out.dtype)
            if unit in kept and piece:
                dim, start, end = piece
                out.narrow(dim, start, end - start).copy_(other[name].narrow(dim, start, end - start))
        return out

    return TensorSource(base, read, base.meta, base.aliases)


def pieces(base: TensorSource, skip: SequenceOf[str] = ()) -> dict[str, tuple[dict[str, Piece | None], str, int]]:
    """The units inside the blocks by module path: which tensors (None: the whole of it, else a part), category, block.

    A bias belongs to its matrix. The three parts of a fused query-key-value of three equal thirds (GPT-2, BERT-like) are three units;
    other fused matrices are one."""
    places = depth(base)
    found: dict[str, tuple[dict[str, Piece | None], str, int]] = {}
    for name in base:
        place, meta = places[name], base.meta(name)
        if place is None or base.aliases.get(name, name) != name or left_out(name, skip) or (meta and not meta[1].is_floating_point):
            continue
        path = name.rpartition(".")[0]
        fused = path.endswith(("c_attn", "Wqkv", "qkv"))
        for part, piece in (_thirds(meta[0] if meta else tuple(base[name].shape)) if fused else {"": None}).items():
            found.setdefault(path + part, ({}, category(name), place[0]))[0][name] = piece
    return found


def _thirds(shape: tuple[int, ...]) -> dict[str, Piece | None]:
    if len(shape) == 1 or max(shape) == 3 * min(shape):
        dim = max(range(len(shape)), key=shape.__getitem__)
        third = shape[dim] // 3
        return {f"[{kind}]": (dim, i * third, (i + 1) * third) for i, kind in enumerate(("query", "key", "value"))}
    return {"": None}


@register("half-reset", paper=44)
@dataclass
class HalfReset(Merger):
    """Give back a random half of a fine-tune's matrices to the base: much of what was forgotten returns, and the new skill hardly suffers.

    theta = M theta_tuned + (1 - M) theta_base without any training, M in {0, 1} constant per matrix and balanced as in half fine-tuning: of
    every block 2 of the 4 attention matrices, 1 or 2 of the 3 feed-forward ones, 1 of the 2 norms. Useful as it is and as a probe of how
    much of a fine-tune is needed. Only one tuned model is merged.

    Decided here: what lies outside the blocks (embeddings, final norm, head) stays as tuned; `embed: reset` takes it from the base."""

    keep: float = 0.5
    """Share of the matrices that stay as tuned."""
    granularity: Literal["category", "layer", "model"] = "category"
    """What is balanced: every category in every block; whole blocks; nothing."""
    embed: Literal["keep", "reset"] = "keep"
    """Embeddings, final norm and head."""
    seed: int | None = None
    """Seed of the draw; default: the run's."""
    skip: list[str] = field(default_factory=list)
    """Tensors to leave as the base has them: names, leading parts of names, or globs."""

    def __post_init__(self) -> None:
        if not 0 <= self.keep <= 1:
            raise RecipeError(f"`keep` of half-reset is {self.keep}; it is a share of matrices, from 0 to 1.")
        for name, known in (("granularity", ("category", "layer", "model")), ("embed", ("keep", "reset"))):
            if getattr(self, name) not in known:
                raise RecipeError(f"`{name}` of half-reset is {getattr(self, name)!r}; it is one of {', '.join(known)}.")

    def merge(self, base: Any, tuned: SequenceOf[Any], ctx: Context | None = None) -> TensorSource:
        listed = models(tuned)
        if base is None or len(listed) != 1:
            raise RecipeError(f"half-reset mixes one tuned model with its base; it was given {len(listed)} and {'no' if base is None else 'a'} base.")
        seed = self.seed if self.seed is not None else ctx.seed if ctx is not None else 0
        return half_reset(base, listed[0], self.keep, self.granularity, self.embed == "reset", seed, self.skip)
