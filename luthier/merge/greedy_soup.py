"""The greedy soup: add models to the average one by one, best first, as long as the validation score rises."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from luthier.catalog import register
from luthier.core.source import TensorSource
from luthier.errors import RecipeError
from luthier.merge import Merger
from luthier.merge._shared import Score, average, ingredients

if TYPE_CHECKING:
    from luthier.core.context import Context


@dataclass
class Soup:
    """A greedy soup: the averaged weights, and how it came to be."""

    weights: TensorSource
    chosen: list[int]
    """Which models, in the order in which they were added."""
    score: float
    """The soup's validation score."""
    history: list[dict[str, Any]]
    """Every candidate: the model, the score with it, whether it was added."""


def greedy_soup(
    states: Any, score: Score, strict: bool = True, scores: SequenceOf[float] | None = None, skip: SequenceOf[str] = (), base: Any = None
) -> Soup:  # fmt: skip
    """Sort the models by `score` (higher is better), start from the best, add each next one if the average with it scores better
    (`strict`) or at least as well. `scores` are the single models' scores, if known. Equal models keep their order."""
    sources, home = ingredients(base, states)
    single = [float(s) for s in (map(score, sources) if scores is None else scores)]
    if len(single) != len(sources):
        raise RecipeError(f"{len(single)} scores were given for {len(sources)} models.")
    order = sorted(range(len(sources)), key=lambda i: -single[i])
    chosen, top = [order[0]], single[order[0]]
    history: list[dict[str, Any]] = [{"model": order[0], "score": top, "added": True}]
    for i in order[1:]:
        # The mean of the chosen, taken anew each time: a running mean would drift.
        value = float(score(average([sources[j] for j in (*chosen, i)], skip=skip, home=home)))
        added = value > top if strict else value >= top
        history.append({"model": i, "score": value, "added": added})
        if added:
            chosen.append(i)
            top = value
    return Soup(average([sources[j] for j in chosen], skip=skip, home=home), chosen, top, history)


@register("greedy-soup", paper=62)
@dataclass
class GreedySoup(Merger):
    """Average only those fine-tunes that help: best first, each is added if the average with it scores better on validation rows.

    Sort by validation score; S = {best}; for the others in turn, candidate = mean of S and the model, kept if its score exceeds the
    soup's. Never worse on validation than the best single model. The released code asks for strictly more, the paper's pseudo-code
    for at least as much (`strict: false`). One validation pass per model and per candidate. The rows must not have been trained on.
    The soup is the plain mean of its members at every step, so nothing drifts. Without validation rows use uniform-soup."""

    strict: bool = True
    """Whether a model must improve the score (released code), or only not harm it (the paper's pseudo-code)."""
    include_base: bool = False
    """Whether the base is a candidate."""
    skip: list[str] = field(default_factory=list)
    """Tensors to leave as the base (or, without one, the first model) has them: names, leading parts of names, or globs."""

    needs = frozenset({"val"})

    by_rows = True

    def __post_init__(self) -> None:
        self.report: dict[str, Any] = {}

    def merge(self, base: Any, tuned: SequenceOf[Any], ctx: Context | None = None) -> TensorSource:
        if ctx is None:
            raise RecipeError("The greedy soup scores candidates on validation rows; add `data: {val: FILE}` or use uniform-soup.")
        states, home = ingredients(base, tuned, self.include_base)
        soup = greedy_soup(states, ctx.score, self.strict, skip=self.skip, base=home)
        self.report = {"chosen": soup.chosen, "score": soup.score, "history": soup.history}
        return soup.weights
