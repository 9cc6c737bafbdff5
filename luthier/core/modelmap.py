"""Where things are in a network: its blocks, what each parameter belongs to, its projections and heads.

Names are read by explicit patterns of the known architectures, never by the first number in them: a block is an entry of a list
called `layers`, `layer`, `h`, `block(s)` or `stages`; a list within a block (Swin's `layers.1.blocks.0`) is nested, T5's `layer.0`
within `block.0` is not a block of its own. Plain state-dict names, names inside a peft model and the older names of files
(`encoder.layer.0.attention.attention.query`) are all understood.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property
from typing import Any, Literal, NamedTuple

from torch import nn

from luthier.errors import ModelError

Category = Literal["attention", "ffn", "norm", "embedding", "head", "other"]
Kind = Literal["query", "key", "value", "qkv", "attention_output", "ffn_gate", "ffn_input", "ffn_output"]

_PEFT = re.compile(r"^(?:base_model\.model\.)+")
_LIST = r"(?:layers|layer|h|block|blocks|resblocks|stages)"
_BLOCK = re.compile(rf"^(?P<list>(?:.*?\.)?{_LIST})\.(?P<index>\d+)(?P<nested>\.(?:blocks|layers)\.(?P<inner>\d+))?(?=\.|$)")
_TOWER = re.compile(r"(?:^|\.)(text_model|vision_model|language_model|vision_tower|audio_tower|text_tower|visual|encoder(?=\.block\.)|decoder(?=\.block\.)|(?:en|de)coder(?=\.layers\.))")
_ADAPTER = re.compile(r"(?:^|\.)(lora_|vera_|oft_|boft_|ia3_|hada_|lokr_|ln_tuning|modules_to_save|original_module)")
_NORM = re.compile(r"(?:^|[._])(?:ln|norm|layernorm|layer_norm|rmsnorm|layrnorm|batchnorm|bn|normalization)(?:_?\d+|_f|_pre|_post|_before|_after|_1|_2)?(?:\.|$)|(?:layer_?norm|_norm|_layrnorm|_layernorm)\d?\w*\.", re.IGNORECASE)  # fmt: skip
_ATTENTION = re.compile(r"(?:^|\.)(?:self_attn|cross_attn|encoder_attn|attn|attention|self_attention|crossattention|SelfAttention|EncDecAttention)(?:\.|$)")
_FFN = re.compile(r"(?:^|\.)(?:mlp|ffn|feed_forward|feedforward|intermediate|output|DenseReluDense|block_sparse_moe|experts|fc1|fc2|lin1|lin2)(?:\.|$)")
_EMBEDDING = re.compile(r"(?:^|\.)(?:\w*embed\w*|wte|wpe|shared|cls_token|mask_token|class_embedding)(?:\.|$)")
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|classifier|score|head|fc|cls|embed_out|qa_outputs|vocab_\w+|pre_classifier|text_projection|visual_projection|generator_\w+)(?:\.|$)")

_KINDS: dict[str, str] = {
    "query": r"(?:q_proj|q_lin|\.query|SelfAttention\.q|EncDecAttention\.q)",
    "key": r"(?:k_proj|k_lin|\.key|SelfAttention\.k|EncDecAttention\.k)",
    "value": r"(?:v_proj|v_lin|\.value|SelfAttention\.v|EncDecAttention\.v)",
    "qkv": r"(?:c_attn|query_key_value|qkv_proj|Wqkv|\.qkv)",
    "attention_output": r"(?:attn\.(?:o_proj|out_proj|c_proj|Wo|proj)|attention\.(?:o_proj|out_proj|output\.dense|out_lin|dense)|Attention\.o)",
    "ffn_gate": r"(?:mlp\.gate_proj|DenseReluDense\.wi_0)",
    "ffn_input": r"(?:mlp\.(?:up_proj|gate_up_proj|fc1|c_fc|dense_h_to_4h|Wi)|(?<!attention\.)intermediate\.dense|ffn\.lin1|DenseReluDense\.(?:wi|wi_1)|layers\.\d+\.fc1)",
    "ffn_output": r"(?:mlp\.(?:down_proj|fc2|c_proj|dense_4h_to_h|Wo)|(?<!attention\.)(?<=\d\.)output\.dense|ffn\.lin2|DenseReluDense\.wo|layers\.\d+\.fc2)",
}


class Heads(NamedTuple):
    """How attention is split: query heads, the width of one, and the key/value heads they share."""

    count: int  # type: ignore[assignment]
    dim: int
    kv: int


def block_index(name: str) -> tuple[int | None, str]:
    """The block that a state-dict name belongs to and its tower ("" where there is one tower only): (None, tower) outside the blocks.

    For nested lists the outer index counts; `depth` numbers nested blocks through."""
    plain = _PEFT.sub("", name)
    tower = _TOWER.search(plain)
    found = _BLOCK.match(plain)
    return (int(found["index"]) if found else None), (tower[1] if tower else "")


def depth(names: Iterable[str]) -> dict[str, tuple[int, int] | None]:
    """For every tensor its block's place and the number of blocks in its tower; None outside the blocks."""
    names = list(names)
    keys = {name: _key(name) for name in names}
    lists: dict[str, set[tuple[int, int]]] = {}
    nested = {key[0] for key in keys.values() if key and key[2] >= 0}
    for key in keys.values():
        # in a nested list, what lies beside the inner list (a stage's downsampling) is no block
        if key and (key[0] not in nested or key[2] >= 0):
            lists.setdefault(key[0], set()).add(key[1:])
    place = {stack: {k: i for i, k in enumerate(sorted(found))} for stack, found in lists.items()}
    return {n: (place[k[0]][k[1:]], len(place[k[0]])) if k and k[1:] in place.get(k[0], {}) else None for n, k in keys.items()}


def category(name: str) -> Category:
    """What a parameter is part of, by its name."""
    plain = _PEFT.sub("", name)
    found = _BLOCK.match(plain)
    inside = plain[found.end() :] if found else plain
    if _NORM.search(inside):
        return "norm"
    if found:
        # BERT's attention.output.dense is attention, its output.dense is not
        return "attention" if _ATTENTION.search(inside) else "ffn" if _FFN.search(inside) else "other"
    if _HEAD.search(plain):
        return "head"
    return "embedding" if _EMBEDDING.search(plain) else "other"


class ModelMap:
    """The map of one network (a family, a transformers model, or one inside peft). Paths are names in that very network."""

    def __init__(self, network: Any) -> None:
        self.network: nn.Module = getattr(network, "network", network)
        inner = self.network
        self.config: Any = getattr(inner.get_base_model() if hasattr(inner, "get_base_model") else inner, "config", None)

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return dict(self.network.named_modules())

    @cached_property
    def blocks(self) -> list[tuple[str, nn.Module]]:
        """(path, module) of every block in order; a text tower's before a vision tower's, an encoder's before a decoder's."""
        found = []
        for path, module in self._modules.items():
            key = _key(path)
            if key and _is_whole(path) and not _ADAPTER.search(path):
                found.append((path, module, key))
        nested = {key[0] for _, _, key in found if key[2] >= 0}
        order: dict[str, int] = {}
        kept = [(p, m, k) for p, m, k in found if k[0] not in nested or k[2] >= 0]
        for _, _, key in kept:
            order.setdefault(key[0], len(order))
        kept.sort(key=lambda item: (order[item[2][0]], item[2][1:]))
        return [(path, module) for path, module, _ in kept]

    @cached_property
    def towers(self) -> dict[str, list[int]]:
        """The towers by name ("" for the only one), with the places of their blocks in `blocks`."""
        found: dict[str, list[int]] = {}
        for i, (path, _) in enumerate(self.blocks):
            found.setdefault(self.tower_of(path), []).append(i)
        return found

    def tower_of(self, name: str) -> str:
        return block_index(name)[1]

    def block_of(self, name: str) -> int | None:
        """The place in `blocks` of the block that a parameter or module belongs to."""
        parts = name.split(".")
        for end in range(len(parts), 0, -1):
            place = self._places.get(".".join(parts[:end]))
            if place is not None:
                return place
        return None

    @cached_property
    def _places(self) -> dict[str, int]:
        return {path: i for i, (path, _) in enumerate(self.blocks)}

    def category(self, name: str) -> Category:
        return category(name)

    def projections(self, kind: Kind, block: int | None = None) -> dict[str, nn.Module]:
        """The linear maps of one kind, by path; "qkv" are fused ones (GPT-2's c_attn). Empty where the architecture has none."""
        if kind not in _KINDS:
            raise ModelError(f"There is no projection kind '{kind}'. There are: {', '.join(_KINDS)}.")
        pattern = re.compile(_KINDS[kind] + "$")
        return {
            path: module for path, module in self._modules.items()
            if pattern.search(path) and not _ADAPTER.search(path) and self.block_of(path) is not None
            and (block is None or self.block_of(path) == block)
        }  # fmt: skip

    @property
    def fused(self) -> bool:
        """Whether query, key and value are one matrix."""
        return bool(self.projections("qkv"))

    @property
    def heads(self) -> Heads:
        """Attention heads; of the text tower where there are two."""
        return self.heads_of("text_model")

    def heads_of(self, tower: str = "") -> Heads:
        config = self.config
        for part in ("vision_config",) if "vision" in tower else ("text_config",):
            config = getattr(config, part, None) or config
        count = next((int(n) for a in ("num_attention_heads", "n_head", "n_heads", "num_heads") if isinstance(n := getattr(config, a, None), int)), None)
        width = next((int(n) for a in ("hidden_size", "n_embd", "dim", "d_model") if isinstance(n := getattr(config, a, None), int)), None)
        if not count or not width:
            raise ModelError(f"The attention heads of a {type(self.network).__name__} are not known.")
        dim = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or width // count
        return Heads(count, int(dim), int(getattr(config, "num_key_value_heads", None) or count))

    def linears(self, block: int | None = None, everywhere: bool = False) -> dict[str, nn.Module]:
        """The linear layers (nn.Linear, Conv1D) of all blocks or of one, without adapters' own; `everywhere`: heads and poolers too."""
        from transformers.pytorch_utils import Conv1D

        return {
            path: module for path, module in self._modules.items()
            if isinstance(module, (nn.Linear, Conv1D)) and not _ADAPTER.search(path)
            and (everywhere or self.block_of(path) is not None) and (block is None or self.block_of(path) == block)
        }  # fmt: skip


def _key(name: str) -> tuple[str, int, int] | None:
    """(path of the list, index, index in the nested list or -1) of a name inside a block."""
    found = _BLOCK.match(_PEFT.sub("", name))
    if found is None:
        return None
    return found["list"], int(found["index"]), int(found["inner"]) if found["inner"] else -1


def _is_whole(path: str) -> bool:
    """Whether a module path names a block itself."""
    plain = _PEFT.sub("", path)
    found = _BLOCK.match(plain)
    return found is not None and found.end() == len(plain)
