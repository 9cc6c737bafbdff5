"""Checkpoints as lazy mappings: a `TensorSource` reads or computes a tensor when it is asked for, so mergers stream and chain.

`delta` and `applied` are the two ends of every merger: the update of a fine-tune, and a base with an update added. Half-precision
tensors accumulate in fp32; a `wide` delta of fp32 tensors is kept in fp64, where base + (tuned - base) gives the tuned tensor back
exactly. Results have the base's types. Integer tensors are never averaged: they are the base's.

What goes entry by entry can be read in blocks of rows (`pieces`, see `windows`): then not even one large tensor is held.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from luthier.core.quiet import folded
from luthier.core.tensorfile import TensorFiles, open_checkpoint, write_file, write_folder
from luthier.core.windows import BLOCK, cut_out, renamed, shape_here, whole, window, windows
from luthier.errors import ModelError

Meta = tuple[tuple[int, ...], torch.dtype]
SHARD = 5_000_000_000


class TensorSource(Mapping[str, Tensor]):
    """Named tensors, each read or computed when asked for. `dict(source)` holds them all."""

    def __init__(
        self,
        names: Iterable[str],
        read: Callable[[str], Tensor],
        meta: Callable[[str], Meta | None] | None = None,
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        self._names = dict.fromkeys(names)
        self._read, self._meta = read, meta
        self.aliases = dict(aliases or {})
        """Names of tied tensors, with the name under which the same tensor comes first."""
        self.base: TensorSource | None = None
        self.update: TensorSource | None = None
        """Where this is `base` plus a known update (a LoRA folder): that update, free of cancellation."""
        self.by_rows = False
        """Whether rows of a tensor can be computed without the others, so that `pieces` may ask for blocks of them."""

    @classmethod
    def of(cls, x: Any, base: Any = None) -> TensorSource:
        """A state dict, a family or module, a path, or a source as it is. A LoRA folder needs its `base`."""
        if isinstance(x, TensorSource):
            return x
        if isinstance(x, Mapping):
            return _of_mapping(x)
        if isinstance(x, (str, Path)):
            return _of_path(Path(x).expanduser(), base)
        network = x if isinstance(x, nn.Module) else getattr(x, "network", None)
        if isinstance(network, nn.Module):
            return _of_network(network)
        raise ModelError(f"A {type(x).__name__} is no checkpoint; give a state dict, a model, or a path to safetensors files.")

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def meta(self, name: str) -> Meta | None:
        """Shape and type of a tensor where they are known without reading it."""
        return None if self._meta is None else self._meta(name)

    @property
    def distinct(self) -> list[str]:
        """The names, each tied tensor once."""
        return [name for name in self._names if name not in self.aliases]

    def pieces(self, name: str, block: int = BLOCK) -> Iterator[Tensor]:
        """A tensor from its first row to its last, in blocks of about so many entries where that is possible."""
        meta = self.meta(name) if self.by_rows else None
        parts = windows(name, meta[0], block) if meta is not None else []
        if meta is None or not parts:
            with whole():
                piece = self[name]
            yield piece
        for part in parts:
            with window(*part):
                piece = self._read(name)
            if tuple(piece.shape) != (part.stop - part.start, *meta[0][1:]):  # type: ignore[index]
                raise ModelError(f"The tensor '{name}' cannot be computed in blocks of rows; this is an error of the merger, which says `by_rows`.")
            yield piece

    def map(self, function: Callable[[Tensor], Tensor], entrywise: bool = False) -> TensorSource:
        """The function of every tensor, computed when asked for. `entrywise`: each entry of it depends on that entry alone."""
        made = self.map_named(lambda _, tensor: function(tensor))
        if entrywise:
            made._meta, made.by_rows = self._meta, self.by_rows
        return made

    def map_named(self, function: Callable[[str, Tensor], Tensor]) -> TensorSource:
        """Like `map`, for a function of name and tensor."""
        return TensorSource(self._names, lambda name: function(name, self._read(name)), aliases=self.aliases)

    def only(self, names: Iterable[str]) -> TensorSource:
        """Some of the tensors, in the given order."""
        kept = dict.fromkeys(names)
        some = TensorSource(kept, self._read, self._meta, {k: v for k, v in self.aliases.items() if k in kept and v in kept})
        some.by_rows = self.by_rows
        return some

    def save(self, path: str | Path, max_shard_bytes: int = SHARD, progress: Callable[[int, int, str], None] | None = None, identity: str = "") -> list[Path]:
        """Write safetensors, computing one tensor at a time; tied tensors are written once.

        `path` is a file (`.safetensors`) or a folder, whose file is split into shards with an index where it would grow beyond
        `max_shard_bytes`. `progress(done, total, name)` hears of every tensor. Nothing incomplete ever bears a final name. With an
        `identity` of what is written, shards that an interrupted save of the same finished are not written again."""
        path = Path(path)
        if path.suffix == ".safetensors":
            write_file(path, self.only(self.distinct), {"format": "pt"})
            return [path]
        return write_folder(path, self, self.distinct, max_shard_bytes, progress, identity)


# readers ----------------------------------------------------------------------------------------------------------------
def _of_mapping(x: Mapping[str, Any]) -> TensorSource:
    def read(name: str) -> Tensor:
        value = x[name]
        return cut_out(name, value.detach() if isinstance(value, Tensor) else torch.as_tensor(value))

    # Other mappings may compute their values, so only plain state dicts are looked into.
    if not type(x).__module__.startswith(("builtins", "collections")):
        return _by_rows(TensorSource(x, read))
    names = [name for name, value in x.items() if isinstance(value, Tensor) or hasattr(value, "__array__")]
    tensors: dict[str, Tensor] = {name: x[name] for name in names if isinstance(x[name], Tensor)}

    def meta(name: str) -> Meta | None:
        return (tuple(tensors[name].shape), tensors[name].dtype) if name in tensors else None

    return _by_rows(TensorSource(names, read, meta, _tied(tensors)))


def _by_rows(source: TensorSource, may: bool = True) -> TensorSource:
    source.by_rows = may
    return source


def _tied(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Names whose tensor is the very same memory as an earlier name's."""
    first: dict[tuple[Any, ...], str] = {}
    tied = {}
    for name, tensor in tensors.items():
        if tensor.numel() == 0 or tensor.device.type == "meta" or tensor.layout != torch.strided:
            continue
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if first.setdefault(key, name) != name:
            tied[name] = first[key]
    return tied


def _of_network(network: nn.Module) -> TensorSource:
    """A network's tensors under the names of the plain model: what peft put around it is merged in, in a copy."""
    configs: dict[str, Any] | None = getattr(network, "peft_config", None)
    if configs is None:
        return _of_mapping(dict(network.state_dict()))
    if any(getattr(c, "is_prompt_learning", False) for c in configs.values()):
        raise ModelError("Prompts, prefixes and the like are not part of a model's weights, so this adapter cannot be merged into them.")
    return _of_mapping(dict(folded(copy.deepcopy(network)).state_dict()))


def _of_path(path: Path, base: Any) -> TensorSource:
    if (path / "adapter_config.json").is_file():
        if base is None:
            raise ModelError(f"{path} is an adapter, not a whole model; give the base model it was trained on as well.")
        base = TensorSource.of(base)
        update = lora_delta(path, base)
        source = applied(base, update)
        source.base, source.update = base, update
        return source
    files = open_checkpoint(path)
    return _by_rows(TensorSource(files.where, lambda name: cut_out(name, files.read(name)), files.meta))


# LoRA folders -----------------------------------------------------------------------------------------------------------
def lora_delta(folder: str | Path, base: Any) -> TensorSource:
    """A peft LoRA folder as updates of the base's tensors: scale * B A under the base's names, zeros elsewhere.

    Merging A and B separately is another thing (the mean of products is not the product of means), so they never leave here."""
    base, folder = TensorSource.of(base), Path(folder)
    config = _lora_config(folder)
    files = open_checkpoint(folder / "adapter_model.safetensors")
    parts: dict[str, dict[str, str]] = {}
    for key in files.where:
        target, role = _lora_part(key)
        if target not in base:
            raise ModelError(f"The adapter {folder} changes '{target}', which the base model does not have.")
        parts.setdefault(target, {})[role] = key

    def read(name: str) -> Tensor:
        meta = base.meta(name)
        found = parts.get(base.aliases.get(name, name)) or parts.get(name)
        if found is None:
            return torch.zeros(base[name].shape if meta is None else shape_here(name, meta[0]))
        with whole():  # a product of other shapes might be rounded otherwise
            change = product(name, found)
        return cut_out(name, change)

    def product(name: str, found: Mapping[str, str]) -> Tensor:
        meta = base.meta(name)
        shape = meta[0] if meta is not None else tuple(base[name].shape)
        low = {role: key for role, key in found.items() if role != "whole"}
        pieces = [_product(low, files, config, name.removesuffix(".weight").removesuffix(".bias"))] if low else []
        pieces += [files.read(found["whole"]).float()] if "whole" in found else []
        if any(tuple(piece.shape) != tuple(shape) for piece in pieces):
            raise ModelError(f"The adapter {folder} is made for a '{name}' of shape {list(pieces[0].shape)}; the base has {list(shape)}.")
        if "whole" in found:
            pieces[-1] = pieces[-1] - base[name].float()
        return sum(pieces[1:], pieces[0])

    def meta(name: str) -> Meta | None:
        found = base.meta(name)
        return None if found is None else (found[0], torch.float32)

    floating = dict.fromkeys(n for n in base if (m := base.meta(n)) is None or m[1].is_floating_point)
    # A tensor that was saved whole is no longer tied to its twin.
    tied = {k: v for k, v in base.aliases.items() if k in floating and k not in parts}
    return _by_rows(TensorSource(floating, read, meta, tied))


def _lora_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"The adapter's configuration in {folder} cannot be read: {error}.") from error
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        kind = "DoRA" if config.get("use_dora") else config.get("peft_type")
        raise ModelError(f"{folder} is a {kind} adapter; only LoRA has a plain product to merge. Merge it with `merge_and_unload` and save the model.")
    return config


def _lora_part(key: str) -> tuple[str, str]:
    """Which base tensor an adapter tensor belongs to, and as what."""
    name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
    for pattern, suffix, role in (
        (r"\.lora_([AB])\.weight$", ".weight", ""), (r"\.lora_embedding_([AB])$", ".weight", "embedding "), (r"\.lora_(B)\.bias$", ".bias", "bias "),
    ):  # fmt: skip
        found = re.search(pattern, name)
        if found:
            return name[: found.start()] + suffix, role + found.group(1)
    if "lora_" in name:
        raise ModelError(f"The adapter tensor '{key}' is of a LoRA variant that has no plain product; merge it with `merge_and_unload`.")
    return name, "whole"


def _product(found: Mapping[str, str], files: TensorFiles, config: Mapping[str, Any], module: str) -> Tensor:
    parts = {role: files.read(key).float() for role, key in found.items()}
    rank = _for_module(config.get("rank_pattern"), module, config["r"])
    alpha = _for_module(config.get("alpha_pattern"), module, config.get("lora_alpha", rank))
    scale = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
    if "bias B" in parts:
        return parts["bias B"] * scale
    if "embedding A" in parts:
        return (parts["embedding B"] @ parts["embedding A"]).T * scale
    a, b = parts["A"], parts["B"]
    if a.ndim > 2:
        return torch.einsum("or,r...->o...", b.flatten(1), a) * scale
    product = b @ a * scale
    return product.T if config.get("fan_in_fan_out") else product


def _for_module(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


# arithmetic -------------------------------------------------------------------------------------------------------------
def left_out(name: str, skip: Iterable[str]) -> bool:
    """Whether a tensor is named by one of the patterns: a whole name, a leading part of it ("classifier"), or a glob ("*.head.*")."""
    return any(name == p or name.startswith(p + ".") or fnmatchcase(name, p) for p in skip)


def compatible(base: Any, tuned: Any, skip: Iterable[str] = ()) -> None:
    """Refuse two models whose tensors differ in name or (where that is known without reading) in shape, `skip` left aside."""
    base, tuned, skip = TensorSource.of(base), TensorSource.of(tuned), list(skip)
    have, given = _known(base, skip), _known(tuned, skip)
    missing = [n for n in have if n not in given and base.aliases.get(n) not in given and not _twin_in(base, n, given)]
    extra = [n for n in given if n not in have and tuned.aliases.get(n) not in have and not _twin_in(tuned, n, have)]
    other = [n for n in have if n in given and (a := base.meta(n)) and (b := tuned.meta(n)) and a[0] != b[0]]
    if not (missing or extra or other):
        return
    order = {name: i for i, name in enumerate([*base, *extra])}
    first = min([*missing, *extra, *other], key=order.__getitem__)
    how = (
        f"{list(base.meta(first)[0])} in the base, {list(tuned.meta(first)[0])} in the other" if first in other
        else "only in the base" if first in missing else "not in the base"
    )  # fmt: skip
    raise ModelError(
        f"These models cannot be combined: {len(missing)} tensors are only in the base, {len(extra)} only in the other model, "
        f"{len(other)} differ in shape. The first is '{first}' ({how}). If it belongs to a task head, leave it out with `skip`."
    )


def _known(source: TensorSource, skip: list[str]) -> dict[str, None]:
    return {n: None for n in source if not left_out(n, skip)}


def _twin_in(source: TensorSource, name: str, others: Mapping[str, Any]) -> bool:
    """Another name of the same tied tensor is among the others."""
    return any(alias in others for alias, first in source.aliases.items() if first == name)


def aligned(base: TensorSource, tuned: TensorSource, skip: Iterable[str] = ()) -> TensorSource:
    """The tuned model's tensors under the base's names: those left out are the base's, tied ones are found by either name."""
    skip = list(skip)
    compatible(base, tuned, skip)
    twins: dict[str, list[str]] = {}
    for alias, first in base.aliases.items():
        twins.setdefault(first, [first]).append(alias)

    def read(name: str) -> Tensor:
        if left_out(name, skip):
            return base[name]
        group = twins.get(base.aliases.get(name, name), [])
        found = renamed(name, name if name in tuned else next(n for n in group if n in tuned), tuned.__getitem__)
        meta = base.meta(name)
        if meta is not None and tuple(found.shape) != shape_here(name, meta[0]):
            raise ModelError(f"The tensor '{name}' is {list(meta[0])} in the base and {list(found.shape)} in the other model.")
        return found

    return _by_rows(TensorSource(base, read, base.meta, base.aliases), base.by_rows and tuned.by_rows)


def working(dtype: torch.dtype, wide: bool = False) -> torch.dtype:
    """The type to accumulate in: fp32 for smaller types, fp64 for fp64, and for fp32 the one asked for."""
    if dtype == torch.float64 or (wide and dtype == torch.float32):
        return torch.float64
    return torch.float32


def delta(base: Any, tuned: Any, skip: Iterable[str] = (), wide: bool = False) -> TensorSource:
    """tuned - base for every floating tensor that `skip` does not leave out, in fp32 or better.

    Where a type is not known without reading, an integer tensor shows up as integer zeros."""
    base = TensorSource.of(base)
    tuned = TensorSource.of(tuned, base)
    skip = list(skip)
    names = dict.fromkeys(n for n in base if not left_out(n, skip) and ((m := base.meta(n)) is None or m[1].is_floating_point))
    aliases = {k: v for k, v in base.aliases.items() if k in names and v in names}
    if tuned.update is not None and tuned.base is base:
        update = tuned.update
        return TensorSource(names, lambda name: update[name], update.meta, aliases)
    other = aligned(base, tuned, skip)

    def read(name: str) -> Tensor:
        b, t = base[name], other[name]
        if b.shape != t.shape:
            raise ModelError(f"The tensor '{name}' is {list(b.shape)} in the base and {list(t.shape)} in the other model.")
        if not b.is_floating_point():
            return torch.zeros_like(b)
        dtype = working(torch.promote_types(b.dtype, t.dtype) if b.dtype.itemsize > 1 else torch.float32, wide)
        change = t.to(b.device, dtype, copy=True)
        return change.sub_(b if b.dtype.itemsize > 1 else b.to(dtype))  # b is widened in passing, without a copy of it

    def meta(name: str) -> Meta | None:
        found, there = base.meta(name), other.meta(name)
        return None if found is None or there is None else (found[0], working(found[1], wide))

    return _by_rows(TensorSource(names, read, meta, aliases), other.by_rows)


def applied(base: Any, update: Mapping[str, Tensor]) -> TensorSource:
    """base + update, in the base's types; what has no update is a copy of the base's."""
    base = TensorSource.of(base)
    untied = [k for k in base.aliases if isinstance(update, TensorSource) and k in update and k not in update.aliases]

    def read(name: str) -> Tensor:
        b = base[name]
        if name not in update or not b.is_floating_point():
            return b.clone()
        change = update[name]
        dtype = working(torch.promote_types(b.dtype, change.dtype) if b.dtype.itemsize > 1 else change.dtype)
        return (b.to(dtype) + change.to(b.device, dtype)).to(b.dtype)

    made = TensorSource(base, read, base.meta, {k: v for k, v in base.aliases.items() if k not in untied})
    made.by_rows = base.by_rows and isinstance(update, TensorSource) and update.by_rows
    return made
