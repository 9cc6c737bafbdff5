"""Networks with some of their blocks taken out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from luthier.core.modelmap import ModelMap, block_index
from luthier.errors import ModelError


def drop_blocks(network: Any, start: int, number: int) -> None:
    """Take `number` consecutive blocks out of a transformers network, in place.

    What counts blocks follows: the index that each attention keeps for its cache, the configuration's number of layers and its lists with one
    entry a layer. The result saves and loads as a plain, shallower model."""
    where = ModelMap(network)
    paths = [path for path, _ in where.blocks]
    homes = {path.rpartition(".")[0] for path in paths}
    if len(homes) != 1 or not isinstance(home := where.network.get_submodule(next(iter(homes))), nn.ModuleList) or len(home) != len(paths):
        raise ModelError(f"The blocks of a {type(where.network).__name__} are not one list, so none can be taken out.")
    if not 0 <= start <= start + number < len(paths) + (start > 0) or number < 0:
        raise ModelError(f"Of {len(paths)} blocks, {number} from block {start} on cannot be taken out; at least one must stay.")
    del home[start : start + number]
    for i, block in enumerate(home):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = i  # type: ignore[assignment]
    config = where.config.get_text_config()
    for name, value in list(vars(config).items()):
        if "layer" in name and isinstance(value, list) and len(value) == len(paths):
            setattr(config, name, value[:start] + value[start + number :])
    config.num_hidden_layers = len(home)


def without_blocks(tensors: Mapping[str, Tensor], start: int, number: int) -> dict[str, Tensor]:
    """The same on a state dict: the blocks' tensors are left out, those of later blocks renumbered. Names outside blocks stay."""
    made = {}
    for name, tensor in tensors.items():
        block = block_index(name)[0]
        if block is None or block < start:
            made[name] = tensor
        elif block >= start + number:
            made[name.replace(f".{block}.", f".{block - number}.", 1)] = tensor
    return made
