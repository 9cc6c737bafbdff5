"""Short runs within a stated time: which learning rate, and whether more rows would help.

Rates (after paper 19, whose early dynamics are shown beside): a few steps each, constant, without warm-up, on the same rows; the
least rate whose held-out loss is within one standard error of the best is taken, and the grid is climbed while its upper end is best.
Rows (after paper 134): nested quarters, halves and all of some rows, the same number of steps each, since small sets in equal epochs are merely
trained less; the held-out loss against log2 n is a line whose slope is what each doubling brings. Test rows are not touched.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.advise.evidence import evidence
from luthier.claims.evidence import finite
from luthier.claims.statistics import Effect, paired
from luthier.core.context import Context
from luthier.core.engine import Engine
from luthier.core.journal import Journal
from luthier.core.rows import Rows, hold_out
from luthier.core.stage import Stage
from luthier.errors import TrainingError

if TYPE_CHECKING:
    from luthier.core.families import Family
    from luthier.recipe import Recipe

GRID, CLIMBS = (0.5, 2.0, 8.0), 2
"""Rates as multiples of the plain recipe's, and how often the grid may grow upwards by a factor of 4."""
HELD_OUT, PARTS = 64, 8
"""Rows that short runs are judged by, in so many groups, whose differences tell the noise."""
FEWEST, LONGEST = 5, 40
"""Steps of a run that compares rates."""
FEWEST_ROWS = 64
HARDLY = 0.02
"""A doubling that takes less than this share off the held-out loss is hardly any help."""
FOR_RATES = 0.5
"""Share of the time; the rest is for the curve."""


@dataclass(frozen=True)
class Short:
    """A short run."""

    lr: float
    rows: int
    steps: int
    losses: list[float] = field(default_factory=list)
    """Held-out loss of every group; empty if it diverged."""
    gradient: float = math.nan
    """Mean norm over its steps, before clipping."""
    training: float = math.nan
    """Mean training loss."""
    seconds: float = 0.0
    """Of its steps."""

    @property
    def loss(self) -> float:
        return float(np.mean(self.losses)) if self.losses else math.inf

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {k: finite(getattr(self, k)) for k in ("loss", "gradient", "training")}


@dataclass
class Probe:
    """What the short runs showed. Without any: nothing."""

    lr: float | None = None
    runner_up: float | None = None
    rates: str = ""
    """The reason for the rate."""
    lines: list[tuple[str, str]] = field(default_factory=list)
    runs: list[Short] = field(default_factory=list)
    curve: list[Short] = field(default_factory=list)
    doubling: Effect | None = None
    """How much each doubling of the rows lowers the held-out loss."""

    @property
    def flat(self) -> bool:
        """Whether more rows were seen to help hardly."""
        return self.doubling is not None and self.doubling.high < HARDLY * self.curve[-1].loss

    def to_dict(self) -> dict[str, Any]:
        return {"lr": self.lr, "said": dict(self.lines), "runs": [r.to_dict() for r in self.runs], "curve": [r.to_dict() for r in self.curve],
                "doubling": asdict(self.doubling) if self.doubling else None}  # fmt: skip


def no_room() -> Probe:
    return Probe(lines=[("short runs", "not measured: there is no room for a copy of the model beside it")])


# -- judging, from numbers alone ------------------------------------------------------------------------------------------------


def chosen(runs: list[Short]) -> tuple[Short | None, Short | None]:
    """The run of the least rate that is within one standard error of the best, and the one it is to be compared with."""
    known = sorted((r for r in runs if r.losses), key=lambda r: r.loss)
    if not known:
        return None, None
    best = known[0]
    near = [r for r in known if r is best or r.loss - best.loss <= _error(r, best)]
    taken = min(near, key=lambda r: r.lr)
    return taken, next((r for r in known if r is not taken), None)


def _error(a: Short, b: Short) -> float:
    """Standard error of the mean difference, group by group."""
    difference = np.subtract(a.losses, b.losses)
    return float(difference.std(ddof=1) / math.sqrt(len(difference))) if len(difference) > 1 else 0.0


def early_dynamics(runs: list[Short]) -> Short | None:
    """Paper 19: the run of low gradient norm and high training loss, by z(norm) - z(loss)."""
    known = [r for r in runs if r.losses]
    if len(known) < 2:
        return None
    norms, losses = (np.array([getattr(r, n) for r in known]) for n in ("gradient", "training"))
    score = sum(sign * (x - x.mean()) / max(float(x.std()), 1e-12) for sign, x in ((1, norms), (-1, losses)))
    return known[int(np.argmin(score))]


def slope(curve: list[Short]) -> Effect:
    """What each doubling of the rows takes off the held-out loss: the least-squares slope against log2 n of every group, and their interval."""
    x = np.log2([c.rows for c in curve])
    x = x - x.mean()
    falls = [-float(x @ column / (x @ x)) for column in np.array([c.losses for c in curve]).T]
    return paired(falls, [0.0] * len(falls))


# -- running -----------------------------------------------------------------------------------------------------------------------


class _Kept(Journal):
    """Keeps a run's numbers instead of writing them."""

    def __init__(self) -> None:
        super().__init__(None)
        self.lines: list[dict[str, Any]] = []

    def write(self, line: dict[str, Any], every: int = 1) -> None:
        self.lines.append(line)


class Bench:
    """Runs a plain recipe for a few steps, each time from a fresh copy of the model."""

    def __init__(self, family: Family, rows: Rows, recipe: Recipe) -> None:
        self.family, self.recipe = family, recipe
        if hasattr(family, "fit_to"):  # a part of the rows may lack a class
            self.family = family.frozen_copy()
            self.family.fit_to(rows, recipe.train.seed)  # type: ignore[attr-defined]
        self.rows, held = hold_out(rows, min(HELD_OUT, max(1, len(rows) // 4)))
        self.parts = [held.take(index) for index in np.array_split(np.arange(len(held)), min(PARTS, len(held)))]
        order = np.random.default_rng(0).permutation(len(self.rows))
        self.rows = self.rows.take(order)

    def run(self, lr: float, rows: int, steps: int) -> Short:
        """A run over the first so many rows, judged by the held-out ones; 0 steps: the model as it is."""
        part = self.rows.take(range(min(rows, len(self.rows))))
        train = {"train.steps": max(1, steps), "train.schedule": "constant", "train.warmup": 0, "train.save_every": 0, "optimize.lr": lr}
        recipe = self.recipe.with_values(train)
        twin = self.family.frozen_copy()
        ctx = Context(twin, 0, {"train": part}, {"stage": self.family, "base": self.family}, train_on=recipe.data.train_on)
        stage = Stage(recipe, Path(), twin, ctx.streams, ctx.models, 0)
        journal = _Kept()
        engine = Engine(stage.plan(twin, part), recipe.train, ctx, None, journal)
        seconds = 0.0
        try:
            if steps:
                seconds = engine.run().seconds
            else:
                engine.prepare()
        except TrainingError:
            return Short(lr, len(part), steps)
        losses = []
        for held in self.parts:
            ctx.streams["val"] = held
            losses.append(engine.validate())
        seen = journal.lines or [{}]
        gradient, training = (float(np.mean([line.get(k, math.nan) for line in seen])) for k in ("grad_norm", "loss"))
        return Short(lr, len(part), steps, losses if all(map(math.isfinite, losses)) else [], gradient, training, seconds)


def probe(family: Family, rows: Rows, recipe: Recipe, minutes: float, tell: Callable[[str], None] = lambda line: None) -> Probe:
    """Both probes within the time. `recipe` is the plain one."""
    found, end = Probe(), time.monotonic() + 60 * minutes
    bench = Bench(family, rows, recipe) if len(rows) >= FEWEST_ROWS else None
    if bench is None or len(bench.parts) < PARTS:
        found.lines = [("short runs", f"not measured: {len(rows)} rows are too few, or too much alike, to hold some out; {FEWEST_ROWS} are needed")]
        return found
    grid = tuple(factor * float(recipe.optimize[0].build().lr) for factor in GRID)
    fixed, step, start = _timed(bench, grid[1])
    time_for_rates = FOR_RATES * (end - time.monotonic())
    steps = _affordable(time_for_rates / (len(grid) + 1), fixed, step, LONGEST)
    if steps < FEWEST:
        found.lines = [("short runs", f"not measured: one step takes {step:.2g} s and a run {fixed:.2g} s besides, so {minutes:g} minutes are too few; give --probe more")]
        return found
    tell(f"Short runs of {steps} steps for the learning rate ...")
    compare_rates(bench, found, grid, steps, start, lambda: time.monotonic() + fixed + steps * step < end - (1 - FOR_RATES) * 60 * minutes)
    if found.lr is None:
        return found
    steps = _affordable((end - time.monotonic()) / 3, fixed, step, len(bench.rows) // recipe.train.batch)
    tell("Short runs on a quarter, half and all of some rows ...")
    if steps * recipe.train.batch < FEWEST_ROWS:
        found.lines.append(("more rows", "not measured: the time left was too short; give --probe more minutes"))
    else:
        compare_sizes(bench, found, steps, start)
    return found


def _timed(bench: Bench, lr: float) -> tuple[float, float, Short]:
    """Seconds of a run besides its steps, seconds of a step, and how the untuned model is judged."""
    bench.run(lr, len(bench.rows), 1)  # the first run loads what later ones find loaded
    began = time.monotonic()
    start = bench.run(lr, len(bench.rows), 0)
    return time.monotonic() - began, bench.run(lr, len(bench.rows), 2).seconds / 2, start


def _affordable(seconds: float, fixed: float, step: float, most: int) -> int:
    return int(min(most, max(0.0, seconds - fixed) / max(step, 1e-6)))


def compare_rates(bench: Bench, found: Probe, grid: tuple[float, ...], steps: int, start: Short, may_climb: Callable[[], bool] = lambda: True) -> None:
    """Runs at the rates of the grid, and at higher ones while the highest is the best."""
    runs = [bench.run(lr, len(bench.rows), steps) for lr in grid]
    for _ in range(CLIMBS):
        if min(runs, key=lambda r: r.loss) is not runs[-1] or not runs[-1].losses or not may_climb():
            break
        runs.append(bench.run(4 * runs[-1].lr, len(bench.rows), steps))
    found.runs = runs
    told = "; ".join(f"{r.lr:g}: " + (f"{r.loss:.3f} (gradient norm {r.gradient:.2g})" if r.losses else "diverged") for r in runs)
    taken, other = chosen(runs)
    if taken is None or taken.loss >= start.loss:
        found.lines.append(("learning rate", f"not measured: after {steps} steps no rate lowered the held-out loss of {start.loss:.3f} ({told})"))
        return
    found.lr, found.runner_up = taken.lr, None if other is None else other.lr
    said = f"{taken.lr:g} is the least within a standard error of the best after {steps} steps (held-out loss, untuned {start.loss:.3f}; {told})"
    found.rates = f"learning rate {said}"
    found.lines.append(("learning rate", said))
    early = early_dynamics(runs)
    if early is not None:
        found.lines.append(("early dynamics", f"low gradient norm and high training loss, as paper 19 prefers, would take {early.lr:g}; {evidence('secret-recipe-sft').said}"))


def compare_sizes(bench: Bench, found: Probe, steps: int, start: Short) -> None:
    """Runs of the same length on nested parts of the rows."""
    assert found.lr is not None
    most = min(len(bench.rows), steps * bench.recipe.train.batch)
    found.curve = [bench.run(found.lr, n, steps) for n in (most // 4, most // 2, most)]
    if not all(c.losses for c in found.curve) or found.curve[-1].loss >= start.loss:
        found.lines.append(("more rows", "not measured: the runs did not lower the held-out loss"))
        return
    found.doubling = effect = slope(found.curve)
    told = ", ".join(f"{c.rows} rows {c.loss:.3f}" for c in found.curve)
    amount = f"{effect.mean:.3f} a doubling ({effect.low:.3f} to {effect.high:.3f} over groups of held-out rows; {steps} steps each: {told})"
    if found.flat:
        said = f"more rows hardly help: they lower the held-out loss by {amount}"
    elif effect.low > 0:
        all_rows = found.curve[-1].loss - effect.mean * math.log2(len(bench.rows) / most)
        line = f"the line through them puts all {len(bench.rows):,} at {all_rows:.3f} and twice as many at {all_rows - effect.mean:.3f}"
        said = f"more rows lower the held-out loss by {amount}; {line}"
    else:
        said = f"whether more rows help cannot be told from runs so short: the held-out loss falls by {amount}"
    found.lines.append(("more rows", said))
