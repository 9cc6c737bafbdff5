"""ComPEFT: an update as signs of its largest entries and one number."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from luthier.catalog import register
from luthier.compress import Compressor
from luthier.compress._shared import Masks, Packed, decode, encode, load_packed, save_packed, vector_of
from luthier.core.source import TensorSource, applied, delta, left_out
from luthier.core.sparse import Cut, cut
from luthier.errors import RecipeError

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family

__all__ = ["ComPEFT", "Masks", "Packed", "compeft", "decode", "deviation", "encode", "load_packed", "save_packed"]

Mode = Literal["ternary", "prune", "stc"]
Ties = Literal["exact", "keep"]
DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5)
ALPHAS = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)


# the mathematics ----------------------------------------------------------------------------------------------------------
def compeft(update: Mapping[str, Tensor], density: float = 0.2, alpha: float = 1.0, mode: Mode = "ternary", ties: Ties = "exact") -> dict[str, Tensor]:
    """alpha * std(tau) * sign(tau) where |tau| is among the int(density d) largest of all d entries, 0 elsewhere.

    `prune` keeps the values instead of the signs; `stc` puts the mean magnitude of the kept entries for alpha * std(tau). Among equal
    magnitudes the first by (sorted) name and index are kept; `ties: keep` is the released threshold, which keeps one entry more and
    all that equal it. Integer tensors pass through unchanged."""
    vector = vector_of(update)
    keep = _largest(vector, density, ties)
    size = {"ternary": lambda: alpha * deviation(vector), "stc": lambda: _kept_mean(vector, keep), "prune": lambda: 1.0}[mode]()
    done: dict[str, Tensor] = {}
    for name, tensor in update.items():
        if name not in vector:
            done[name] = tensor.clone()
            continue
        value = tensor if mode == "prune" else (tensor.sign().to(_wide(tensor)) * size).to(tensor.dtype)
        done[name] = torch.where(keep.mask(name, tensor.abs()), value, torch.zeros_like(value))
    return done


def deviation(vector: Mapping[str, Tensor]) -> float:
    """The standard deviation (over d - 1) of all entries of all tensors, in fp64."""
    number, total = 0, 0.0
    for name in vector:
        number, total = number + vector[name].numel(), total + float(vector[name].double().sum())
    if number < 2:
        return 0.0
    mean = total / number
    return math.sqrt(sum(float((vector[name].double() - mean).square().sum()) for name in vector) / (number - 1))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype in (torch.float32, torch.float64) else torch.float32


def _largest(vector: Mapping[str, Tensor], density: float, ties: Ties) -> Cut:
    d = sum(t.numel() for t in vector.values())
    sizes = TensorSource.of(vector).map(torch.abs)
    k = int(density * d)
    if ties == "exact":
        return cut(sizes, k)
    # The release takes the (d - k)-th smallest magnitude as the threshold, that is the (k + 1)-th largest.
    return Cut(cut(sizes, k + 1).threshold)


def _kept_mean(vector: Mapping[str, Tensor], keep: Cut) -> float:
    total = number = 0.0
    for name, tensor in vector.items():
        kept = tensor.abs()[keep.mask(name, tensor.abs()) & (tensor != 0)]
        total, number = total + float(kept.double().sum()), number + kept.numel()
    return total / number if number else 0.0


# the method ---------------------------------------------------------------------------------------------------------------
@register("compeft", paper=63)
@dataclass
class ComPEFT(Compressor):
    """Store only the signs of an update's largest entries and one shared magnitude: 8 to 50 times smaller, without training, and often as good.

    tau = theta - reference over all trained tensors as one vector; keep the int(density d) entries of largest magnitude; each becomes
    alpha * sigma * sign, sigma = std(tau) before anything is cut; theta' = reference + that. `compress` of a mapping takes it as the
    update itself. Of a peft model it takes the adapter's tensors, with reference 0 as released ((IA)^3 vectors: 1), A and B alike, or
    with `reference: init` what they were when training began; modules saved whole beside the adapter (a head) stay as they are. Of any
    other model it takes the difference to `ctx.model("base")`. The result is a model of the same kind; the packed file (Golomb-Rice
    gaps and sign bits) lies in the run's folder, and `load_packed` reads it.

    Defaults: 20 % and alpha 1 (good for models of 13B or more; smaller ones need a larger alpha: `auto` tries the grid on validation
    rows, best first found; the alpha grid is recalled from the paper). `stc` uses the mean magnitude of the kept entries (the release
    averages signed values, which is near zero and not the published baseline). `ties: keep` reproduces the released threshold. Only
    ternary updates pack; `prune` is stored as indices and values would be. Merges well with task-arithmetic and ties."""

    density: float | Literal["auto"] = 0.2
    """The share of all entries that is kept; `auto` chooses among `densities` on validation rows."""
    alpha: float | Literal["auto"] = 1.0
    """The shared magnitude in standard deviations of the update; `auto` chooses among `alphas` on validation rows."""
    mode: Literal["ternary", "prune", "stc"] = "ternary"
    """Signs times alpha * sigma, the kept values themselves, or signs times their mean magnitude."""
    ties: Literal["exact", "keep"] = "exact"
    """Exactly int(density d) entries, or the released threshold."""
    reference: Literal["zero", "init"] = "zero"
    """What an adapter's update is measured from; `init` needs the model before training (it is noted when training begins)."""
    densities: list[float] = field(default_factory=lambda: list(DENSITIES))
    """The grid of `density: auto`."""
    alphas: list[float] = field(default_factory=lambda: list(ALPHAS))
    """The grid of `alpha: auto`."""
    skip: list[str] = field(default_factory=list)
    """Tensors to keep as they are (task heads): names, leading parts of names, or globs."""
    file: str = "compeft.safetensors"
    """Name of the packed file in the run's folder."""

    def __post_init__(self) -> None:
        if self.density != "auto" and not (isinstance(self.density, (int, float)) and 0 < self.density <= 1):
            raise RecipeError(f"`density` of compeft is {self.density!r}; give a share of entries above 0 and up to 1, or 'auto'.")
        if self.alpha != "auto" and not (isinstance(self.alpha, (int, float)) and self.alpha > 0):
            raise RecipeError(f"`alpha` of compeft is {self.alpha!r}; give a positive number or 'auto'.")
        self.report: dict[str, Any] = {}
        self._start: dict[str, Tensor] = {}

    def attach(self, model: Family, ctx: Context | None = None) -> None:
        """Note where the adapter starts."""
        if self.reference == "init" and _is_adapted(model):
            self._start = {n: t.detach().clone().cpu() for n, t in _adapter(model).items()}

    def state_dict(self) -> dict[str, Any]:
        return {"start": self._start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._start = dict(state["start"])

    def compress(self, model: Any, ctx: Context | None = None) -> Any:
        if isinstance(model, Mapping):
            self._refuse_auto()
            update = {n: torch.as_tensor(model[n]) for n in model}
            done = compeft(update, float(self.density), float(self.alpha), self.mode, self.ties)
            self._account(done, update, {}, ctx)
            return done
        return self._adapted(model, ctx) if _is_adapted(model) else self._whole(model, ctx)

    def _refuse_auto(self) -> None:
        if "auto" in (self.density, self.alpha):
            raise RecipeError("`auto` needs a model and validation rows to choose on; a bare update needs numbers for `density` and `alpha`.")

    def _shrink(self, update: Mapping[str, Tensor], density: float, alpha: float) -> dict[str, Tensor]:
        """Updates of models come in wide; signs need no more than fp32."""
        done = compeft(update, density, alpha, self.mode, self.ties)
        return done if self.mode == "prune" else {n: t.float() if t.is_floating_point() else t for n, t in done.items()}

    def _adapted(self, model: Family, ctx: Context | None) -> Family:
        """A peft model: its adapter's tensors."""
        tensors = {n: t.detach() for n, t in _adapter(model).items()}
        kept, rest = self._split(tensors, model)
        start = self._references(model, kept)
        update = {n: t.to(_wide(t)) - start[n].to(t.device, _wide(t)) for n, t in kept.items()}
        twin = model.frozen_copy()

        def put(change: Mapping[str, Tensor]) -> Family:
            from peft import set_peft_model_state_dict

            values = {n: (start[n].to(change[n]) + change[n]).to(t.dtype) for n, t in kept.items()}
            set_peft_model_state_dict(twin.network, values | rest, adapter_name=_active(twin))
            return twin

        done = self._choose(update, lambda change: TensorSource.of(put(change)), ctx)
        self._account(done, kept, rest, ctx)
        return put(done)

    def _references(self, model: Family, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.reference == "init":
            if set(tensors) - set(self._start):
                raise RecipeError("`reference: init` measures from where training began, which was not noted; use it within a run, or `reference: zero`.")
            return self._start
        return {n: torch.ones_like(t) if "ia3_" in n else torch.zeros_like(t) for n, t in tensors.items()}

    def _whole(self, model: Family, ctx: Context | None) -> Family:
        """A model tuned whole: its difference to the base."""
        if ctx is None or not ctx.has_model("base"):
            raise RecipeError("Compressing a whole model needs the base it was tuned from; compress an adapter, or run it in a recipe.")
        base, tuned = TensorSource.of(ctx.model("base")), TensorSource.of(model)
        change = delta(base, tuned, self.skip, wide=True)
        update = {n: change[n] for n in change.distinct if change[n].is_floating_point()}
        rest = {n: tuned[n] for n in tuned.distinct if n not in update}
        twin = model.frozen_copy()

        def put(done: Mapping[str, Tensor]) -> TensorSource:
            merged = applied(base, done)
            return TensorSource(tuned, lambda n: rest[n] if n in rest else merged[base.aliases.get(n, n)].to(tuned[n].dtype), tuned.meta, tuned.aliases)

        done = self._choose(update, put, ctx)
        twin.network.load_state_dict(dict(put(done)))
        self._account(done, {n: tuned[n] for n in update}, rest, ctx)
        return twin

    def _split(self, tensors: Mapping[str, Tensor], model: Family) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The adapter's own tensors; and whole tensors saved along with it, which have no small reference."""
        prefix = getattr(model.network.base_model, "prefix", "")
        rest = {n: t for n, t in tensors.items() if left_out(n, self.skip) or not t.is_floating_point() or prefix not in n}
        return {n: t for n, t in tensors.items() if n not in rest}, rest

    def _choose(self, update: Mapping[str, Tensor], put: Any, ctx: Context | None) -> dict[str, Tensor]:
        """The compressed update; density and alpha by validation score where they are `auto`."""
        densities: Iterable[Any] = self.densities if self.density == "auto" else [self.density]
        alphas: SequenceOf[Any] = self.alphas if self.alpha == "auto" and self.mode == "ternary" else [1.0 if self.alpha == "auto" else self.alpha]
        grid = [(float(k), float(a)) for k in densities for a in alphas]
        if len(grid) == 1:
            return self._shrink(update, *grid[0])
        if ctx is None:
            raise RecipeError("`auto` chooses on validation rows; add `data: {val: FILE}` or give `density` and `alpha` as numbers.")
        tried = [{"density": k, "alpha": a, "score": ctx.score(put(self._shrink(update, k, a)))} for k, a in grid]
        best = max(tried, key=lambda t: t["score"])
        self.report = {"density": best["density"], "alpha": best["alpha"], "tried": tried}
        return self._shrink(update, best["density"], best["alpha"])

    def _account(self, done: Mapping[str, Tensor], given: Mapping[str, Tensor], rest: Mapping[str, Tensor], ctx: Context | None) -> None:
        """Count what is stored, and write it where there is a folder. What is kept as it is counts on both sides."""
        vector = vector_of(done)
        total = sum(t.numel() for t in vector.values())
        kept = sum(int(t.count_nonzero()) for t in vector.values())
        beside = {**rest, **{n: t for n, t in done.items() if n not in vector}}
        raw = _bytes(beside)
        before = sum(given[n].numel() * given[n].element_size() for n in vector) + raw
        report: dict[str, Any] = {"entries": total, "kept": kept, "bytes_before": before}
        if self.mode == "prune":
            after = sum(int(t.count_nonzero()) * (given[n].element_size() + 4) for n, t in vector.items()) + raw
        else:
            packed = encode(vector)
            after = (packed.bits + 7) // 8 + raw
            report |= {"entropy_bound_bytes": packed.entropy_bound / 8 + raw, "magnitude": packed.magnitude, "bits_per_entry": packed.bits / max(1, total)}
            if ctx is not None and ctx.folder is not None:
                path = ctx.folder / self.file
                save_packed(packed, path, beside)
                report |= {"file": str(path), "file_bytes": path.stat().st_size}
        self.report |= report | {"bytes_after": after, "ratio": before / max(1, after)}


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _is_adapted(model: Any) -> bool:
    return hasattr(getattr(model, "network", None), "peft_config")


def _adapter(model: Family) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model.network, adapter_name=_active(model))


def _active(model: Family) -> str:
    return next(iter(model.network.active_adapters))
