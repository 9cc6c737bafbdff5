"""PortLLM: carry the patch of an old base model over to its successor."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from luthier.catalog import register
from luthier.core.source import TensorSource, applied, delta, left_out
from luthier.core.sources import Sources
from luthier.errors import ModelError, RecipeError
from luthier.merge._shared import VectorMerger, best, models, summed

if TYPE_CHECKING:
    from luthier.core.context import Context

GRID = tuple(round(i / 4, 2) for i in range(7))


def make_patch(old: Any, tuned: Any, skip: SequenceOf[str] = ()) -> TensorSource:
    """What a fine-tune changed in its own base, Delta_i = theta_i - theta; of a LoRA folder the product (alpha / r) B A itself, free of cancellation."""
    found = TensorSource.of(tuned, old)
    if found.update is not None:
        update = found.update
        return update.only(n for n in update if not left_out(n, skip))
    return delta(TensorSource.of(old), found, skip, wide=True)


def portllm(patch: Mapping[str, Tensor], new: Any, scale: float = 1.0) -> TensorSource:
    """theta' + scale * Delta_i, lazily, added in fp32 and written in the new base's types. A patch that does not fit is refused."""
    new, patch = TensorSource.of(new), TensorSource.of(patch)
    fits(new, patch)
    return applied(new, patch if scale == 1.0 else patch.map(lambda t: scale * t if t.is_floating_point() else t))


def fits(new: TensorSource, patch: TensorSource) -> None:
    """Refuse a patch whose tensors the new base lacks, has in other shapes (another vocabulary, another width), or ties otherwise."""
    lacking = [n for n in patch if n not in new]
    if lacking:
        raise ModelError(f"The patch cannot be ported: it changes '{lacking[0]}' ({len(lacking)} such tensors), which the new base does not have.")
    for name in patch:
        here, there = new.meta(name), patch.meta(name)
        if here and there and here[0] != there[0]:
            why = " Its vocabulary was resized, so token rows no longer correspond." if "embed" in name or "head" in name else ""
            raise ModelError(f"The patch cannot be ported: '{name}' is {list(there[0])} in the patch and {list(here[0])} in the new base.{why}")
    for alias, first in new.aliases.items():
        if alias in patch and first in patch and patch.aliases.get(alias) != first and not torch.equal(patch[alias], patch[first]):
            raise ModelError(f"The patch cannot be ported: '{alias}' and '{first}' are one tensor in the new base, but the patch changes them differently; leave one out with `skip`.")
    for alias, first in patch.aliases.items():
        if alias in new and first in new and new.aliases.get(alias) != first and not torch.equal(new[alias], new[first]):
            raise ModelError(f"The patch cannot be ported: '{alias}' and '{first}' are one tensor in the old base and two in the new one; leave them out with `skip`.")


def cosine(one: Tensor, other: Tensor) -> float:
    """The cosine of two tensors as vectors; 0 where one is all zero."""
    a, b = one.double().flatten(), other.double().flatten().to(one.device)
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size else 0.0


def same_tokens(one: Any, other: Any) -> bool:
    """Whether two tokenizers give every token the same id; unknown ones pass."""
    if not (hasattr(one, "get_vocab") and hasattr(other, "get_vocab")):
        return True
    return one.get_vocab() == other.get_vocab()


@register("portllm", paper=91)
@dataclass
class PortLLM(VectorMerger):
    """When the base model is updated, add the old patch to the new base as it is: no data, no training.

    theta' + scale * Delta_i with Delta_i = theta_i - theta (LoRA: (alpha / r) B A), in the place of a patch that is trained anew on theta'.
    The difference of both is Delta'_i - Delta_i; the paper argues that it is small, and `measure: portability` says whether it is. Adding
    commutes: the order of the base's updates and of patches does not matter, and theta' = theta gives the fine-tune back bit for bit.

    Two ways to use it. The recipe's model is the new base, `of` names old fine-tunes and `old` the base they were made from (a LoRA
    folder needs no `old`). Or the recipe trains on the old base and `onto` names the new one. Where neither is given the base has not
    changed, and the patches are added to it. A patch of other shapes, another vocabulary or other ties is refused. `scale: auto` (on
    validation rows) and `drop_below` (leave out tensors whose patch points against the base's own change) are ours, not the paper's.
    The paper's patches are LoRA of rank 8 on attention projections, as far as we know; any fine-tune can be ported."""

    old: str | None = None
    """The old base: a name under `models:`, or a folder. Then the recipe's model is the new base."""
    onto: str | None = None
    """The new base: a name under `models:`, or a folder. Then the recipe's model is the old base."""
    scale: float | Literal["auto"] = 1.0
    """Factor on the patch; `auto` tries 0 ... 1.5 on validation rows."""
    drop_below: float | None = None
    """Leave out tensors whose patch has a cosine below this with the base's change (needs `onto` or `old`); e.g. -0.5."""
    skip: list[str] = field(default_factory=list)
    """Tensors to leave as the new base has them: names, leading parts of names, or globs."""

    by_rows = True

    def __post_init__(self) -> None:
        if self.old is not None and self.onto is not None:
            raise RecipeError("portllm takes `old` (the recipe's model is the new base) or `onto` (it is the old one), not both.")
        if isinstance(self.scale, str) and self.scale != "auto":
            raise RecipeError(f"`scale` of portllm is '{self.scale}'; give a number or 'auto'.")
        if self.drop_below is not None and not -1 <= self.drop_below <= 1:
            raise RecipeError(f"`drop_below` of portllm is {self.drop_below}; a cosine lies between -1 and 1.")
        if self.drop_below is not None and self.old is None and self.onto is None:
            raise RecipeError("`drop_below` of portllm compares the patch with the base's own change; name the other base with `old` or `onto`.")
        self.report: dict[str, Any] = {}

    def update(self, base: Any, tuned: SequenceOf[Any], ctx: Context | None = None) -> TensorSource:
        return delta(TensorSource.of(base), self.merge(base, tuned, ctx), self.skip, wide=True)

    def merge(self, base: Any, tuned: SequenceOf[Any], ctx: Context | None = None) -> TensorSource:
        base = TensorSource.of(base)
        old = base if self.old is None else self._other(self.old, ctx)
        new = base if self.onto is None else self._other(self.onto, ctx)
        sources = [TensorSource.of(one, old) for one in models(tuned)]
        if self.old is None and self.onto is None and ctx is not None and any(s.update is None for s in sources):
            ctx.notice("portllm was given neither `old` nor `onto`, so it takes the fine-tunes to be of this very base; name the base they were made from with `old`.")
        patches = [make_patch(old, one, self.skip) for one in sources]
        for patch in patches:
            fits(new, patch)
        patch = patches[0] if len(patches) == 1 else summed([_over(new, p) for p in patches])
        if self.drop_below is not None:
            patch = self._agreeing(patch, delta(old, new, self.skip, wide=True))
        scale = self._scale(patch, new, ctx)
        self.report |= {"scale": scale, "patches": len(patches)}
        return portllm(patch, new, scale)

    def _other(self, name: str, ctx: Context | None) -> TensorSource:
        """The other base, after a look at its tokens."""
        if ctx is not None and ctx.has_model(name):
            family = ctx.model(name)
            if ctx.current is not None and not same_tokens(getattr(ctx.current, "tokenizer", None), getattr(family, "tokenizer", None)):
                raise ModelError(f"'{name}' has another tokenizer than the recipe's model, so a patch of one means something else in the other; it cannot be ported.")
            return TensorSource.of(family)
        return Sources(ctx.current).of(name) if ctx is not None and ctx.current is not None else TensorSource.of(name)

    def _agreeing(self, patch: TensorSource, moved: TensorSource) -> TensorSource:
        assert self.drop_below is not None
        found = {n: cosine(patch[n], moved[n]) for n in patch.distinct if n in moved and patch[n].is_floating_point()}
        dropped = [n for n, value in found.items() if value < self.drop_below]
        self.report |= {"cosines": found, "dropped": dropped}
        left = {n for n in patch if patch.aliases.get(n, n) in dropped}
        return patch.only(n for n in patch if n not in left)

    def _scale(self, patch: TensorSource, new: TensorSource, ctx: Context | None) -> float:
        if self.scale != "auto":
            return float(self.scale)
        if ctx is None:
            raise RecipeError("`scale: auto` of portllm is chosen on validation rows; add `data: {val: FILE}`, or give a number.")
        scale, self.report["tried"] = best(GRID, lambda s: ctx.score(portllm(patch, new, s)))
        return scale


def _over(new: TensorSource, patch: TensorSource) -> TensorSource:
    """The patch with zeros where it says nothing, so that patches of different tensors can be summed."""
    names = [n for n in new if (m := new.meta(n)) is None or m[1].is_floating_point]

    def read(name: str) -> Tensor:
        return patch[name] if name in patch else torch.zeros_like(new[name], dtype=torch.float64)

    tied = {k: v for k, v in new.aliases.items() if patch.aliases.get(k) == v or (k not in patch and v not in patch)}
    return TensorSource(names, read, None, tied)
