"""The residual stream of a decoder: who writes into it, who reads it through which norm, and changing its basis without changing the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from luthier.core.modelmap import ModelMap
from luthier.core.quant import Rotation
from luthier.errors import ModelError


@dataclass
class Block:
    """One decoder block. Attention and feed-forward each read through a norm and write back."""

    attention: nn.Module
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    output: nn.Linear
    first: list[nn.Linear]
    """The feed-forward's first layers (gate and up)."""
    down: nn.Linear
    norms: tuple[nn.Module, nn.Module]
    path: str

    @property
    def readers(self) -> list[nn.Linear]:
        return [self.query, self.key, self.value, *self.first]

    @property
    def writers(self) -> list[nn.Linear]:
        return [self.output, self.down]


class Residual:
    """The stream of a language model of the Llama kind: RMS norms before attention and feed-forward, query, key and value apart.

    Other architectures are refused with a sentence, for `who` asks."""

    def __init__(self, model: Any, who: str = "this method") -> None:
        network = getattr(model, "base_network", model)
        self.network: Any = network
        self.who = who
        self.embedding, self.head = network.get_input_embeddings(), network.get_output_embeddings()
        if self.head is None or not isinstance(self.embedding, nn.Embedding):
            raise self._refused("it has no language-model head over plain embeddings")
        where = ModelMap(network)
        self.heads = where.heads
        self.blocks = [self._block(where, i, path, block) for i, (path, block) in enumerate(where.blocks)]
        if not self.blocks:
            raise self._refused("its blocks are not known")
        last = [m for n, m in network.base_model.named_children() if _is_norm(m)]
        if len(last) != 1:
            raise self._refused("it has no norm of its own behind the last block")
        self.last_norm = last[0]
        for norm in self.norms:
            self._check(norm)

    def _block(self, where: ModelMap, i: int, path: str, block: nn.Module) -> Block:
        def one(kind: Any) -> nn.Linear:
            found = [_base(m) for m in where.projections(kind, i).values()]
            if len(found) != 1 or not isinstance(found[0], nn.Linear):
                raise self._refused(f"block {i} has no single '{kind}' layer")
            return found[0]

        norms = [m for m in block.children() if _is_norm(m)]
        if len(norms) != 2:
            raise self._refused(f"block {i} has {len(norms)} norms and not one before attention and one before the feed-forward")
        first = [_base(m) for kind in ("ffn_gate", "ffn_input") for m in where.projections(kind, i).values()]  # type: ignore[arg-type]
        if not first or not all(isinstance(m, nn.Linear) for m in first):
            raise self._refused(f"the first layers of the feed-forward in block {i} are not known")
        attention = where.network.get_submodule(next(iter(where.projections("attention_output", i)), path).rpartition(".")[0])
        return Block(attention, one("query"), one("key"), one("value"), one("attention_output"), first, one("ffn_output"), (norms[0], norms[1]), path)

    def _check(self, norm: nn.Module) -> None:
        gain: Tensor = norm.weight  # type: ignore[assignment]
        x = torch.linspace(-2, 3, len(gain), device=gain.device, dtype=torch.float32)
        with torch.no_grad():
            given = norm(x.to(gain.dtype)).float()
        if getattr(norm, "bias", None) is not None or not torch.allclose(given, x * x.square().mean().rsqrt() * gain.float(), rtol=2e-2, atol=2e-2):
            raise self._refused("its norms are no plain RMS norms with a gain")

    def _refused(self, why: str) -> ModelError:
        return ModelError(f"'{self.who}' serves decoders of the Llama kind; {type(self.network).__name__} is none: {why}.")

    # who is on it -------------------------------------------------------------------------------------------------------
    @property
    def width(self) -> int:
        return self.embedding.weight.shape[1]

    @property
    def norms(self) -> list[nn.Module]:
        return [*(n for b in self.blocks for n in b.norms), self.last_norm]

    @property
    def gains(self) -> dict[str, nn.Parameter]:
        """The norms' gains by name."""
        own = {id(n.weight) for n in self.norms}
        return {name: p for name, p in self.network.named_parameters() if id(p) in own}

    def reading(self) -> Iterator[tuple[nn.Module, list[Any]]]:
        """Every norm with the layers that read the stream through it."""
        for block in self.blocks:
            yield block.norms[0], [block.query, block.key, block.value]
            yield block.norms[1], block.first
        yield self.last_norm, [self.head]

    @property
    def writers(self) -> list[nn.Linear]:
        return [w for b in self.blocks for w in b.writers]

    # changing it --------------------------------------------------------------------------------------------------------
    def untie(self) -> bool:
        """Give the head weights of its own; says whether it shared the embedding's."""
        if self.head.weight is not self.embedding.weight:
            return False
        self.head.weight = nn.Parameter(self.embedding.weight.detach().clone())
        self.network.config.tie_word_embeddings = False
        return True

    @torch.no_grad()
    def fold_norms(self) -> None:
        """Every norm's gain goes into the columns of its readers and becomes 1. The head must be untied."""
        for norm, readers in self.reading():
            for reader in readers:
                reader.weight.mul_(norm.weight)  # type: ignore[operator]
            norm.weight.fill_(1.0)  # type: ignore[operator, union-attr]

    @torch.no_grad()
    def rotate(self, rotation: Rotation, back: bool = False) -> None:
        """Turn the basis of the stream. Gains must be 1 and the head untied; then the model stays the same function."""
        rotate_inputs(self.embedding, rotation, back)
        for _, readers in self.reading():
            for reader in readers:
                rotate_inputs(reader, rotation, back)
        for writer in self.writers:
            rotate_outputs(writer, rotation, back)


@torch.no_grad()
def rotate_inputs(layer: Any, rotation: Rotation, back: bool = False) -> None:
    """The layer as it reads x R in the place of x: W becomes W R (an embedding's rows: what it gives is turned)."""
    turn = rotation.back if back else rotation
    layer.weight.copy_(turn(layer.weight.float()))


@torch.no_grad()
def rotate_outputs(layer: nn.Linear, rotation: Rotation, back: bool = False) -> None:
    """The layer as it gives y R in the place of y; its bias is turned as well."""
    turn = rotation.back if back else rotation
    layer.weight.copy_(turn(layer.weight.float().T).T)
    if layer.bias is not None:
        layer.bias.copy_(turn(layer.bias.float()))


def _base(module: Any) -> Any:
    """The layer itself, without an adapter's shell round it."""
    return getattr(module, "base_layer", module)


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 1 and "norm" in type(module).__name__.lower()
