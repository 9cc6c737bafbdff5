"""Exits: a decoder cut at some of its blocks. Hidden states of several depths as the head would read them, and passes through a part of the blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from luthier.core.hooks import tap
from luthier.core.modelmap import ModelMap
from luthier.errors import ModelError, RecipeError

if TYPE_CHECKING:
    from luthier.core.batch import TokenForest
    from luthier.core.families import CausalLM


def exit_depths(model: CausalLM, wanted: Sequence[int] = (), field: str = "exits") -> list[int]:
    """Depths (numbers of blocks) in rising order, the whole depth last. None given: 30 %, 40 %, ... 100 % of the blocks."""
    blocks = len(ModelMap(model.network).blocks)
    for n in wanted:
        if not 1 <= n <= blocks:
            raise RecipeError(f"'{field}' names depth {n}; the network has {blocks} blocks, so depths are 1 to {blocks}.")
    found = set(wanted) or {max(1, round(blocks * tenth / 10)) for tenth in range(3, 11)}
    return sorted(found | {blocks})


def final_norm(model: CausalLM) -> nn.Module:
    """The norm between the last block and the head."""
    decoder = model.decoder
    for name in ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f"):
        module = getattr(decoder, name, None)
        if isinstance(module, nn.Module):
            return module
    raise ModelError(f"The final norm of a {type(decoder).__name__} is not known, so its inner depths cannot be read by its head.")


def states_at(model: CausalLM, forest: TokenForest, depths: Sequence[int]) -> dict[int, Tensor]:
    """[bins, length, d] after the first n blocks and the final norm, for each n of `depths`; one forward pass.

    What a decoder returns is normalised already, what its blocks return is not: the norm is applied exactly once."""
    blocks = [path for path, _ in ModelMap(model.network).blocks]
    inner = [n for n in depths if n < len(blocks)]

    with tap(model.network, [blocks[n - 1] for n in inner]) as seen:
        whole = model.hidden(forest)
    norm = final_norm(model) if inner else nn.Identity()
    # vectors that prompt learning puts in front are left out, as `hidden` leaves them out
    found = {n: norm(seen[blocks[n - 1]][:, -whole.shape[1] :]) for n in inner}
    return {n: found.get(n, whole) for n in depths}


class Segments:
    """The blocks of a decoder in pieces, each of which can be run on its own: from `bounds[i]` to `bounds[i + 1]`.

    Works for decoders that read embeddings as they are and loop over one list of blocks; `check` proves it on a few tokens."""

    def __init__(self, model: CausalLM, bounds: Sequence[int]) -> None:
        self.model, self.bounds = model, list(bounds)
        blocks = ModelMap(model.base_network).blocks
        path, _, _ = blocks[0][0].rpartition(".")
        parent, _, self.leaf = path.rpartition(".")
        self.owner = model.base_network.get_submodule(parent)
        self.whole = getattr(self.owner, self.leaf)
        self.pieces = [nn.ModuleList([block for _, block in blocks[a:b]]) for a, b in zip(self.bounds, self.bounds[1:])]
        if getattr(model.config, "sliding_window", None) or len(self.whole) != len(blocks):
            raise ModelError(f"A {type(model.base_network).__name__} cannot be run in parts (windowed attention or several lists of blocks); decode it whole.")

    @contextmanager
    def only(self, piece: int) -> Iterator[None]:
        """The decoder with one piece of its blocks."""
        setattr(self.owner, self.leaf, self.pieces[piece])
        try:
            yield
        finally:
            setattr(self.owner, self.leaf, self.whole)

    def run(self, piece: int, entering: Tensor, cache: Any = None, start: int = 0) -> tuple[Tensor, Tensor]:
        """Pass ids [1, m] (the first piece) or states [1, m, d] through a piece; the tokens stand at positions `start` and following.

        Returns the states as the next piece reads them, and as the head does."""
        length = entering.shape[1]
        place = torch.arange(start, start + length, device=entering.device)
        past = start if cache is not None else 0
        blocked = torch.arange(past + length, device=entering.device) > past + torch.arange(length, device=entering.device)[:, None]
        mask = torch.zeros(1, 1, length, past + length, dtype=self.model.dtype, device=entering.device).masked_fill(blocked, torch.finfo(self.model.dtype).min)
        last = self.pieces[piece][-1]
        inputs: dict[str, Any] = {"input_ids": entering} if piece == 0 else {"inputs_embeds": entering}
        found: list[Tensor] = []
        handle = last.register_forward_hook(lambda _m, _a, out: found.append(out if isinstance(out, Tensor) else out[0]))
        try:
            with self.only(piece):
                out = self.model.decoder(**inputs, attention_mask=mask, position_ids=place[None], past_key_values=cache, use_cache=cache is not None)
        finally:
            handle.remove()
        return found[0], out.last_hidden_state

    @torch.no_grad()
    def check(self) -> None:
        """Refuse a network that says something else in pieces than it says whole."""
        model = self.model
        ids = torch.arange(5, 11, device=model.device)[None] % int(model.config.vocab_size)
        with model.evaluating():
            whole = model.decoder(input_ids=ids, use_cache=False).last_hidden_state
            try:
                state, read = ids, whole
                for piece in range(len(self.pieces)):
                    state, read = self.run(piece, state)
            except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError):
                read = torch.full_like(whole, torch.nan)
        tolerance = 1e-3 if model.dtype == torch.float32 else 0.2
        if not torch.allclose(read.float(), whole.float(), rtol=tolerance, atol=tolerance):
            raise ModelError(f"A {type(model.base_network).__name__} says something else when its blocks run in parts, so it cannot exit early; decode it whole.")
