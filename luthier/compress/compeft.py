"""ComPEFT: an update as signs of its largest entries and one number."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from luthier.catalog import register
from luthier.compress import Compressor
from luthier.compress._shared import entropy_bits, rice_bits, rice_decode, rice_encode, rice_parameter
from luthier.core.source import TensorSource, applied, delta
from luthier.core.sparse import Cut, cut
from luthier.core.tensorfile import DTYPES, open_checkpoint, write_file
from luthier.errors import ModelError, RecipeError

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family

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
    vector = _vector(update)
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


def _vector(update: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: update[n] for n in sorted(update) if update[n].is_floating_point()}


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype in (torch.float32, torch.float64) else torch.float32


def _largest(vector: Mapping[str, Tensor], density: float, ties: Ties) -> Cut:
    d = sum(t.numel() for t in vector.values())
    sizes = {n: t.abs() for n, t in vector.items()}
    k = int(density * d)
    if ties == "exact":
        return cut(sizes, k)
    # The release takes the (d - k)-th smallest magnitude as the threshold, that is the (k + 1)-th largest.
    return Cut(cut(sizes, k + 1).threshold)


def _kept_mean(vector: Mapping[str, Tensor], keep: Cut) -> float:
    total = number = 0.0
    for name, tensor in vector.items():
        kept = tensor.abs()[keep.mask(name, tensor.abs())]
        total, number = total + float(kept.double().sum()), number + kept.numel()
    return total / number if number else 0.0


# packing ------------------------------------------------------------------------------------------------------------------
@dataclass
class Packed:
    """A ternary update in few bits: Golomb-Rice coded gaps between its non-zeros, one sign bit each, one magnitude."""

    names: list[str]
    shapes: list[tuple[int, ...]]
    dtypes: list[str]
    magnitude: float
    count: int
    """Non-zero entries."""
    low: int
    """The code's parameter: low bits of every gap."""
    unary: np.ndarray
    rest: np.ndarray
    signs: np.ndarray
    code_bits: int
    """Bits of gaps and signs before padding to bytes."""

    @property
    def total(self) -> int:
        """Entries, zeros included."""
        return sum(math.prod(s) for s in self.shapes)

    @property
    def bits(self) -> int:
        """Gaps, signs and the magnitude (as 16 bits, the way the paper counts)."""
        return self.code_bits + 16

    @property
    def entropy_bound(self) -> float:
        """Bits that an independent ternary vector of this density and length needs, and 16 for the magnitude."""
        return entropy_bits(self.count / self.total) * self.total + 16 if self.total else 16.0


def encode(update: Mapping[str, Tensor]) -> Packed:
    """Pack an update whose entries are all -a, 0 or a. `decode` gives it back bit for bit."""
    vector = _vector(update)
    size = _magnitude(vector)
    places, signs, at = [], [], 0
    for name, tensor in vector.items():
        flat = tensor.detach().cpu().reshape(-1)
        index = flat.nonzero()[:, 0]
        values = flat[index]
        if bool((values.abs() != torch.tensor(size, dtype=torch.float64).to(flat.dtype)).any()):
            raise ModelError(f"'{name}' holds more than one magnitude, so it is not a ternary update; compress it first.")
        places.append(index.numpy() + at)
        signs.append((values < 0).numpy())
        at += flat.numel()
    place = np.concatenate(places) if places else np.zeros(0, np.int64)
    gaps = np.diff(place, prepend=-1) - 1
    low = rice_parameter(len(place) / at if at else 0.0)
    unary, rest = rice_encode(gaps, low)
    return Packed(
        list(vector), [tuple(t.shape) for t in vector.values()], [_CODES[t.dtype] for t in vector.values()], size, len(place), low,
        unary, rest, np.packbits(np.concatenate(signs) if signs else np.zeros(0, bool)), rice_bits(gaps, low) + len(place),
    )  # fmt: skip


def decode(packed: Packed) -> dict[str, Tensor]:
    """The update that was packed."""
    gaps = rice_decode(packed.unary, packed.rest, packed.low, packed.count)
    place = np.cumsum(gaps + 1) - 1
    if len(packed.signs) * 8 < packed.count or (packed.count and int(place[-1]) >= packed.total):
        raise ValueError("The coded positions reach beyond the tensors.")
    negative = np.unpackbits(packed.signs, count=packed.count).astype(bool)
    update, at = {}, 0
    for name, shape, code in zip(packed.names, packed.shapes, packed.dtypes):
        n = math.prod(shape)
        first, last = np.searchsorted(place, [at, at + n])
        flat = torch.zeros(n, dtype=DTYPES[code])
        size = torch.tensor(packed.magnitude, dtype=torch.float64).to(flat.dtype)
        flat[torch.from_numpy(place[first:last] - at)] = torch.where(torch.from_numpy(negative[first:last]), -size, size)
        update[name] = flat.reshape(shape)
        at += n
    return update


def _magnitude(vector: Mapping[str, Tensor]) -> float:
    """The one magnitude, read where it is stored most precisely."""
    found = [(t.dtype.itemsize, float(t.abs().max())) for t in vector.values() if t.numel() and bool(t.any())]
    return max(found, key=lambda f: f[0])[1] if found else 0.0


_CODES = {dtype: code for code, dtype in DTYPES.items()}


def save_packed(packed: Packed, path: str | Path, extra: Mapping[str, Tensor] | None = None) -> None:
    """Write a packed update as a safetensors file; `extra` are tensors to store beside it as they are."""
    about = {k: getattr(packed, k) for k in ("names", "shapes", "dtypes", "magnitude", "count", "low", "code_bits")}
    streams = {f"packed.{k}": torch.from_numpy(getattr(packed, k)) for k in ("unary", "rest", "signs")}
    write_file(Path(path), {**streams, **{f"raw.{n}": t for n, t in (extra or {}).items()}}, {"format": "compeft", "about": json.dumps(about)})


def load_packed(path: str | Path) -> dict[str, Tensor]:
    """The update in a file that `save_packed` wrote, and what was stored beside it."""
    files = open_checkpoint(Path(path))
    try:
        about = json.loads(files.metadata()["about"])
        streams = {k: files.read(f"packed.{k}").numpy() for k in ("unary", "rest", "signs")}
        packed = Packed(**{**about, "shapes": [tuple(map(int, s)) for s in about["shapes"]]}, **streams)
        update = decode(packed)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path} is not a packed update: {error}.") from error
    return update | {name.removeprefix("raw."): files.read(name) for name in files.where if name.startswith("raw.")}


@dataclass
class Masks:
    """A ternary update as two bit masks, for products of updates without unpacking them."""

    plus: np.ndarray
    minus: np.ndarray
    magnitude: float

    @classmethod
    def of(cls, update: Mapping[str, Tensor]) -> Masks:
        vector = _vector(update)
        flat = torch.cat([t.detach().cpu().reshape(-1).sign().to(torch.int8) for t in vector.values()]).numpy()
        return cls(np.packbits(flat > 0), np.packbits(flat < 0), _magnitude(vector))

    def dot(self, other: Masks) -> float:
        """The inner product, by AND and counting bits."""
        agree = _ones(self.plus & other.plus) + _ones(self.minus & other.minus)
        return (agree - _ones(self.plus & other.minus) - _ones(self.minus & other.plus)) * self.magnitude * other.magnitude

    def differing(self, other: Masks) -> int:
        """How many entries have another sign, by XOR and counting bits."""
        return _ones((self.plus ^ other.plus) | (self.minus ^ other.minus))


def _ones(bits: np.ndarray) -> int:
    return int(np.bitwise_count(bits).sum(dtype=np.int64))


# the method ---------------------------------------------------------------------------------------------------------------
@register("compeft", paper=63)
@dataclass
class ComPEFT(Compressor):
    """Store only the signs of an update's largest entries and one shared magnitude: 8 to 50 times smaller, without training, and often as good.

    tau = theta - reference over all trained tensors as one vector; keep the int(density d) entries of largest magnitude; each becomes
    alpha * sigma * sign, sigma = std(tau) before anything is cut; theta' = reference + that. `compress` of a mapping takes it as the
    update itself. Of a peft model it takes the adapter's tensors, with reference 0 as released ((IA)^3 vectors: 1), A and B alike, or
    with `reference: init` what they were when training began; of any other model the difference to `ctx.model("base")`. The result is
    a model of the same kind; the packed file (Golomb-Rice gaps and sign bits) lies in the run's folder and `load_packed` reads it.

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
            done = self._shrink(update, float(self.density), float(self.alpha))
            self._account(done, update, {}, ctx)
            return done
        return self._adapted(model, ctx) if _is_adapted(model) else self._whole(model, ctx)

    def _refuse_auto(self) -> None:
        if "auto" in (self.density, self.alpha):
            raise RecipeError("`auto` needs a model and validation rows to choose on; a bare update needs numbers for `density` and `alpha`.")

    def _shrink(self, update: Mapping[str, Tensor], density: float, alpha: float) -> dict[str, Tensor]:
        return compeft(update, density, alpha, self.mode, self.ties)

    def _adapted(self, model: Family, ctx: Context | None) -> Family:
        """A peft model: its adapter's tensors."""
        tensors = {n: t.detach() for n, t in _adapter(model).items()}
        kept, rest = self._split(tensors)
        start = self._references(model, kept)
        update = {n: t.to(_wide(t)) - start[n].to(t.device, _wide(t)) for n, t in kept.items()}
        twin = model.frozen_copy()

        def put(change: Mapping[str, Tensor]) -> Family:
            from peft import set_peft_model_state_dict

            set_peft_model_state_dict(twin.network, {n: (start[n].to(change[n]) + change[n]).to(t.dtype) for n, t in kept.items()} | rest)
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

    def _split(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        from luthier.core.source import left_out

        rest = {n: t for n, t in tensors.items() if left_out(n, self.skip) or not t.is_floating_point()}
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
        vector = _vector(done)
        total = sum(t.numel() for t in vector.values())
        kept = sum(int(t.count_nonzero()) for t in vector.values())
        beside = {**rest, **{n: t for n, t in done.items() if n not in vector}}
        raw = _bytes(beside)
        before = sum(given[n].numel() * given[n].element_size() for n in vector) + raw
        report = {"entries": total, "kept": kept, "bytes_before": before}
        if self.mode == "prune":
            after = sum(int(t.count_nonzero()) * (given[n].element_size() + 4) for n, t in vector.items()) + raw
        else:
            packed = encode(vector)
            after = (packed.bits + 7) // 8 + raw
            report |= {"entropy_bound_bytes": packed.entropy_bound / 8 + raw, "magnitude": packed.magnitude, "bits_per_entry": packed.bits / max(1, total)}
            if ctx is not None and ctx.folder is not None:
                save_packed(packed, ctx.folder / self.file, beside)
                report["file"] = str(ctx.folder / self.file)
        self.report |= report | {"bytes_after": after, "ratio": before / max(1, after)}


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _is_adapted(model: Any) -> bool:
    return hasattr(getattr(model, "network", None), "peft_config")


def _adapter(model: Family) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model.network)
