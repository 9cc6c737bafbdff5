"""In Search of the Successful Interpolation: On the Role of Sharpness in CLIP Generalization (paper 55)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from luthier.catalog import register
from luthier.core.landscape import (
    Landscape,
    Value,
    average_sharpness,
    barrier,
    between,
    collated,
    grid,
    layer_barriers,
    layers,
    stragglers,
    worst_sharpness,
)
from luthier.core.source import TensorSource
from luthier.errors import ModelError, RecipeError
from luthier.measure import Measure, Measures

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


def interpolation(base: Any, tuned: Any, value: Callable[[TensorSource], Value], points: int = 11) -> list[dict[str, float]]:
    """Loss and accuracy at (1 - a) base + a tuned, for `points` values of a from 0 to 1."""
    base, tuned = TensorSource.of(base), TensorSource.of(tuned)
    return [{"alpha": a, **value(between(base, tuned, a))._asdict()} for a in grid(points)]


@register("interpolation", paper=55)
@dataclass(kw_only=True)
class Interpolation(Measure):
    """Walk from the base to the tuned model in a straight line and tell whether some point between them is better than both, and which layers stand in the way.

    theta(a) = (1 - a) theta_0 + a theta_1, with loss and accuracy on the test rows and on the `ood` rows at every a. Mixing succeeds
    where max_a OOD(a) > max(OOD(0), OOD(1)) (`ood_gain` > 0) and fails where OOD falls below both ends (`ood_drop` > 0). Layer by layer,
    with all others tuned, the barrier g_l = max_a [L(theta^l(a)) - the straight line between its ends] on the test rows is measured;
    the `share` of layers with the highest are the stragglers. Adaptive sharpness (perturbations in proportion to |theta|, so that
    rescaling layers changes nothing) is taken at a = `at`: average, E_{d ~ N(0, rho^2 theta^2)} L(theta + d) - L, and worst case, max over
    |d| <= rho |theta| by sign ascent (step rho / 4); for all layers together, for the stragglers and for the others. The paper finds that
    not the whole model's sharpness but the stragglers' goes with OOD accuracy; straggler-sparsify repairs them.

    Decided where the paper's text leaves it open: the barrier is the score of a layer; a layer is a block, and outside the blocks a
    module; stragglers are the top 20 %; rho is 5e-3 (average, 10 draws) and 1e-3 (worst case, 10 steps); matrices alone are perturbed,
    never gains and biases; logits as they are (`unit_logits` scales each row to length 1). Draws depend on names and a seed, so all
    models share them. Sharpness follows the loss level: compare models of like loss. Running statistics of batch norms are mixed like
    weights, not recomputed. Pairs of measurements from one run are no independent data. Costs `points` passes over the rows, and
    `layer_points` - 1 for each layer."""

    points: int = 11
    """Points on the path."""
    layer_points: int = 5
    """Points on the path of a single layer."""
    by: Literal["block", "module"] = "block"
    """What a layer is."""
    share: float = 0.2
    """The share of layers that are called stragglers."""
    at: float = 0.5
    """Where on the path sharpness is measured."""
    average_radius: float = 5e-3
    """rho of the average-case sharpness; 0 leaves it out."""
    worst_radius: float = 1e-3
    """rho of the worst-case sharpness; 0 leaves it out."""
    draws: int = 10
    """Perturbations that the average is taken over."""
    steps: int = 10
    """Ascent steps of the worst case."""
    unit_logits: bool = False
    """Scale every row of logits to length 1, so that the loss does not depend on how sure the model is."""
    limit: int = 256
    """At most so many rows of each stream."""
    seed: int = 0
    """Draws the same perturbations for every model."""

    compares = True
    toy = {"points": 3, "layer_points": 3, "draws": 2, "steps": 2}

    def __post_init__(self) -> None:
        bad = {
            "points": self.points < 3, "layer_points": self.layer_points < 3, "share": not 0 <= self.share <= 1, "at": not 0 <= self.at <= 1,
            "average_radius": self.average_radius < 0, "worst_radius": self.worst_radius < 0, "draws": self.draws < 1, "steps": self.steps < 1,
            "limit": self.limit < 1,
        }  # fmt: skip
        for name, wrong in bad.items():
            if wrong:
                raise RecipeError(f"`{name}` of interpolation is {getattr(self, name)}; paths need 3 points or more, shares lie from 0 to 1, radii are 0 or more, counts 1 or more.")

    def measure(self, model: Family, rows: Any, ctx: Context | None = None) -> Measures:
        if ctx is None or not ctx.has_model("base") or rows is None or not len(rows):
            return Measures(notes=["There is no base to walk from, or there are no test rows, so the path between base and tuned model was not measured."])
        from luthier.core.stage import plain

        scratch = plain(model.frozen_copy())
        base, tuned = TensorSource.of(dict(ctx.model("base").network.state_dict())), TensorSource.of(dict(scratch.network.state_dict()))
        if hasattr(scratch.network, "peft_config") or {n: t.shape for n, t in base.items()} != {n: t.shape for n, t in tuned.items()}:
            return Measures(notes=["The tuned model's tensors are not the base's, so there is no path between them."])
        if all(torch.equal(base[n], tuned[n].to(base[n])) for n in base):
            return Measures(notes=["Tuning moved no weight, so there is no path between base and tuned model."])
        try:
            streams = {"": rows} | ({"ood_": ctx.rows("ood")} if ctx.has_rows("ood") else {})
            views = {p: Landscape(scratch, collated(scratch, r, ctx.train_on, self.limit), self.unit_logits) for p, r in streams.items()}
            return self.walk(base, tuned, views)
        except ModelError as error:
            return Measures(notes=[f"The path between base and tuned model was not measured: {error}"])

    def walk(self, base: Any, tuned: Any, views: Mapping[str, Landscape]) -> Measures:
        """The whole measure. `views`: the loss on the test rows under "", on others under the prefix of their numbers ("ood_")."""
        base, tuned, here = TensorSource.of(base), TensorSource.of(tuned), views[""]
        paths = {prefix: interpolation(base, tuned, view.value, self.points) for prefix, view in views.items()}
        out = Measures()
        for prefix, path in paths.items():
            self._path(prefix, path, out)
        if "ood_" not in paths:
            out.notes.append("There are no out-of-distribution rows, so only the test rows were followed along the path; add `data: {ood: FILE}`.")
        out.tables["path"] = [{"alpha": path[0]["alpha"], **{f"{p}{k}": line[k] for p, line in zip(paths, path) for k in ("loss", "accuracy")}} for path in zip(*paths.values())]
        out.plots["path"] = {key: [line[key] for line in out.tables["path"]] for key in out.tables["path"][0]}
        barriers = layer_barriers(base, tuned, lambda changed: here.loss({**dict(tuned), **dict(changed)}), self.layer_points, self.by)
        chosen = stragglers(barriers, self.share)
        out.tables["layers"] = [{"layer": k, "barrier": g, "straggler": k in chosen} for k, g in sorted(barriers.items(), key=lambda item: -item[1])]
        out.numbers["straggler_barrier"] = sum(barriers[k] for k in chosen) / len(chosen) if chosen else None
        out.better["straggler_barrier"] = "lower"
        self._sharpness(between(base, tuned, self.at), here, chosen, list(barriers), out)
        return out

    def _path(self, prefix: str, path: SequenceOf[Mapping[str, float]], out: Measures) -> None:
        accuracy = [p["accuracy"] for p in path]
        best = max(range(len(path)), key=lambda i: (accuracy[i], -path[i]["loss"]))
        out.numbers |= {
            f"{prefix}best_alpha": path[best]["alpha"], f"{prefix}gain": accuracy[best] - max(accuracy[0], accuracy[-1]),
            f"{prefix}drop": max(0.0, min(accuracy[0], accuracy[-1]) - min(accuracy)), f"{prefix}barrier": barrier([p["alpha"] for p in path], [p["loss"] for p in path]),
        }  # fmt: skip
        out.better |= {f"{prefix}gain": "higher", f"{prefix}drop": "lower", f"{prefix}barrier": "lower"}

    def _sharpness(self, point: TensorSource, view: Landscape, chosen: list[str], moved: list[str], out: Measures) -> None:
        """Of all layers that moved, of the stragglers, and of the others, at one point of the path."""
        by_layer = layers(point, self.by)
        state = dict(point)
        for prefix, keys in {"": moved, "straggler_": chosen, "other_": [k for k in moved if k not in chosen]}.items():
            part = {n: state[n] for k in keys for n in by_layer[k] if state[n].is_floating_point() and state[n].ndim > 1}
            if not part:
                continue

            def loss(changed: Mapping[str, Tensor]) -> float:
                return view.loss({**state, **changed})

            def gradient(changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
                return view.gradient(changed, {**state})

            if self.average_radius:
                out.numbers[f"{prefix}average_sharpness"] = average_sharpness(loss, part, self.average_radius, self.draws, self.seed)
            if self.worst_radius:
                out.numbers[f"{prefix}worst_sharpness"] = worst_sharpness(loss, gradient, part, self.worst_radius, self.steps)
