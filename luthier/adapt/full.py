"""Full fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from luthier.adapt import Adapter
from luthier.adapt._shared import unwrapped
from luthier.catalog import register
from luthier.core.modelmap import category
from luthier.core.plugin import Group, Parts
from luthier.errors import RecipeError

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("full")
@dataclass
class Full(Adapter):
    """Train every weight of the network.

    The plain baseline: best fit to the new data, most memory, most forgetting. Wants about a tenth of LoRA's learning rate
    (1e-5 to 5e-5 for language models). Groups have the roles `embedding`, `body` and `head`, so that optimizers and schedules may
    tell them apart; tied embeddings are an embedding."""

    freeze: list[str] = field(default_factory=list)
    """Parts of names whose parameters stay as they are, e.g. `embed_tokens`."""

    def attach(self, model: Family, ctx: Context | None = None) -> Parts:
        unwrapped(model, self.name)
        model.network.requires_grad_(True)
        roles: dict[str, dict[str, nn.Parameter]] = {}
        for name, param in model.network.named_parameters():
            if any(word in name for word in self.freeze):
                param.requires_grad_(False)
                continue
            kind = category(name)
            roles.setdefault(kind if kind in ("embedding", "head") else "body", {})[name] = param
        if not roles:
            raise RecipeError(f"`freeze: {self.freeze}` matches every parameter of the network, so nothing would train.")
        return Parts([Group(role, params) for role, params in roles.items()])

