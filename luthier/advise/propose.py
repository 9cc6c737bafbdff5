"""Recipes for what was seen: first the plain one, then variations that a signal asks for, each with its reasons.

A variation is offered as better only where its paper's claim reproduced here; one whose claim did not reproduce is left out and named.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import yaml

from luthier.advise.data import Signal, percent
from luthier.advise.evidence import Evidence, evidence
from luthier.advise.model import BATCH, RANK, ModelFacts, size
from luthier.advise.probe import Probe
from luthier.catalog import method
from luthier.core.estimate import estimate
from luthier.errors import UserError
from luthier.recipe import Recipe, check

PREFERENCE = 0.1
"""Objectives on pairs of answers begin with this share of the usual learning rate."""
SAVES_NOTHING = 0.25
"""An adapter with so many weights of the model's own spares neither memory nor time."""
STEPS, MOST_EPOCHS, FEW, MANY, KNOWN = 100, 10, 200, 1000, 0.9
NOISY = {"conflicting answers": 0.02, "doubtful labels": 0.02, "doubtful answers": 0.03, "surprising answers": 0.05}
"""From these shares on a signal asks for something against noise."""
MOST = 2
"""Variations."""


@dataclass(frozen=True)
class Reason:
    """Why. `source`: what was measured on the user's data, our evidence, or a default of the library that nothing measured."""

    said: str
    source: str = "measured"


@dataclass
class Proposal:
    """One recipe."""

    name: str
    title: str
    recipe: Recipe
    reasons: list[Reason]
    evidence: Evidence | None = None
    file: str | None = None

    @property
    def reproduced(self) -> bool:
        return self.evidence is not None and self.evidence.verdict == "reproduced"

    def yaml(self) -> str:
        """What a file holds: as written here, with paths made absolute and rows that exist in memory only named by their content."""
        raw, whole = self.recipe.to_dict(), yaml.safe_load(self.recipe.to_yaml())
        shown = {**raw, "name": self.name, "model": whole["model"], "data": {k: whole["data"][k] for k in raw["data"]}}
        return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "title": self.title, "file": self.file, "recipe": yaml.safe_load(self.yaml()), "reasons": [vars(r) for r in self.reasons],
                "evidence": self.evidence.to_dict() if self.evidence else None}  # fmt: skip


@dataclass
class Look:
    """All that was seen."""

    start: dict[str, Any]
    """`model` and `data` of the recipes."""
    loaded: dict[str, Any]
    """The same with the model and a training row in memory: a recipe of these is checked with nothing left to guess."""
    kind: str
    model: ModelFacts
    signals: dict[str, Signal]
    general: bool = False
    """Whether general rows were given."""
    probe: Probe = field(default_factory=Probe)

    def value(self, name: str) -> float:
        """A signal's number, 0 where it was not measured: what was not measured asks for nothing."""
        return (self.signals[name].value or 0.0) if name in self.signals else 0.0

    @property
    def rows(self) -> int:
        return int(self.value("rows"))

    @property
    def row(self) -> dict[str, Any]:
        """The first one."""
        return dict(self.loaded["data"]["train"][0])

    def seconds(self, steps: int, batch: int, trainable: int | None) -> str:
        """How long so many steps take, roughly."""
        length = self.signals["tokens"].value
        return estimate(self.loaded["model"], [self.row], batch, steps, trainable, tokens_per_row=length).sentences[-1]


# -- what the signals ask for ----------------------------------------------------------------------------------------------------


def _noise(look: Look) -> str | None:
    """Wrong or contradicting answers, in more than a few rows."""
    return "; ".join(look.signals[name].said for name, least in NOISY.items() if look.value(name) >= least) or None


def _retention(look: Look) -> str | None:
    if not look.general:
        return None
    shift = look.signals["shift"]
    return "general rows are given, so what is lost counts" + ("" if shift.value is None else f": {shift.said}")


def _redundancy(look: Look) -> str | None:
    """Many rows of which fewer might do."""
    if look.rows < MANY:
        return None
    alike = look.value("repeats") + look.value("near repeats")
    found = [f"{percent(alike)} of {look.rows:,} rows repeat another one exactly or nearly"] if alike >= 0.1 else []
    if look.signals["diversity"].facts.get("eighth", 0) >= 0.9:
        found.append(f"{look.rows:,} rows, {look.signals['diversity'].said}")
    if look.probe.flat:
        found.append(dict(look.probe.lines)["more rows"])
    return "; ".join(found) or None


def _half_known(look: Look) -> str | None:
    return look.signals["known already"].said if 0.1 <= look.value("known already") <= 0.9 else None


def _few(look: Look) -> str | None:
    return f"there are only {look.rows} rows" if look.rows < FEW else None


NEEDS: dict[str, Callable[[Look], str | None]] = {
    "noise": _noise, "retention": _retention, "redundancy": _redundancy, "half known": _half_known, "few rows": _few,
}  # fmt: skip
"""By urgency: what is asked for, and the measured reason; None where nothing asks for it."""


@dataclass(frozen=True)
class Idea:
    """A method that a paper recommends where there is a need."""

    need: str
    method: str
    paper: str
    change: dict[str, Any]
    """Recipe keys to replace."""
    columns: frozenset[str] = frozenset()
    """The rows need one of these: without it the method is not what its paper tried, or no other than the plain one."""


IDEAS = (
    Idea("noise", "curate/clear", "clear", {"curate": {"method": "clear", "stage": "filter"}}, frozenset({"completion", "messages"})),
    Idea("noise", "objective/asft", "asft", {"objective": {"method": "asft"}}),
    Idea("noise", "objective/adpo", "adpo", {"objective": {"method": "adpo"}}, frozenset({"scores", "agreement", "target"})),
    Idea("retention", "objective/asft", "asft", {"objective": {"method": "asft"}}),
    Idea("retention", "objective/one-token-rollout", "one-token-rollout", {"objective": {"method": "one-token-rollout"}}),
    Idea("retention", "merge/lines", "lines", {"merge": {"method": "lines", "of": ["base", "this"]}}),
    Idea("retention", "adapt/hft", "hft", {"adapt": {"method": "hft"}}),
    Idea("redundancy", "select/mig", "mig", {"select": {"method": "mig", "budget": "50%"}}),
    Idea("redundancy", "select/kmeans-quality", "kmq-iterative", {"select": {"method": "kmeans-quality", "budget": "50%"}}),
    Idea("redundancy", "select/uds", "uds", {"select": {"method": "uds", "scale": "zscore", "alpha": 1.0}}),
    Idea("half known", "objective/one-token-rollout", "one-token-rollout", {"objective": {"method": "one-token-rollout"}}),
    Idea("half known", "objective/prefix-rft", "prefix-rft", {"objective": {"method": "prefix-rft"}}),
    Idea("few rows", "objective/masked-thought", "masked-thought", {"objective": {"method": "masked-thought"}}),
    Idea("few rows", "objective/core-tuning", "core-tuning", {"objective": {"method": "core-tuning"}}),
)


# -- proposing -------------------------------------------------------------------------------------------------------------------


def propose(look: Look) -> tuple[list[Proposal], list[str]]:
    """The recipes, the plain one first, and what is not proposed and why."""
    first = plain(look)
    left_out: list[str] = []
    found: list[Proposal] = []
    asked = {need: why for need, asks in NEEDS.items() if (why := asks(look)) is not None}
    for need, why in asked.items():
        used = {p.title for p in found}
        offers = [o for i in IDEAS if i.need == need and (o := _offer(i, look, first, why, left_out)) is not None and o.title not in used]
        found += sorted(offers, key=_standing)[:1]
    found = found[:MOST] or [_other_rate(look, first, asked)]
    return [first, *found], list(dict.fromkeys(left_out))


def _standing(offer: Proposal) -> int:
    """What reproduced comes first, then what was never tried, then what was tried and stayed open."""
    assert offer.evidence is not None
    return {"reproduced": 0, None: 1}.get(offer.evidence.verdict, 2)


def _offer(idea: Idea, look: Look, first: Proposal, why: str, left_out: list[str]) -> Proposal | None:
    """The plain recipe with an idea's change, if it can run and our evidence does not speak against it."""
    if idea.columns and not idea.columns & set(look.row):
        return None
    raw = {**first.recipe.to_dict(), **copy.deepcopy(idea.change)}
    try:
        check(Recipe.from_dict({**raw, **look.loaded}))
    except UserError:
        return None  # for another family of models or kind of rows
    known = evidence(idea.paper)
    if known.verdict == "not reproduced":
        left_out.append(f"{idea.method}: {known.said}")
        return None
    word = "it reproduced here" if known.verdict == "reproduced" else "worth a try"
    reasons = [Reason(why), Reason(known.said if known.verdict else f"{known.said}; nothing says that it beats plain tuning", "evidence")]
    if {"objective", "adapt"} & idea.change.keys():
        reasons.append(Reason("its learning rate is the plain recipe's and may be wrong for it; `luthier compare RECIPE --vary optimize.lr=A,B` tells", "default"))
    return Proposal(idea.method.partition("/")[2], f"{idea.method}, {word}", Recipe.from_dict(raw), reasons, known)


def _other_rate(look: Look, first: Proposal, asked: dict[str, str]) -> Proposal:
    """No method is to be tried, so what is compared is what matters most and is least known."""
    lr = float(first.recipe.optimize[0].build().lr)
    why = [Reason(f"no method is proposed for this: {said}") for said in asked.values()]
    if look.probe.runner_up:
        why.append(Reason(look.probe.rates))
    else:
        why.append(Reason("the learning rate was not measured (--probe does)", "default"))
    other = look.probe.runner_up or 4 * lr
    return Proposal("another-rate", f"the same with learning rate {other:g}", first.recipe.with_values({"optimize.lr": other}), why)


# -- the plain recipe --------------------------------------------------------------------------------------------------------------


def plain(look: Look) -> Proposal:
    """Nothing but sensible settings."""
    adapt, why = _adapt(look.model)
    batch = BATCH if look.rows >= 256 else 8 if look.rows >= 32 else 4
    epochs = _epochs(look.rows, batch)
    raw: dict[str, Any] = {"name": "plain", **copy.deepcopy(look.start)}
    objective = Recipe.from_dict(raw).objective_for(look.model.family, look.kind)[0].method
    rate = look.probe.lr or float(method("optimize", "adamw")().lr) * (PREFERENCE if look.kind == "preference" else 1)
    raw["adapt"] = {"method": "lora", "rank": RANK, "alpha": 2 * RANK} if adapt == "lora" else "full"
    raw |= {"objective": objective, "optimize": {"method": "adamw", "lr": float(f"{rate:.3g}")}}
    raw["train"] = {"epochs": epochs, "batch": batch}
    raw["train"] |= {"gradient_checkpointing": True} if adapt == "lora" and not look.model.fits(look.model.lora) else {}
    steps = round(epochs * -(-look.rows // batch))
    cost = look.seconds(steps, batch, look.model.adapter if adapt == "lora" else None)
    long = f"{epochs} epoch{'s' if epochs > 1 else ''} of {look.rows:,} rows in batches of {batch} are {steps:,} steps, the library's usual length. {cost}"
    reasons = [*why, Reason(long, "default"), _rate_reason(look, rate), *_long_rows(look, raw)]
    if look.value("known already") > KNOWN:
        reasons.append(Reason(f"there is little to gain: {look.signals['known already'].said}"))
    title = f"plain {'LoRA' if adapt == 'lora' else 'full'} {'SFT' if objective == 'sft' else f'tuning ({objective})'}"
    return Proposal("plain", title, Recipe.from_dict(raw), reasons)


def _adapt(model: ModelFacts) -> tuple[str, list[Reason]]:
    """LoRA, unless it saves nothing."""
    share = model.adapter / model.parameters
    if (share >= SAVES_NOTHING or not model.adapter) and model.fits(model.full):
        said = f"a LoRA adapter of rank {RANK} would have {percent(share)} as many weights as the model itself, so all weights are tuned"
        return "full", [Reason(f"{said} (about {size(model.full.memory_bytes)})")]
    said = f"LoRA of rank {RANK} trains {model.adapter:,} weights, {percent(share)} of the model's, in about {size(model.lora.memory_bytes)}"
    reasons = [Reason(f"{said}; all weights would take {size(model.full.memory_bytes)}")]
    if not model.fits(model.saving):
        reasons.append(Reason(f"even so it may not fit: {size(model.free or 0)} are free"))
    elif not model.fits(model.lora):
        reasons.append(Reason(f"{size(model.free or 0)} are free, so activations are computed twice to save memory (about {size(model.saving.memory_bytes)})"))
    return "lora", reasons


def _epochs(rows: int, batch: int) -> int:
    """Three passes, one over many rows; more where they would be too few steps."""
    usual = 3 if rows < 20_000 else 1
    return max(usual, min(MOST_EPOCHS, -(-STEPS * batch // max(1, rows))))


def _rate_reason(look: Look, rate: float) -> Reason:
    if look.probe.lr:
        return Reason(look.probe.rates)
    return Reason(f"learning rate {rate:g} is the library's usual one, not measured on these rows (--probe does)", "default")


def _long_rows(look: Look, raw: dict[str, Any]) -> list[Reason]:
    """Rows that the model cannot read whole stop a run unless it is said what becomes of them."""
    facts = look.signals["tokens"].facts
    if not facts.get("longer") or look.model.family != "causal-lm":
        return []
    raw["data"].setdefault("too_long", "skip")
    return [Reason(f"{percent(facts['longer'])} of the rows are longer than the {facts['reads']:,} tokens that are read; they are set aside (`too_long: cut` cuts their prompts)")]
