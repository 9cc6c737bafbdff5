"""LiNeS: scale what training (or merging) changed by a factor that grows with depth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from luthier.catalog import method, register
from luthier.core.modelmap import depth
from luthier.core.source import TensorSource, applied
from luthier.errors import RecipeError
from luthier.merge import Merger
from luthier.merge._shared import VectorMerger, best, deltas, models, summed, update_of

if TYPE_CHECKING:
    from luthier.core.context import Context

Schedule = Literal["linear", "quadratic", "sqrt"]
_SHAPES: dict[str, Callable[[float], float]] = {"linear": lambda t: t, "quadratic": lambda t: t * t, "sqrt": lambda t: t**0.5}
SINGLE_GRID = tuple(round(1 - i / 10, 1) for i in range(11))
MERGE_GRID = tuple(round((i + 1) / 10, 1) for i in range(10))


def lines(
    update: Mapping[str, Tensor], alpha: float, beta: float, schedule: Schedule = "linear", names: Iterable[str] | None = None
) -> TensorSource:  # fmt: skip
    """Every tensor of an update times (alpha + beta * l / (L - 1)) for its block l of L, and times alpha outside the blocks; lazily.

    `names` are all tensors of the model, where the update holds only some of them: they say which block is the last."""
    update = TensorSource.of(update)
    scales = depth_scales(update if names is None else names, alpha, beta, schedule)
    scaled = update.map_named(lambda name, t: t * scales[name] if t.is_floating_point() else t)
    return TensorSource(update, scaled.__getitem__, update.meta, update.aliases)


def depth_scales(names: Iterable[str], alpha: float, beta: float, schedule: Schedule = "linear") -> dict[str, float]:
    """The factor of every tensor. In a tower of one block that block is the deepest."""
    factors = {}
    for name, place in depth(names).items():
        if place is None:
            factors[name] = alpha
        else:
            index, number = place
            factors[name] = alpha + beta * _SHAPES[schedule](index / (number - 1) if number > 1 else 1.0)
    return factors


def norm_alpha(updates: SequenceOf[TensorSource], merged: TensorSource) -> float:
    """(||sum_t tau_t||_1 / ||tau_merged||_1) / T: gives the shallow part the size it has in the plain average."""
    total = summed(updates)
    whole = sum(float(total[n].abs().double().sum()) for n in total.distinct)
    size = sum(float(merged[n].abs().double().sum()) for n in merged.distinct)
    return whole / size / len(updates) if size > 0 else 1.0 / len(updates)


@register("lines", paper=135)
@dataclass
class Lines(VectorMerger):
    """After training or merging, shrink what changed in shallow layers and keep it in deep ones: shallow changes cause the forgetting and help the task little.

    lambda_l = alpha + beta * l / (L - 1); theta = theta_0 + sum_l lambda_l tau_l for the blocks l = 0..L-1, and alpha for what lies
    outside them (embeddings, final norm, projections). tau is the update that the merger `after` makes of the tuned models, so any
    merger can be wrapped, and a nonlinear one is scaled after it, as it must be. beta = 0 scales evenly (WiSE-FT); alpha 1, beta 0
    changes nothing. It commutes with sums of updates.

    One tuned model: beta = 1 - alpha, and alpha is chosen on validation rows over 1.0, 0.9 ... 0 by `target_weight` * target + control,
    where a helper `control` (a function of a checkpoint that returns a score) measures what must not be forgotten; each score is taken
    relative to the tuned model's and the base's. Without the helper the validation score alone decides; without validation rows
    alpha is 0.1, as in the released example. Several models: alpha = (||sum tau_t|| / ||tau_merged||) / T in L1 norm as released
    (1 / T for task arithmetic), and beta is chosen on validation rows over `grid`; without them it is 0.4, the strength usual for
    task arithmetic that cannot be tuned. Blocks are found by the names of their stacks, never by the first number in a name; two
    towers count for themselves. Equal scores: the first of the grid, as released."""

    alpha: float | Literal["auto"] = "auto"
    """The factor of the shallowest block and of all that lies outside the blocks."""
    beta: float | Literal["auto"] = "auto"
    """How much larger the deepest block's factor is."""
    after: str | dict[str, Any] = "task-arithmetic"
    """The merger whose update is scaled: a name, or a mapping with `method` and its options."""
    schedule: Literal["linear", "quadratic", "sqrt"] = "linear"
    """How the factor grows with depth."""
    grid: list[float] | None = None
    """Values tried for alpha (one model; default 1.0 ... 0.0) or beta (several; default 0.1 ... 1.0, for ties 0.1 ... 1.5 is usual)."""
    target_weight: float = 2.0
    """Weight of the target's score against the control's when alpha is chosen."""
    skip: list[str] = field(default_factory=list)
    """Tensors to leave as the base has them: names, leading parts of names, or globs. Task heads belong here."""

    by_rows = property(lambda self: self.merger().by_rows)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            if isinstance(value, str) and value != "auto":
                raise RecipeError(f"`{name}` of lines is '{value}'; give a number or 'auto'.")
        if isinstance(self.after, Mapping) and "method" not in self.after:
            raise RecipeError("`after` of lines needs the key `method`, e.g. `after: {method: ties, density: 0.2}`.")
        self.report: dict[str, Any] = {}

    def merger(self) -> Merger:
        """The wrapped merger. What lines leaves out, it leaves out too."""
        options: dict[str, Any] = {"method": self.after} if isinstance(self.after, str) else dict(self.after)
        cls = method("merge", options.pop("method"))
        if self.skip and "skip" in getattr(cls, "__dataclass_fields__", {}):
            options["skip"] = [*options.get("skip", []), *self.skip]
        return cls(**options)

    def update(self, base: Any, tuned: SequenceOf[Any], ctx: Context | None = None) -> TensorSource:
        base, listed = TensorSource.of(base), models(tuned)
        merged = update_of(self.merger(), base, listed, ctx)
        one = len(listed) == 1
        alpha, beta = self._one(base, listed[0], merged, ctx) if one else self._several(base, listed, merged, ctx)
        self.report |= {"alpha": alpha, "beta": beta}
        return lines(merged, alpha, beta, self.schedule, base)

    def _one(self, base: TensorSource, tuned: Any, merged: TensorSource, ctx: Context | None) -> tuple[float, float]:
        if self.alpha != "auto":
            return float(self.alpha), 1 - float(self.alpha) if self.beta == "auto" else float(self.beta)
        if self.beta != "auto":
            return 1 - float(self.beta), float(self.beta)
        if ctx is None or ctx.evaluator is None:
            _say(ctx, "lines has no validation rows to choose alpha with and takes 0.1; set `alpha`, or add `data: {val: FILE}`.")
            return 0.1, 0.9
        value = self._tradeoff(base, TensorSource.of(tuned, base), ctx)
        alpha, tried = best(self.grid or SINGLE_GRID, lambda a: value(applied(base, lines(merged, a, 1 - a, self.schedule, base))))
        self.report["tried"] = tried
        return alpha, 1 - alpha

    def _tradeoff(self, base: TensorSource, tuned: TensorSource, ctx: Context) -> Callable[[TensorSource], float]:
        """Validation score, weighed against the helper `control` where there is one."""
        if not ctx.has_helper("control"):
            return ctx.score
        control = ctx.helper("control")
        target_0, control_0 = ctx.score(tuned), float(control(base))

        def value(candidate: TensorSource) -> float:
            t, c = ctx.score(candidate), float(control(candidate))
            if target_0 > 0 and control_0 > 0:
                return self.target_weight * t / target_0 + c / control_0
            # Scores that may be negative (log-likelihoods) have no meaningful ratio.
            return self.target_weight * (t - target_0) + (c - control_0)

        return value

    def _several(self, base: TensorSource, tuned: list[Any], merged: TensorSource, ctx: Context | None) -> tuple[float, float]:
        alpha = norm_alpha(deltas(base, tuned, self.skip), merged) if self.alpha == "auto" else float(self.alpha)
        if self.beta != "auto":
            return alpha, float(self.beta)
        if ctx is None or ctx.evaluator is None:
            _say(ctx, "lines has no validation rows to choose beta with and takes 0.4; set `beta`, or add `data: {val: FILE}`.")
            return alpha, 0.4
        beta, tried = best(self.grid or MERGE_GRID, lambda b: ctx.score(applied(base, lines(merged, alpha, b, self.schedule, base))))
        self.report["tried"] = tried
        return alpha, beta


def _say(ctx: Context | None, sentence: str) -> None:
    if ctx is not None:
        ctx.notice(sentence)
