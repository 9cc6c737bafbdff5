"""Cartridges: a trained key-value cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from luthier.adapt._shared import Prompted
from luthier.catalog import register
from luthier.core.plugin import Group
from luthier.errors import RecipeError

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("cartridge", wraps="peft.CartridgeConfig")
@dataclass
class Cartridge(Prompted):
    """A key-value cache that is trained directly, started from the real cache of a text: a long document distilled into few tokens.

    Like prefix tuning without a reparametrising network. `text` (or `file`) is read by the model once and the first `tokens` entries
    of its cache are copied; the first `frozen` stay fixed as an attention sink."""

    text: str | None = None
    """The text whose cache it starts from; default: random."""
    file: str | None = None
    """A file that holds that text."""
    frozen: int = 1
    """Leading entries that do not train."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.frozen < self.tokens:
            raise RecipeError(f"'frozen' is {self.frozen}; it must be at least 0 and below `tokens` ({self.tokens}).")

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft import CartridgeConfig

        return CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=self.tokens, num_frozen_tokens=self.frozen)

    @torch.no_grad()
    def after(self, model: Family, ctx: Context | None) -> None:
        from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values

        text = Path(self.file).read_text(encoding="utf-8") if self.file is not None else self.text
        if text is None:
            return
        ids = torch.tensor([model.processor(text)["input_ids"]]).to(model.device)
        if ids.shape[1] < self.tokens:
            raise RecipeError(f"The text has {ids.shape[1]} tokens; a cartridge of {self.tokens} needs at least as many. Lower `tokens`.")
        with model.evaluating():
            cache = model.base_network(input_ids=ids, use_cache=True).past_key_values
        initialize_kv_prefix_from_past_key_values(model.network, past_key_values=cache, num_virtual_tokens=self.tokens)

    def groups(self, model: Family) -> list[Group]:
        return [Group(self.role, {n: p for n, p in model.network.named_parameters() if p.requires_grad and "frozen" not in n})]
