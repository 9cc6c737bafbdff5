"""PV-Tuning's model: weights as codes into small codebooks, which `optimize: pv-tuning` then tunes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from luthier.adapt._shared import unwrapped, validate
from luthier.catalog import register
from luthier.compress import Compressor
from luthier.core.context import seed_of
from luthier.core.modelmap import ModelMap
from luthier.core.plugin import Group, Parts, Step
from luthier.core.quant import VectorQuant, code_bits, pack_codes, unpack_codes
from luthier.core.source import left_out
from luthier.core.tensorfile import open_checkpoint, write_file
from luthier.errors import ModelError, RecipeError

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family

__all__ = ["PVTuning", "load_packed", "pv_tuning"]


def pv_tuning(weight: Tensor, group: int = 8, codes: int = 256, codebooks: int = 2, seed: int = 0) -> VectorQuant:
    """A matrix as codes: w[o, g] = scale[o] sum_c codebook_c[code_c[o, g]], by k-means of the groups of `group` inputs."""
    return VectorQuant.fit(weight, group, codes, codebooks, seed)


@register("pv-tuning", paper=71)
@dataclass
class PVTuning(Compressor):
    """Hold every linear layer of the blocks as codes into its own codebooks, at one to three bits a weight, and tune it in that form, so that
    it fits: with `optimize: pv-tuning` codes, codebooks and scales move; with any other optimizer the codes rest.

    w[o, g] = scale[o] sum_{c=1..C} codebook_c[code_c[o, g]], g a group of consecutive inputs; log2(K) C / group bits a weight, and the codebooks.
    It starts from k-means of the rows' groups, each over its row's root mean square (the paper starts from any quantiser, AQLM's best),
    and each further codebook from what is left. The gradient of a weight becomes the codebooks' by summing over all that use an entry, before
    anything is clipped; after each step the weights are what the codes say.

    Defaults: the released 2-bit form with two codebooks of 256 entries and groups of 8 (one of 65536 is slower and a little better); groups
    of 16 with one of 65536 give one bit. Embeddings, heads, norms and biases stay as they are and train with `adapt: full`; their bits are in the
    reported size. The paper trains on the KL to the unquantised model, which `ctx.model("stage")` is; any objective will do. The result
    is a plain network with the decoded weights; the packed codes lie in the run's folder, and `load_packed` reads them."""

    group: int = 8
    """Consecutive inputs that share a code."""
    codes: int = 256
    """Entries of a codebook."""
    codebooks: int = 2
    """Codebooks that are added up."""
    skip: list[str] = field(default_factory=list)
    """Layers to keep as they are: names, leading parts of names, or globs."""
    file: str = "pv_tuning.safetensors"
    """Name of the packed file in the run's folder."""

    parallel = frozenset({"single", "ddp"})
    toy = {"group": 4, "codes": 8, "codebooks": 1}

    def __post_init__(self) -> None:
        validate(self, ("group", "codebooks"))
        if not 2 <= self.codes <= 65536:
            raise RecipeError(f"`codes` of pv-tuning is {self.codes!r}; give 2 to 65536 entries a codebook.")
        self.report: dict[str, Any] = {}
        self._layers: dict[str, tuple[nn.Linear, VectorQuant]] = {}
        self._network: Any = None

    def check(self, recipe: Any) -> str | None:
        if any(c.method != "full" for c in getattr(recipe, "adapt", None) or []):
            return "'pv-tuning' moves the network's own weights as codes; use `adapt: full`."
        return None

    # training -----------------------------------------------------------------------------------------------------------
    def attach(self, model: Family, ctx: Context | None = None) -> Parts:
        unwrapped(model, self.name)
        self._network, self._layers = model.base_network, {}
        for name, layer in self._targets(model.base_network, ctx).items():
            quant = pv_tuning(layer.weight, self.group, self.codes, self.codebooks, seed_of(ctx.seed if ctx else 0, name) % 2**31)
            self._layers[name] = (layer, quant.to(layer.weight.device))
        self._decode()
        held = nn.ModuleDict({name.replace(".", "/"): quant for name, (_, quant) in self._layers.items()})
        weights: dict[str, nn.Parameter] = {f"{name}.weight": layer.weight for name, (layer, _) in self._layers.items()}  # type: ignore[misc]
        groups = [
            Group("codes", weights, options={"quantised": {n.removesuffix(".weight"): self._layers[n.removesuffix(".weight")][1] for n in weights}}),
            Group("codebook", {f"{n}.codebooks": q.codebooks for n, (_, q) in self._layers.items()}),
            Group("codebook", {f"{n}.scales": q.scales for n, (_, q) in self._layers.items()}),
        ]
        return Parts(groups, {"pv_tuning": held})

    def _targets(self, network: Any, ctx: Context | None) -> dict[str, nn.Linear]:
        linears = {n: m for n, m in ModelMap(network).linears().items() if isinstance(m, nn.Linear) and not left_out(n, self.skip)}
        fit = {n: m for n, m in linears.items() if m.in_features % self.group == 0}
        if not fit:
            raise ModelError(f"'pv-tuning' found no linear layer in the blocks of {type(network).__name__} whose inputs are a multiple of `group: {self.group}`.")
        if len(fit) < len(linears) and ctx is not None:
            ctx.notice(f"{len(linears) - len(fit)} of {len(linears)} layers keep their weights: their inputs are no multiple of `group: {self.group}`.")
        return fit

    @torch.no_grad()
    def _decode(self) -> None:
        """The weights become what the codes say."""
        for layer, quant in self._layers.values():
            layer.weight.copy_(quant())

    def after_backward(self, step: Step, ctx: Context | None) -> None:
        """Hand the weights' gradients on to codebooks and scales; an optimizer that cannot move codes does not see the weights'."""
        codes_move = getattr(step.optimizer, "moves_codes", False)
        for layer, quant in self._layers.values():
            if layer.weight.grad is not None:
                quant.chain(layer.weight.grad)
                if not codes_move:
                    layer.weight.grad = None

    def after_step(self, step: Step, ctx: Context | None) -> None:
        self._decode()

    # the result ---------------------------------------------------------------------------------------------------------
    def compress(self, model: Any, ctx: Context | None = None) -> Any:
        if isinstance(model, Mapping):
            return {n: self._coded(torch.as_tensor(t)) for n, t in model.items()}
        if self._network is None or self._network is not model.base_network:
            model = model.frozen_copy()
            self.attach(model, ctx)
        for name, (layer, quant) in self._layers.items():
            if not torch.allclose(quant().to(layer.weight.dtype), layer.weight, atol=1e-6):  # merged with others since it was trained
                self._layers[name] = (layer, pv_tuning(layer.weight, self.group, self.codes, self.codebooks))
        self._decode()
        self._write(model, ctx)
        return model

    @torch.no_grad()
    def _coded(self, tensor: Tensor) -> Tensor:
        """A matrix decoded from its codes; what has no groups stays."""
        if tensor.ndim != 2 or not tensor.is_floating_point() or tensor.shape[1] % self.group:
            return tensor.clone()
        return pv_tuning(tensor, self.group, self.codes, self.codebooks)().detach().to(tensor.dtype)

    def _write(self, model: Family, ctx: Context | None) -> None:
        """Count what is stored, and write it where there is a folder: packed codes, codebooks and scales in half precision, all else as it is."""
        network = self._network
        bits = code_bits(self.codes)
        stored: dict[str, Tensor] = {}
        for name, (_, quant) in self._layers.items():
            stored |= {f"{name}.codes": pack_codes(quant.codes, bits), f"{name}.codebooks": quant.codebooks.detach().half(), f"{name}.scales": quant.scales.detach().half()}
        own = {f"{name}.weight" for name in self._layers}
        seen: set[int] = set()
        for name, tensor in network.state_dict().items():
            if name not in own and tensor.data_ptr() not in seen:  # tied weights are stored once
                seen.add(tensor.data_ptr())
                stored[name] = tensor.detach()
        numbers = sum(layer.weight.numel() for layer, _ in self._layers.values())
        coded = sum(quant.bits() for _, quant in self._layers.values())
        before = sum(p.numel() * p.element_size() for p in network.parameters())
        after = sum(t.numel() * t.element_size() for t in stored.values())
        self.report |= {"layers": len(self._layers), "bits_per_weight": coded / numbers, "bytes_before": before, "bytes_after": after, "ratio": before / after}
        if ctx is not None and ctx.folder is not None:
            path, shapes = ctx.folder / self.file, json.dumps({n: list(q.codes.shape) for n, (_, q) in self._layers.items()})
            write_file(path, {n: t.cpu().contiguous() for n, t in stored.items()}, {"format": "pv-tuning", "bits": str(bits), "shapes": shapes})
            self.report |= {"file": str(path), "file_bytes": path.stat().st_size}


def load_packed(path: Any) -> dict[str, Tensor]:
    """The tensors of a packed file, weights decoded."""
    files = open_checkpoint(path)
    bits, shapes, out = int(files.metadata()["bits"]), json.loads(files.metadata()["shapes"]), {}
    for name in files.where:
        layer, _, kind = name.rpartition(".")
        if kind == "codes":
            books, scales = files.read(f"{layer}.codebooks").float(), files.read(f"{layer}.scales").float()
            codes = unpack_codes(files.read(name), bits, math.prod(shapes[layer])).reshape(shapes[layer])
            out[f"{layer}.weight"] = VectorQuant(books, scales, codes)().detach()
        elif kind not in ("codebooks", "scales"):
            out[name] = files.read(name)
    return out
