"""What the numbers of a comparison say: paired differences from the reference, which arms nothing beats, and that in words."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from luthier.claims.evidence import finite
from luthier.claims.statistics import paired
from luthier.report import LABELS, SHARES

Records = Mapping[str, Mapping[int, dict[str, Any]]]
"""Arm -> seed -> what a run came to (see work.record)."""
Outcome = Literal["better", "worse", "unclear", "same", "constant", "too few seeds", "not measured"]
Change = Literal["after", "lost", "risen"]
"""A number as it is after the tune, or what it fell or rose by."""

QUALITY = ("task/exact_match", "task/accuracy", "task/score", "task/recall_at_1", "task/pair_accuracy", "task/nll")
FORGOTTEN: tuple[tuple[str, Change], ...] = (("forgetting/general_score", "lost"), ("forgetting/general_nll", "risen"), ("forgetting/kl_to_base", "after"))
"""What stands for forgetting: the first that was measured, as what was lost since before the tune."""
WORDS = {"share": (100.0, ".1f", "%", "points"), "seconds": (1.0, ".1f", "s", "s"), "bytes": (2.0**-20, ".0f", "MiB", "MiB"), "": (1.0, ".3g", "", "")}
"""How a number is written: its factor and digits, its unit, the unit of a difference."""
FEWEST = 3
"""Seeds that it takes to call a difference one, as in claims."""
EXACT = 1e-9
"""Differences that vary by less, beside the values themselves, are one and the same."""


@dataclass(frozen=True)
class Number:
    """One thing that arms are judged by."""

    key: str
    """quality, forgetting, calibration, time or memory."""
    name: str
    """Where it stands in a run: task/exact_match, or a part of the cost."""
    label: str
    better: str
    unit: Literal["share", "seconds", "bytes", ""] = ""
    change: Change = "after"

    def of(self, run: Mapping[str, Any] | None) -> float | None:
        """Its value in a run; None where the run failed or did not measure it."""
        if run is None or run.get("error"):
            return None
        if self.key in ("time", "memory"):
            return finite(run["cost"].get(self.name))
        before, after = (finite(run["numbers"].get(when, {}).get(self.name)) for when in ("before", "after"))
        if self.change == "after" or after is None:
            return after
        return None if before is None else before - after if self.change == "lost" else after - before

    def show(self, value: float | None) -> str:
        """The value as a reader wants it; a dash where there is none."""
        return "-" if value is None else f"{self._bare(value)} {WORDS[self.unit][2]}".rstrip()

    def gap(self, value: float | None) -> str:
        """A difference of two values: with its sign, and shares in points, since a per cent of a per cent is something else."""
        return "-" if value is None else f"{self._bare(value, '+')} {WORDS[self.unit][3]}".rstrip()

    def span(self, low: float, high: float) -> str:
        """The two ends of an interval of differences."""
        return f"{self._bare(low, '+')} to {self._bare(high, '+')}"

    def _bare(self, value: float, sign: str = "") -> str:
        factor, digits, *_ = WORDS[self.unit]
        return f"{factor * value + 0.0:{sign}{digits}}"


@dataclass(frozen=True)
class Difference:
    """An arm beside the reference in one number: arm minus reference, over the seeds that both ended."""

    arm: str
    key: str
    outcome: Outcome
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    each: tuple[float, ...] = ()
    """Seed by seed."""
    seeds: tuple[int, ...] = ()

    @property
    def smallest(self) -> float | None:
        """Half of the interval: a smaller mean difference could not have been told from chance with these seeds."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


# -- the numbers -------------------------------------------------------------------------------------------------------------


def numbers_of(records: Records) -> list[Number]:
    """What these runs can be judged by. What nobody measured stays in the list, so that it is shown as missing."""
    runs = [r for by_seed in records.values() for r in by_seed.values() if not r.get("error")]
    directions = {k: v for r in runs for k, v in r["better"].items()}
    others = [name for name in directions if not name.startswith(("forgetting/", "calibration/"))]

    def known(number: Number) -> int:
        return sum(number.of(r) is not None for r in runs)

    quality = [_quality(name, directions) for name in dict.fromkeys([*QUALITY, *others])]
    forgetting = [_forgotten(name, how) for name, how in FORGOTTEN]
    return [
        max(quality, key=known), max(forgetting, key=known), Number("calibration", "calibration/ece", LABELS["calibration/ece"], "lower", "share"),
        Number("time", "train_seconds", "training time", "lower", "seconds"), Number("memory", "peak_memory", "peak memory", "lower", "bytes"),
    ]  # fmt: skip


def _quality(name: str, directions: Mapping[str, str]) -> Number:
    share = name.endswith(SHARES)
    return Number("quality", name, LABELS.get(name, name.replace("_", " ")), directions.get(name, "lower" if name.endswith("nll") else "higher"), "share" if share else "")


def _forgotten(name: str, how: Change) -> Number:
    label = {"lost": "general questions lost", "risen": "rise of the loss a token (general rows)"}.get(how, LABELS.get(name, name))
    return Number("forgetting", name, label, "lower", "share" if how == "lost" else "", how)


def mean_of(number: Number, runs: Mapping[int, dict[str, Any]]) -> tuple[float | None, float | None, float | None]:
    """An arm's mean over its seeds, with the 95 % interval where there are two seeds or more and they differ."""
    values = [v for r in runs.values() if (v := number.of(r)) is not None]
    if len(values) < 2 or _alike(values):
        return (values[0] if values else None), None, None
    found = paired(values, [0.0] * len(values))
    return found.mean, found.low, found.high


# -- differences ---------------------------------------------------------------------------------------------------------------


def difference(number: Number, name: str, arm: Mapping[int, dict[str, Any]], reference: Mapping[int, dict[str, Any]], comparisons: int) -> Difference:
    """The paired difference; its interval holds at 95 % together with those of all `comparisons` arms (Bonferroni)."""
    values = {s: (a, b) for s in arm if (a := number.of(arm[s])) is not None and (b := number.of(reference.get(s))) is not None}
    if not values:
        return Difference(name, number.key, "not measured")
    pairs, seeds = list(values.values()), tuple(values)
    each = tuple(a - b for a, b in pairs)
    mean = math.fsum(each) / len(each)
    size = max(abs(v) for pair in pairs for v in pair)
    if len(each) < 2:
        return Difference(name, number.key, "too few seeds", mean, each=each, seeds=seeds)
    if _alike(each, size):
        return Difference(name, number.key, "same" if abs(mean) <= EXACT * size else "constant", mean, each=each, seeds=seeds)
    effect = paired([a for a, _ in pairs], [b for _, b in pairs], confidence=1 - 0.05 / comparisons)
    outcome: Outcome = "unclear" if len(each) >= FEWEST else "too few seeds"
    if outcome == "unclear" and (effect.low > 0 or effect.high < 0):
        outcome = "better" if (effect.low > 0) == (number.better == "higher") else "worse"
    return Difference(name, number.key, outcome, effect.mean, effect.low, effect.high, each, seeds)


def _alike(values: Sequence[float], size: float | None = None) -> bool:
    """Whether values have no spread, so that none can be estimated from them. `size`: how large the numbers are that they were made of."""
    return max(values) - min(values) <= EXACT * (max(map(abs, values)) if size is None else size)


def differences(numbers: Sequence[Number], records: Records, reference: str) -> list[Difference]:
    """Every arm beside the reference in every number."""
    others = [name for name in records if name != reference]
    return [difference(n, name, records[name], records[reference], len(others)) for name in others for n in numbers]


# -- what nothing beats ----------------------------------------------------------------------------------------------------------


def beaten(numbers: Sequence[Number], records: Records) -> dict[str, list[str]]:
    """For every arm that ended, those that are at least as good in all that both measured and better in something. By means: chance is not asked."""
    means = {name: {n.key: mean_of(n, runs)[0] for n in numbers} for name, runs in records.items()}
    found: dict[str, list[str]] = {name: [] for name, values in means.items() if any(v is not None for v in values.values())}
    for a, b in itertools.permutations(found, 2):
        gains = [_gain(n, means[b][n.key], means[a][n.key]) for n in numbers]
        shared = [g for g in gains if g is not None]
        if shared and min(shared) >= 0 and max(shared) > 0:
            found[a].append(b)
    return found


def _gain(number: Number, of: float | None, over: float | None) -> float | None:
    if of is None or over is None:
        return None
    return of - over if number.better == "higher" else over - of


# -- in words ----------------------------------------------------------------------------------------------------------------------


def verdict(numbers: Sequence[Number], found: Sequence[Difference], records: Records, reference: str, seeds: Sequence[int]) -> list[str]:
    """What came of it, the main number first."""
    main, others = numbers[0], [d for d in found if d.key == numbers[0].key]
    if not any(number.of(r) is not None for number in numbers[:3] for runs in records.values() for r in runs.values()):
        return ["Nothing was measured: no run ended, or the recipes have no measures, or there are no test rows."]
    said = [_main(main, d, reference) for d in others if d.outcome in ("better", "worse", "constant")]
    if len(seeds) < FEWEST:
        few = "One seed shows nothing" if len(seeds) == 1 else "Two seeds show next to nothing"
        said = [f"{few}: every difference below may be chance. Give --seeds 3 or more."]
    elif not said:
        said = [_nothing(main, others, len(seeds))]
    elif hidden := [d for d in others if d.outcome == "unclear"]:
        said.append(_unclear(main, hidden, "For the others no difference"))
    for d in others if len(seeds) >= FEWEST else []:
        if d.outcome in ("not measured", "too few seeds"):
            said.append(f"{d.arm} cannot be compared with {reference}: {main.label} is known of both for {len(d.each)} of {len(seeds)} seeds only.")
    return [*said, *_beside(numbers[1:], found, reference), *_family(len(others), reference, len(seeds)), *_front(beaten(numbers, records))]


def _main(number: Number, d: Difference, reference: str) -> str:
    if d.outcome == "constant":
        by = f"{d.arm} differs from {reference} by {number.gap(d.mean)} in {number.label}"
        return f"{by}, with every seed alike; without spread there is no interval, and chance cannot be judged."
    return f"{d.arm} is {d.outcome} than {reference}: {number.label} {interval(number, d)}, {len(d.each)} seeds."


def interval(number: Number, d: Difference) -> str:
    """The mean difference with its interval, or why there is none."""
    if d.mean is None:
        return "-"
    if d.low is None or d.high is None:
        return "the same" if d.outcome == "same" else number.gap(d.mean)
    return f"{number.gap(d.mean)} ({number.span(d.low, d.high)})"


def _nothing(number: Number, found: Sequence[Difference], seeds: int) -> str:
    same = [d.arm for d in found if d.outcome == "same"]
    if same and len(same) == len(found):
        return f"No difference: {number.label} is the same in every one of {seeds} seeds."
    hidden = [d for d in found if d.outcome == "unclear"]
    return _unclear(number, hidden, "No difference") if hidden else f"No difference can be told: {number.label} is not known for enough seeds of both arms."


def _unclear(number: Number, found: Sequence[Difference], start: str) -> str:
    least = sorted(d.smallest for d in found if d.smallest is not None)
    span = shortest(number, least[0]) if len(least) == 1 else f"{shortest(number, least[0])} to {shortest(number, least[-1])}, by arm,"
    counts = sorted({len(d.each) for d in found})
    seeds = f"{counts[0]} seeds" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
    return f"{start} can be told apart from chance with {seeds}; the smallest that could have shown is {span} in {number.label}. A smaller one may still be there."


def shortest(number: Number, value: float | None) -> str:
    """The smallest difference that could have shown, which has no sign."""
    return number.gap(value).removeprefix("+")


def _beside(numbers: Sequence[Number], found: Sequence[Difference], reference: str) -> list[str]:
    """A sentence an arm on what else was told apart."""
    said = []
    for arm in dict.fromkeys(d.arm for d in found):
        parts = [f"{d.outcome} in {n.label} ({n.gap(d.mean)})" for n in numbers for d in found if d.arm == arm and d.key == n.key and d.outcome in ("better", "worse")]
        if parts:
            said.append(f"Besides, {arm} is {', '.join(parts)} than {reference}.")
    return said


def _family(comparisons: int, reference: str, seeds: int) -> list[str]:
    if comparisons < 2 or seeds < FEWEST:
        return []
    drawn = f"each interval is drawn at {100 * (1 - 0.05 / comparisons):.1f} %"
    return [f"{comparisons} arms are compared with {reference}, so {drawn}: for one number all {comparisons} hold together at 95 %."]


def _front(worse_than: Mapping[str, Sequence[str]]) -> list[str]:
    best = [a for a, by in worse_than.items() if not by]
    said = [f"By their means, no arm is beaten in everything: {_listed(best)} each have something for them."] if len(best) == len(worse_than) > 1 else []
    said += [f"By its means, {a} is in nothing better than {_listed(by)}, and worse in something." for a, by in worse_than.items() if by]
    return said


def _listed(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
