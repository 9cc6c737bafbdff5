"""On Giant's Shoulders: Effortless Weak to Strong by Dynamic Logits Fusion (paper 48)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from luthier.catalog import register
from luthier.core.scores import TokenScores, log_prob
from luthier.decode import Decoder
from luthier.decode._shared import (
    Answer,
    Decode,
    LockStep,
    Wrapped,
    left_mask,
    main_model,
    other_model,
    same_vocabulary,
)
from luthier.errors import RecipeError

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import CausalLM, Family

GRID = tuple(i / 10 for i in range(21))
LOWEST = -1e9
"""What the logit of a token that only an expert rules out is lowered by."""
Rule = Literal["one", "grid", "descent"]


def logits_fusion(
    large: Tensor, small: Tensor, experts: SequenceOf[Tensor], alpha: float | None = None, grid: SequenceOf[float] = GRID, rule: Rule = "one"
) -> tuple[Tensor, Tensor]:
    """(fused logits [rows, V], alpha [rows, experts]) from raw logits of the large model, the small base and its fine-tuned experts.

    P~ = softmax(l_L + sum_t alpha_t (l_t - l_0)). alpha minimises, on the grid,
        sum_t [KL(P~ || P) - KL(Q_t || Q_0)]^2 + [KL(P || P~) - KL(Q_0 || Q_t)]^2,
    so that the large model moves as far as the small one did. Several experts: at most one alpha is not 0 (`one`), the full grid, or
    coordinate `descent` from there. Equal values: the alpha nearest to 1. A number for `alpha` fixes it (1 is proxy tuning). fp32, the
    divergences in fp64. A token that the large model masks (-inf) stays masked, one that the small base masks gets no shift, one that only
    an expert masks is ruled out with it; the search looks at the tokens that all models allow."""
    base, origin = large.float(), small.float()
    stacked = torch.stack([e.float() for e in experts], 1)
    known = torch.isfinite(origin)[:, None]
    shifts = torch.where(known, stacked.clamp(min=LOWEST) - origin.masked_fill(~known[:, 0], 0.0)[:, None], torch.zeros_like(stacked))
    if alpha is not None:
        chosen = torch.full(shifts.shape[:2], float(alpha), device=base.device)
    else:
        allowed = torch.isfinite(base) & known[:, 0] & torch.isfinite(stacked).all(1)
        allowed |= ~allowed.any(-1, keepdim=True)  # nothing in common: no search can help, and no NaN either
        chosen = _search(base, origin, stacked, allowed, tuple(grid), rule)
    return base + (chosen[..., None] * shifts).sum(1), chosen


def _search(base: Tensor, origin: Tensor, experts: Tensor, allowed: Tensor, grid: tuple[float, ...], rule: Rule) -> Tensor:
    def logs(x: Tensor, mask: Tensor) -> Tensor:
        return torch.log_softmax(x.double().nan_to_num(0.0, 0.0, LOWEST).masked_fill(~mask, LOWEST), -1)

    logp, q0, qt = logs(base, allowed), logs(origin, allowed), logs(experts, allowed[:, None])
    moved, back = _kl(qt, q0[:, None]), _kl(q0[:, None], qt)
    # log Q_t - log Q_0 is the shift but for a constant; without its mean under P the divergences lose no digits
    shifts = (qt - q0[:, None]).masked_fill(~allowed[:, None], 0.0)
    shifts = shifts - (logp.exp()[:, None] * shifts).sum(-1, keepdim=True)

    def miss(candidates: Tensor) -> Tensor:
        """[rows, candidates] objective; `candidates` [rows, candidates, experts]."""
        values = []
        for one in candidates.unbind(1):
            fused = torch.log_softmax(logp + (one[..., None] * shifts).sum(1), -1)
            ahead, behind = _kl(fused, logp)[:, None], _kl(logp, fused)[:, None]
            values.append(((ahead - moved) ** 2 + (behind - back) ** 2).sum(-1))
        return torch.stack(values, 1)

    rows, number = experts.shape[:2]
    steps = torch.tensor(grid, device=base.device, dtype=torch.float64)
    if rule == "grid" and number > 1:
        table = torch.tensor(list(itertools.product(grid, repeat=number)), device=base.device, dtype=torch.float64)
        return _best(table.expand(rows, -1, -1), miss).float()
    table = torch.cat([torch.eye(number, device=base.device, dtype=torch.float64)[t] * steps[:, None] for t in range(number)])
    found = _best(table.expand(rows, -1, -1), miss)
    for _ in range(3 if rule == "descent" and number > 1 else 0):
        for t in range(number):
            candidates = found[:, None].repeat(1, len(grid), 1)
            candidates[..., t] = steps
            found = _best(candidates, miss)
    return found.float()


def _kl(a: Tensor, b: Tensor) -> Tensor:
    """KL of two log-distributions over the last dimension."""
    return (a.exp() * (a - b)).sum(-1)


def _best(candidates: Tensor, miss: Callable[[Tensor], Tensor]) -> Tensor:
    """The candidate of least objective; among equal ones (up to rounding) that whose alphas sum nearest to 1."""
    values = miss(candidates)
    least = values.min(1, keepdim=True).values
    tied = values <= least * (1 + 1e-9) + 1e-14
    distance = (candidates.sum(-1) - 1).abs().masked_fill(~tied, torch.inf)
    return candidates.gather(1, distance.argmin(1)[:, None, None].expand(-1, 1, candidates.shape[-1]))[:, 0]


class FusedScores(TokenScores):
    """Scores under the fused distribution: every chunk's logits are fused before a function sees them."""

    def __init__(self, main: TokenScores, companions: SequenceOf[TokenScores], fuse: Callable[..., Tensor]) -> None:
        super().__init__(main.hidden, main.head, main.target, main.sequence, main.sequences, main.chunk)
        self.companions, self.fuse = list(companions), fuse

    def map(self, function: Callable[..., Any], *others: TokenScores) -> Any:
        number = len(self.companions)

        def fused(logits: Tensor, at: slice, *rest: Tensor) -> Any:
            return function(self.fuse(logits, *rest[:number]), at, *rest[number:])

        return super().map(fused, *self.companions, *others)

    @property
    def logp(self) -> Tensor:
        if self._logp is None:
            self._logp = self.map(lambda logits, at: log_prob(logits, self.target[at]))
        return self._logp

    def detach(self) -> FusedScores:
        return FusedScores(super().detach(), [c.detach() for c in self.companions], self.fuse)


class Fused(Wrapped):
    """The large model, steered by the small ones at every token."""

    def __init__(self, family: CausalLM, companions: SequenceOf[CausalLM], method: LogitsFusion) -> None:
        super().__init__(family, companions)
        self.method = method

    def _fuse(self, large: Tensor, small: Tensor, *experts: Tensor) -> tuple[Tensor, Tensor]:
        m = self.method
        return logits_fusion(large, small, experts, None if m.alpha == "dynamic" else float(m.alpha), tuple(m.grid), m.rule)

    def _generate(self, prompts: list[Any], decode: Decode, n: int) -> list[list[Answer]]:
        """Every answer's `info["alpha"]` holds its tokens' weights, one a token and expert."""
        step = LockStep(self.companions, left_mask(prompts))
        weights: list[Tensor] = []

        def fuse(ids: Tensor, scores: Tensor) -> Tensor:
            fused, alpha = self._fuse(scores, *step.next_logits(ids))
            weights.append(alpha.cpu())
            return fused

        answers = super()._generate(prompts, replace(decode, processors=[fuse, *decode.processors]), n)
        table = torch.stack(weights, 1).numpy() if weights else np.zeros((len(prompts) * n, 0, len(self.companions) - 1))
        for row, answer in enumerate(answer for group in answers for answer in (group if decode.temperature > 0 else group[:1])):
            answer.info["alpha"] = table[row, : len(answer.ids)]
        return answers

    def score(self, batch: Any) -> TokenScores:
        with self.evaluating():
            companions = [c.score(batch) for c in self.companions]
        return FusedScores(super().score(batch), companions, lambda *logits: self._fuse(*logits)[0])


@register("logits-fusion", paper=48)
@dataclass
class LogitsFusion(Decoder):
    """Steer a large untuned model by what small experts learned: add their logit shift, weighed anew at every token.

    The recipe's `models:` name the small base and its fine-tuned experts; the wrapped model is the large one. The weight makes the large model's
    distribution move as far, in both KL directions, as the small one's did (`logits_fusion`); 21 values on [0, 2] are tried at each step. The several-expert objective
    (a plain sum, at most one expert active) is from memory of the paper, which calls it a centroid. `alpha: 1` is proxy tuning. All models share
    one tokenizer and read the same tokens, each with its own cache; raw logits are fused before temperature or nucleus. Nothing is trained."""

    small: str = "small"
    """The small base, by its name under `models:`."""
    experts: list[str] = field(default_factory=lambda: ["expert"])
    """Its fine-tuned versions, by their names."""
    alpha: float | Literal["dynamic"] = "dynamic"
    """`dynamic`, or one fixed weight."""
    grid: list[float] = field(default_factory=lambda: list(GRID))
    """Weights that are tried."""
    rule: Literal["one", "grid", "descent"] = "one"
    """Several experts: one at a time, every combination, or coordinate descent."""

    families = frozenset({"causal-lm"})
    toy_models: ClassVar[tuple[str, ...]] = ("small", "expert")

    def __post_init__(self) -> None:
        if isinstance(self.alpha, str) and self.alpha != "dynamic":
            raise RecipeError(f"logits-fusion.alpha is 'dynamic' or a number, not {self.alpha!r}.")
        if not self.experts or not self.grid:
            raise RecipeError("logits-fusion needs at least one expert and one weight in `grid`.")
        if self.rule == "grid" and len(self.grid) ** len(self.experts) > 2000:
            raise RecipeError(f"logits-fusion.rule grid would try {len(self.grid) ** len(self.experts)} weights a token; use 'one' or 'descent'.")

    def wrap(self, models: Mapping[str, Family] | Family, ctx: Context | None = None) -> Family:
        main = main_model(models, "logits-fusion")
        given: Any = models.get("experts") if isinstance(models, Mapping) else None
        others = {self.small: other_model(models, self.small, ctx, "logits-fusion")}
        if given is not None:
            others |= {f"experts[{i}]": expert for i, expert in enumerate(given)}
        else:
            others |= {name: other_model(models, name, ctx, "logits-fusion") for name in self.experts}
        same_vocabulary(main, others, "logits-fusion")
        return Fused(main, list(others.values()), self)
