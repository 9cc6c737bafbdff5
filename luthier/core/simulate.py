"""Running a network as if it were quantised: linear layers that round weights and inputs, attention that rounds keys and values.

Layers keep their class's interface, their parameters and their names (only their class changes), so that training, checkpoints and
copies go on as before; `release` gives the plain classes back."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from luthier.core.quant import Rotation, fake_quant


@dataclass
class Site:
    """How one layer (or one attention's keys and values) is rounded. Bits 0: not at all."""

    weight_bits: int = 0
    input_bits: int = 0
    weight_clip: float = 1.0
    input_clip: float = 1.0
    rotation: Rotation | None = None
    """Turns the input online; the layer's weight is turned already. Of attention: turns queries and keys."""
    on: bool = True
    """Off: rotations stay, nothing is rounded."""
    watch: Any = field(default=None, repr=False)
    """A function that is shown keys and values [batch, heads, tokens, dim] as they come."""


class QuantLinear(nn.Linear):
    """y = Q_x(x R) Q_w(W)^T + b; groups are a token's inputs and an output's weights."""

    site: Site

    def forward(self, x: Tensor) -> Tensor:
        site, weight = self.site, self.weight
        if site.rotation is not None:
            x = site.rotation(x)
        if site.on and site.weight_bits:
            weight = fake_quant(weight, site.weight_bits, site.weight_clip)  # type: ignore[assignment]
        if site.on and site.input_bits:
            x = fake_quant(x, site.input_bits, site.input_clip)
        return nn.functional.linear(x, weight, self.bias)


def simulate(layer: nn.Linear, site: Site) -> None:
    """Let a linear layer round as the site says."""
    layer.__class__ = QuantLinear
    layer.site = site  # type: ignore[assignment]


def release(layer: nn.Linear) -> None:
    """The plain linear layer again, with its weight as it is."""
    layer.__class__ = nn.Linear
    if "site" in layer.__dict__:
        del layer.__dict__["site"]


PREFIX = "luthier_kv_"


def simulate_attention(network: Any, sites: dict[nn.Module, Site]) -> None:
    """Let attention modules round what their cache would hold: keys after the rotary embedding, and values, by token and head."""
    for module, site in sites.items():
        module.__dict__["kv_site"] = site
    now = network.config._attn_implementation or "eager"
    if not now.startswith(PREFIX):
        network.set_attn_implementation(_registered(now))


def release_attention(network: Any) -> None:
    for module in network.modules():
        module.__dict__.pop("kv_site", None)
    now = network.config._attn_implementation or "eager"
    if now.startswith(PREFIX):
        network.set_attn_implementation(now.removeprefix(PREFIX))


def _registered(inner: str) -> str:
    """The name under which transformers knows our attention around `inner`, with its masks."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    name = PREFIX + inner

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        site: Site | None = module.__dict__.get("kv_site")
        if site is not None:
            query, key, value = _cached(site, query, key, value)
        return _attention(module, inner)(module, query, key, value, mask, **kwargs)

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[inner])
    return name


def _cached(site: Site, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if site.watch is not None:
        site.watch(key, value)
    if site.rotation is not None:  # both sides, so that their products stay
        query, key = site.rotation(query), site.rotation(key)
    if site.on and site.input_bits:
        key, value = (fake_quant(t, site.input_bits, site.input_clip) for t in (key, value))
    return query, key, value


def _attention(module: nn.Module, inner: str) -> Any:
    """transformers' own function: by name, or the model file's for plain attention."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if inner in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[inner]
    return sys.modules[type(module).__module__].eager_attention_forward


@torch.no_grad()
def rounded(layer: nn.Linear) -> Tensor:
    """The weight of a simulated layer as it is used."""
    site: Site = layer.site  # type: ignore[assignment]
    return fake_quant(layer.weight, site.weight_bits, site.weight_clip) if site.weight_bits else layer.weight
