"""The learned soup: mixing coefficients of the models, learned on validation rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.catalog import register
from luthier.core.source import TensorSource, aligned, left_out
from luthier.errors import ModelError, RecipeError
from luthier.merge import Merger
from luthier.merge._shared import ingredients, layer_of

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family

By = Literal["layer", "block", "global"]
LossOf = Callable[..., Tensor]


@dataclass
class LearnedMix:
    """A learned soup: the mixed weights, and the coefficients that make it."""

    weights: TensorSource
    coefficients: dict[str, list[float]]
    """For every floating tensor its share of each model; they sum to 1."""
    temperature: float
    losses: list[float]
    """The loss of every step."""


def learned_soup(
    states: Any, loss_fn: LossOf | SequenceOf[LossOf], by: By = "layer", lr: float = 0.05, epochs: int = 5, temperature: bool = False,
    skip: SequenceOf[str] = (), base: Any = None,
) -> LearnedMix:  # fmt: skip
    """Minimise `loss_fn(state_dict)` over softmax coefficients of the models, with AdamW without decay.

    `loss_fn` is one function or one for every batch; each is called `epochs` times. With `temperature` it is called with a second
    argument, a learned scalar that the logits are multiplied by (it starts at 1 and is not part of the mixed weights)."""
    sources, home = ingredients(base, states)
    home = sources[0] if home is None else home
    held = [dict(aligned(home, s, skip)) for s in sources]
    mixed = [n for n in home.distinct if held[0][n].is_floating_point() and not left_out(n, skip)]
    rows = _rows(mixed, by)
    rest = {n: home[n] for n in home.distinct if n not in rows}
    types = {n: home[n].dtype for n in mixed}
    # The released initialisation: every raw coefficient the same.
    raw = torch.full((max(rows.values(), default=0) + 1, len(held)), 1.0 / len(held), requires_grad=True)
    beta = torch.ones((), requires_grad=True)
    optimizer = torch.optim.AdamW([raw, beta] if temperature else [raw], lr=lr, weight_decay=0.0)

    def state() -> dict[str, Tensor]:
        shares = raw.softmax(1)
        found = dict(rest)
        for name in mixed:
            parts = [a.to(h[name].device) * h[name].float() for a, h in zip(shares[rows[name]], held)]
            found[name] = sum(parts[1:], parts[0]).to(types[name])
        return {n: found[home.aliases.get(n, n)] for n in home}

    losses: list[float] = []
    for _ in range(epochs):
        for one in [loss_fn] if callable(loss_fn) else loss_fn:
            optimizer.zero_grad(set_to_none=True)
            loss = one(state(), beta) if temperature else one(state())
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return _mixed(held, home, rows, raw.detach().softmax(1), float(beta.detach()), losses)


def _rows(names: list[str], by: By) -> dict[str, int]:
    """Which coefficients each tensor uses."""
    if by == "global":
        return dict.fromkeys(names, 0)
    if by == "layer":
        return {name: i for i, name in enumerate(names)}
    keys: dict[Any, int] = {}
    return {n: keys.setdefault(layer_of(n), len(keys)) for n in names}


def _mixed(
    held: list[dict[str, Tensor]], home: TensorSource, rows: dict[str, int], shares: Tensor, temperature: float, losses: list[float]
) -> LearnedMix:  # fmt: skip
    def read(name: str) -> Tensor:
        own = home.aliases.get(name, name)
        if own not in rows:
            return home[name].clone()
        total = sum(float(a) * h[own].double() for a, h in zip(shares[rows[own]], held))
        return total.to(home[own].dtype)  # type: ignore[union-attr]

    source = TensorSource(home, read, home.meta, home.aliases)
    return LearnedMix(source, {n: shares[i].tolist() for n, i in rows.items()}, temperature, losses)


class _Scorer(nn.Module):
    """A family's loss on a batch as a module, so that functional_call can run it at other weights."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.network = family.network
        self._family = [family]

    def forward(self, batch: Any, temperature: Tensor) -> Tensor:
        family = self._family[0]
        if "score" in family.verbs:
            scores = family.score(batch)
            if len(scores) == 0:
                return scores.hidden.sum() * temperature
            # Logits in one piece: a recomputed chunk would see the network's own weights.
            return F.cross_entropy(scores.head(scores.hidden) * temperature, scores.target)
        return F.cross_entropy(family.classify(batch).float() * temperature, batch.tensors["labels"].to(family.device))


def batch_loss(scorer: _Scorer, batch: Any) -> LossOf:
    """The validation loss of one batch as a function of a state dict and a temperature."""
    own = TensorSource.of(scorer.network).distinct

    def loss(state: Mapping[str, Tensor], temperature: Tensor) -> Tensor:
        device = next(scorer.parameters()).device
        tensors = {f"network.{name}": state[name].to(device) for name in own}
        return torch.func.functional_call(scorer, tensors, (batch, temperature.to(device)))

    return loss


@register("learned-soup", paper=62)
@dataclass
class LearnedSoup(Merger):
    """Learn on validation rows how much of each fine-tune to take, for every tensor of its own or for the whole model.

    theta^j = sum_i alpha_ij theta_i^j with alpha_j = softmax over the models, all equal at the start, and a scalar temperature on the
    logits (start 1): minimise the validation cross-entropy with AdamW (lr 0.05, no decay, 5 epochs, batches of 256). `by: layer` has
    one set of coefficients for every tensor (the paper's "by layer", as released), `block` one for every block, `global` one. All
    models are in memory at once. The temperature calibrates the loss while learning; it is reported, not put into the weights.
    Integer tensors are the base's. Compare with greedy-soup, which needs no gradient."""

    by: Literal["layer", "block", "global"] = "layer"
    """What shares its coefficients: one tensor, one block, or the whole model."""
    lr: float = 0.05
    """Learning rate of the coefficients."""
    epochs: int = 5
    """Passes over the validation rows."""
    batch: int = 256
    """Validation rows a step."""
    temperature: bool = True
    """Whether the logits' scale is learned along."""
    include_base: bool = False
    """Whether the base is an ingredient."""
    skip: list[str] = field(default_factory=list)
    """Tensors to leave as the base (or, without one, the first model) has them: names, leading parts of names, or globs."""

    needs = frozenset({"val"})
    families = frozenset({"causal-lm", "text-encoder", "image-classifier"})

    def __post_init__(self) -> None:
        for name in ("lr", "epochs", "batch"):
            if getattr(self, name) <= 0:
                raise RecipeError(f"`{name}` of learned-soup is {getattr(self, name)}; it must be positive.")
        self.report: dict[str, Any] = {}

    def merge(self, base: Any, tuned: SequenceOf[Any], ctx: Context | None = None) -> TensorSource:
        if ctx is None or ctx.current is None:
            raise RecipeError("The learned soup needs a model and validation rows; add `data: {val: FILE}` or use uniform-soup.")
        states, home = ingredients(base, tuned, self.include_base)
        family = ctx.current
        self._fits(family, home or states[0])
        with family.evaluating(grad=True):
            losses = [batch_loss(_Scorer(family), batch) for batch in self._batches(ctx)]
            if not self.temperature:
                losses = [lambda state, one=one: one(state, torch.ones(())) for one in losses]
            mix = learned_soup(states, losses, self.by, self.lr, self.epochs, self.temperature, self.skip, home)
        self.report = {"coefficients": mix.coefficients, "temperature": mix.temperature, "losses": mix.losses}
        return mix.weights

    def _fits(self, family: Family, home: TensorSource) -> None:
        own = set(family.network.state_dict())
        if not own <= set(home):
            raise ModelError(f"The learned soup runs the current model at other weights, but {len(own - set(home))} of its tensors are not in the checkpoints; merge its adapter first.")

    def _batches(self, ctx: Context) -> list[Any]:
        rows = ctx.rows("val")
        order = torch.randperm(len(rows), generator=ctx.rng("learned-soup")).tolist()
        return [
            ctx.current.collate([rows[i] for i in order[at : at + self.batch]], train_on=ctx.train_on)  # type: ignore[union-attr]
            for at in range(0, len(order), self.batch)
        ]
