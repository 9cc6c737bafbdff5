"""The models that a merge combines, as lazily read tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from luthier.core.models import load
from luthier.core.places import Place, place_of
from luthier.core.source import TensorSource
from luthier.errors import ModelError

if TYPE_CHECKING:
    from luthier.core.families import Family


class Sources:
    """Models as tensors under one network's names and in its type, read from their folders when they are asked for.

    A model is loaded whole only where its folder holds it in another form: on the hub, as GGUF, under other names, or as an adapter
    that is no plain product."""

    def __init__(self, like: Family) -> None:
        self.dtype = like.dtype
        self.names = {n: t for n, t in like.network.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
        self.known: dict[str, TensorSource] = {}

    def of(self, spec: Any) -> TensorSource:
        if hasattr(spec, "network"):
            return TensorSource.of(spec)
        place = place_of(spec["id"] if isinstance(spec, Mapping) else spec)
        if place.source not in self.known:
            self.known[place.source] = self._read(place) or TensorSource.of(load(spec, device="cpu"))
        return self.known[place.source]

    def _read(self, place: Place) -> TensorSource | None:
        if place.path is None or place.gguf is not None:
            return None
        if place.kind == "model":
            found = TensorSource.of(place.path)
            return self._cast(found) if self._fits(found) else None
        named = json.loads((place.path / "adapter_config.json").read_text()).get("base_model_name_or_path")
        try:
            return TensorSource.of(place.path, self.of(named)) if named else None
        except ModelError:  # no plain LoRA, or of another model: peft merges it, or says what is wrong
            return None

    def _fits(self, found: TensorSource) -> bool:
        have = {id(t) for n, t in self.names.items() if n in found}
        return all(n in self.names for n in found) and all(id(t) in have for t in self.names.values())

    def _cast(self, found: TensorSource) -> TensorSource:
        def cast(t: Tensor) -> Tensor:
            return t.to(self.dtype) if t.is_floating_point() else t

        def meta(name: str) -> Any:
            known = found.meta(name)
            return known and (known[0], self.dtype if known[1].is_floating_point else known[1])

        return TensorSource(found, lambda name: cast(found[name]), meta, found.aliases)
