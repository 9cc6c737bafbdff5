"""SpIEL: sparse fine-tuning whose support moves to where gradients are large."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from luthier.adapt import Adapter
from luthier.adapt._shared import ALL_LINEAR, target_layers, unwrapped, validate
from luthier.catalog import register
from luthier.core.plugin import Group, Parts, Step
from luthier.core.sparse import scatter
from luthier.core.surgery import Editor, edit_optimizer
from luthier.errors import RecipeError, TrainingError

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


# the mathematics of a reselection -----------------------------------------------------------------------------------------
@torch.no_grad()
def spiel(values: Tensor, index: Tensor, candidates: Tensor, scores: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """One drop and growth of a support: (places in `index` that change, which of `candidates` take them).

    Drop: the floor(rate k) entries of smallest |value|. Grow: of the candidates that are not active after dropping, as many with
    the largest score. An entry that is both dropped and grown just stays. With too few candidates only the smallest values go."""
    number = int(len(values) * rate)
    dropped = values.abs().topk(number, largest=False, sorted=True).indices
    staying = torch.ones(len(index), dtype=torch.bool, device=index.device)
    staying[dropped] = False
    free = (~torch.isin(candidates, index[staying])).nonzero()[:, 0]
    grown = free[scores[free].topk(min(number, len(free))).indices]
    changed = dropped[~torch.isin(index[dropped], candidates[grown])]
    grown = grown[~torch.isin(candidates[grown], index[dropped])]
    return changed[: len(grown)], grown


@torch.no_grad()
def seeds(total: Tensor, squares: Tensor, count: float, betas: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Adam's moments of entries whose gradient was seen `count` times: (sum g / n)(1 - b1^n), (sum g^2 / n)(1 - b2^n)."""
    return total / count * (1 - betas[0] ** count), squares / count * (1 - betas[1] ** count)


@torch.no_grad()
def momentum_growth(rows: Tensor, columns: Tensor, index: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The `number` inactive entries with the largest r_i c_j (SM3's covers), and these scores."""
    scores = torch.outer(rows, columns).flatten()
    scores[index] = -1.0
    best = scores.topk(min(number, len(scores) - len(index)))
    return best.indices, best.values


def reselection_rate(done: int, first: int, steps: int, rate: float, shape: str = "linear") -> float:
    """1 at the first reselection; then p0 (1 - t / T), or p0 (1 + cos(pi t / T)) / 2."""
    if done == first:
        return 1.0
    t = min(1.0, done / max(1, steps))
    return rate * (1 - t) if shape == "linear" else rate * (1 + math.cos(math.pi * t)) / 2


# the layer ----------------------------------------------------------------------------------------------------------------
class _Sparse(torch.autograd.Function):
    """x (W + scatter(delta))^T + b, where neither W + delta nor its gradient outlives the call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, delta: Tensor, index: Tensor, transposed: bool, watch: Any) -> Tensor:
        ctx.save_for_backward(x, weight, delta, index)
        ctx.transposed, ctx.watch = transposed, watch
        full = scatter(weight, index, delta)
        return F.linear(x, full.T if transposed else full, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, delta, index = ctx.saved_tensors
        grad_x = grad_delta = None
        if ctx.needs_input_grad[0]:
            full = scatter(weight, index, delta).to(grad)
            grad_x = (grad @ (full.T if ctx.transposed else full)).to(x)
        if ctx.needs_input_grad[3]:
            g, inputs = grad.flatten(0, -2), x.flatten(0, -2).to(grad)
            dense = (inputs.T @ g if ctx.transposed else g.T @ inputs).flatten()
            grad_delta = dense[index].to(delta)
            if ctx.watch is not None:
                ctx.watch(dense)
        return grad_x, None, None, grad_delta, None, None, None


class SparseLinear(nn.Linear):
    """A linear layer with a packed sparse delta; made by changing the class of an existing layer, so that all names stay."""

    delta: nn.Parameter
    delta_index: Tensor
    delta_off = False
    watch: Any = None
    plain: type[nn.Module] = nn.Linear
    transposed = False

    def forward(self, x: Tensor) -> Tensor:
        if self.delta_off or not len(self.delta):
            return self.plain.forward(self, x)
        return _Sparse.apply(x, self.weight, self.bias, self.delta, self.delta_index, self.transposed, self.watch if self.training else None)


class SparseConv1D(Conv1D):
    """The same for GPT-2's transposed layers."""

    delta_off, watch, plain, transposed = False, None, Conv1D, True
    forward = SparseLinear.forward


@dataclass
class Candidates:
    """Entries that may be grown, with the sums of their gradients."""

    index: Tensor
    total: Tensor
    squares: Tensor
    pending: Tensor
    """This step's gradient so far."""
    count: int = 0

    def commit(self, keep: bool) -> None:
        """The step is over: its gradient counts once (not at all if the step was dropped)."""
        if keep:
            self.total += self.pending
            self.squares += self.pending.square()
            self.count += 1
        self.pending.zero_()


class Watch:
    """Sees a layer's dense gradient inside the backward pass and keeps only the candidates' part."""

    def __init__(self, store: dict[str, Candidates], name: str, delta: nn.Parameter) -> None:
        self.store, self.name, self.delta = store, name, delta

    @torch.no_grad()
    def __call__(self, dense: Tensor) -> None:
        dense = dense.float()
        if self.name not in self.store:
            index = dense.abs().topk(len(self.delta)).indices.sort().values
            zero = torch.zeros(len(index), device=dense.device)
            self.store[self.name] = Candidates(index, zero, zero.clone(), zero.clone())
        candidates = self.store[self.name]
        if self.delta.grad is None:  # the first micro-batch of a pass; a two-pass optimizer's last pass is the one that counts
            candidates.pending.zero_()
        candidates.pending += dense[candidates.index]


# the method ---------------------------------------------------------------------------------------------------------------
@register("spiel", paper=95)
@dataclass
class Spiel(Adapter):
    """Train a sparse update of the weights whose places move while it trains: entries that stayed small are dropped, entries with
    large gradients are grown; memory grows with the number of places, never with the model.

    Per linear layer W + scatter(phi at eta), k = |eta| places at a share `density` of its weights, random at first, phi = 0. After
    `collect` steps, and every `every` steps from then on, floor(p k) places with the smallest |phi| are given up (their weights are
    the pretrained ones again) and as many are grown at phi = 0; p = 1 the first time, then `rate` (1 - t / T).

    - ag (accumulated gradients): during the `collect` steps before, the first backward pass names the k entries of largest |dL/dW|
      as candidates; their gradients are summed over these steps; growth takes the largest |sum|. The grown get Adam moments
      (sum g / n)(1 - b1^a), (sum g^2 / n)(1 - b2^a) with age a = n, and every place is bias corrected by its own age.
    - ma (momentum approximation): growth takes the largest r_i c_j of SM3's row and column covers; needs `optimize: sm3`.

    A place's gradient counts per optimizer step (its micro-batches summed), so the moments are of what Adam really sees; a grown
    place's moments hold a updates, so its next step corrects with age a + 1 and a constant gradient g gives exactly lr sign(g) steps
    (the authors' code reads the age one step late). With an Adam-like optimizer the step of places whose age differs from the
    optimizer's count is replaced after the fact, see core/surgery.py; eps stands where torch puts it. Other optimizers forget a
    moved place's momentum. No decay: it would shrink the update, not the weight. A quantised base is left out."""

    variant: Literal["ag", "ma"] = "ag"
    """How places are grown."""
    density: float = 0.01
    """Share of each targeted weight that trains."""
    weights: int | None = None
    """How many weights train in all, instead of `density`."""
    every: int = 20
    """Steps between reselections."""
    collect: int = 5
    """Steps of gradient sums before each; the first reselection comes after them."""
    rate: float = 0.2
    """p0: share of the places that a reselection after the first may move, at the start of the run."""
    schedule: Literal["linear", "cosine"] = "linear"
    """How that share falls to 0."""
    targets: list[str] = field(default_factory=lambda: [ALL_LINEAR])
    """Layers by the end of their name, or `all-linear`: every linear layer but the head."""

    switchable = True
    parallel = frozenset({"single"})

    def __post_init__(self) -> None:
        validate(self, ("weights", "every", "collect"))
        for name, value in (("density", self.density), ("rate", self.rate)):
            if not 0 < value <= 1:
                raise RecipeError(f"'{name}' is {value!r}; it must be above 0 and at most 1.")
        if self.collect > self.every:
            raise RecipeError(f"'collect' is {self.collect}; it must be at most `every` ({self.every}).")
        self._layers: dict[str, Any] = {}
        self._candidates: dict[str, Candidates] = {}

    def check(self, recipe: Any) -> str | None:
        chosen = [getattr(c, "method", None) for c in getattr(recipe, "optimize", None) or []]
        if self.variant == "ma" and chosen and chosen[0] != "sm3":
            return f"spiel's variant 'ma' grows by SM3's covers, but optimize is '{chosen[0]}'; use `optimize: sm3` or `variant: ag`."
        return None

    def attach(self, model: Family, ctx: Context | None = None) -> Parts:
        unwrapped(model, self.name)
        model.network.requires_grad_(False)
        layers = target_layers(model.network, self.targets)
        sizes = {n: m.weight.numel() for n, m in layers.items()}  # type: ignore[operator]
        share = self.density if self.weights is None else self.weights / max(1, sum(sizes.values()))
        if share > 1:
            raise RecipeError(f"'weights' is {self.weights}, but the targeted layers have {sum(sizes.values())} weights.")
        rng = ctx.rng("spiel") if ctx is not None else torch.Generator().manual_seed(0)
        self._layers = {n: m for n, m in layers.items() if int(share * sizes[n] + 1e-9)}
        if not self._layers:
            raise RecipeError(f"A share of {share:g} is no weight at all in any targeted layer; raise `density`.")
        params, support = {}, {}
        for name, layer in self._layers.items():
            index = torch.randperm(sizes[name], generator=rng)[: int(share * sizes[name] + 1e-9)].sort().values
            _plant(layer, index)
            params[f"{name}.delta"] = layer.delta
            support[f"{name}.delta"] = (layer.delta_index, tuple(layer.weight.shape))
        return Parts([Group("delta", params, weight_decay=0.0, options={"support": support})])

    # life cycle -------------------------------------------------------------------------------------------------------------
    def before_step(self, step: Step, ctx: Context | None) -> None:
        place = step.number % self.every
        if place == 0:
            self._candidates.clear()
        for name, layer in self._layers.items():
            layer.watch = Watch(self._candidates, name, layer.delta) if self.variant == "ag" and place < self.collect else None

    @torch.no_grad()
    def after_step(self, step: Step, ctx: Context | None) -> None:
        editor = edit_optimizer(step.optimizer)
        for layer in self._layers.values():
            layer.watch = None
            if not step.skip:
                editor.correct(layer.delta)
        for candidates in self._candidates.values():
            candidates.commit(not step.skip)
        done, steps = step.number + 1, ctx.clock.steps if ctx is not None else 0
        if done % self.every != self.collect % self.every or (steps and done > steps):
            return
        rate = reselection_rate(done, self.collect, steps or done, self.rate, self.schedule)
        moved = [self._reselect(name, layer, rate, editor) for name, layer in self._layers.items()]
        self._candidates.clear()
        if ctx is not None:
            ctx.log(**{"spiel/moved": sum(moved) / sum(len(m.delta) for m in self._layers.values())})

    def _reselect(self, name: str, layer: Any, rate: float, editor: Editor) -> int:
        values, index = layer.delta.data, layer.delta_index
        if self.variant == "ma":
            state = editor.state(layer.delta)
            if "rows" not in state:
                raise TrainingError("spiel's variant 'ma' needs SM3's row and column covers; use `optimize: sm3`.")
            candidates, scores = momentum_growth(state["rows"], state["columns"], index, int(len(values) * rate))
        elif name in self._candidates and self._candidates[name].count:
            seen = self._candidates[name]
            candidates, scores = seen.index, seen.total.abs()
        else:
            return 0
        changed, grown = spiel(values, index, candidates, scores, rate)
        index[changed] = candidates[grown]
        values[changed] = 0.0
        if self.variant == "ag":
            betas = editor.group(layer.delta).get("betas", (0.0, 0.0))
            m, v = seeds(seen.total[grown], seen.squares[grown], seen.count, betas)
            editor.seed(layer.delta, changed, m, v, float(seen.count))
        else:
            editor.clear(layer.delta, changed)
        order = index.argsort()
        index.copy_(index[order])
        values.copy_(values[order])
        editor.move(layer.delta, order)
        return len(changed)

    # the model with and without the update ------------------------------------------------------------------------------------
    @contextmanager
    def disabled(self, model: Family) -> Iterator[Family]:
        for layer in self._layers.values():
            layer.delta_off = True
        try:
            yield model
        finally:
            for layer in self._layers.values():
                layer.delta_off = False

    @contextmanager
    def folded(self, model: Family) -> Iterator[Family]:
        """Plain layers that hold W + delta; afterwards the old weights are back bit for bit."""
        kept = {name: _pull(layer) for name, layer in self._layers.items()}
        try:
            yield model
        finally:
            for name, layer in self._layers.items():
                index, delta, old = kept[name]
                with torch.no_grad():
                    layer.weight.view(-1)[index] = old
                _plant(layer, index, delta)

    def state_dict(self) -> dict[str, Any]:
        return {"candidates": {n: dict(vars(c)) for n, c in self._candidates.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._candidates.clear()
        for name, saved in state["candidates"].items():
            device = self._layers[name].weight.device
            moved: dict[str, Any] = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in saved.items()}
            self._candidates[name] = Candidates(**moved)


def _plant(layer: Any, index: Tensor, delta: nn.Parameter | None = None) -> None:
    """Turn a plain layer into a sparse one, by its class. The update is kept in fp32."""
    layer.__class__ = SparseLinear if isinstance(layer, nn.Linear) else SparseConv1D
    layer.delta = nn.Parameter(torch.zeros(len(index), device=layer.weight.device)) if delta is None else delta
    layer.register_buffer("delta_index", index.to(layer.weight.device))


@torch.no_grad()
def _pull(layer: Any) -> tuple[Tensor, nn.Parameter, Tensor]:
    """The inverse, with the update added to the weight: (places, delta, the weights that were there)."""
    index, delta = layer.delta_index, layer.delta
    old = layer.weight.view(-1)[index].clone()
    layer.weight.copy_(scatter(layer.weight, index, delta))
    layer.__class__ = layer.plain
    del layer.delta, layer.delta_index
    return index, delta, old
