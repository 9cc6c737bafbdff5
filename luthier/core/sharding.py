"""Weights split over the processes of a run: torch's fully sharded data parallelism (FSDP2), put on and taken off again.

Every block gathers its weights when it runs and lets go of them afterwards; what lies outside the blocks is one group more. Between
steps a process holds, of every weight, gradient and optimizer state, its rows only: parameters are DTensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from luthier.core import ranks
from luthier.core.modelmap import ModelMap
from luthier.errors import TrainingError

if TYPE_CHECKING:
    from luthier.core.checkpoint import Shards
    from luthier.core.families import Family
    from luthier.core.plugin import Group

def shard(family: Family, groups: list[Group]) -> None:
    """Split the network's weights over all processes; `groups` hold the sharded parameters afterwards."""
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    network = family.network
    places = {id(p): (module, leaf) for module in network.modules() for leaf, p in module.named_parameters(recurse=False)}
    for _, block in ModelMap(network).blocks:
        fully_shard(block)
    fully_shard(network)
    network.enter = lambda forward: forward()  # a way in for passes that start below the network's own forward
    register_fsdp_forward_method(network, "enter")
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # losses are divided by counts over all processes already
            module.set_force_sum_reduction_for_comms(True)
    whole = next((name for name, p in network.named_parameters() if not is_sharded(p)), None)
    if whole is not None:
        raise TrainingError(f"The weight '{whole}' was not split over the processes; use `train.parallel: ddp`.")
    for group in groups:
        group.params = {name: _now(p, places) for name, p in group.params.items()}


def _now(param: nn.Parameter, places: Mapping[int, tuple[nn.Module, str]]) -> nn.Parameter:
    """The parameter that has taken this one's place. A plug-in's own, outside the network, is not sharded and stays."""
    if id(param) not in places:
        return param
    module, leaf = places[id(param)]
    return getattr(module, leaf)  # type: ignore[no-any-return]


def unshard(family: Family, groups: list[Group]) -> None:
    """The network as it was, with whole weights, in the first process's memory; the other processes keep nothing of it."""
    from torch.distributed.fsdp import FSDPModule

    network, whole = family.network, {}
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    for module in list(network.modules()):
        for _, param in module.named_parameters(recurse=False):
            if id(param) not in whole:
                whole[id(param)] = (param, _whole_parameter(param))
    for module in list(network.modules()):
        for leaf, param in list(module.named_parameters(recurse=False)):
            module._parameters[leaf] = whole[id(param)][1]
        if isinstance(module, FSDPModule):
            _take_off(module)
    network.__dict__.pop("enter", None)
    for group in groups:
        group.params = {name: whole[id(p)][1] if id(p) in whole else p for name, p in group.params.items()}


def _whole_parameter(param: nn.Parameter) -> nn.Parameter:
    if not is_sharded(param):
        return param
    full = full_tensor(param.detach())
    kept = full.cpu() if ranks.first() else torch.empty_like(full, device="meta")
    return nn.Parameter(kept, requires_grad=param.requires_grad)


def _take_off(module: Any) -> None:
    """Remove FSDP's hooks and class from one module. torch has no public way back, so its private one is used here and nowhere else."""
    state = module._get_fsdp_state()
    for name in ("_pre_forward_hook_handle", "_post_forward_hook_handle"):
        getattr(state, name).remove()
    module.__class__ = type(module).__mro__[type(module)._orig_cls_mro_index]


# -- tensors that may be sharded -----------------------------------------------------------------------------------------


def is_sharded(tensor: Tensor) -> bool:
    return isinstance(tensor.data, DTensor)


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor whole; every process must ask."""
    if isinstance(tensor, DTensor):
        with ranks.peers():
            return tensor.full_tensor()
    return tensor


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gradient_norm(grads: list[Tensor]) -> Tensor:
    """The norm of all gradients together, the same in every process."""
    if not grads:
        return torch.zeros(())
    sharded, own = [g for g in grads if isinstance(g, DTensor)], [g for g in grads if not isinstance(g, DTensor)]
    if not sharded:
        return torch.nn.utils.get_total_norm(own)
    parts = [full_tensor(torch.nn.utils.get_total_norm(sharded))]  # type: ignore[arg-type]
    return torch.linalg.vector_norm(torch.stack([*parts, *([torch.nn.utils.get_total_norm(own)] if own else [])]))


def clip(params: list[nn.Parameter], limit: float, norm: Tensor) -> None:
    """Scale all gradients down to a norm of `limit`, as torch does."""
    if not any(is_sharded(p) for p in params):
        torch.nn.utils.clip_grads_with_norm_(params, limit, norm)
        return
    scale = torch.clamp(limit / (norm + 1e-6), max=1.0)
    for p in params:
        if p.grad is not None:
            local(p.grad).mul_(scale)


def rows_here(length: int) -> tuple[int, int]:
    """Where this process's rows of a sharded tensor of so many rows begin and end: chunks of equal size, the last ones shorter."""
    chunk = -(-length // ranks.size())
    start = min(length, ranks.rank() * chunk)
    return start, min(length, start + chunk)


def by_rows(tensor: Tensor) -> bool:
    """Whether every process holds its rows of a tensor, and nothing else."""
    return isinstance(tensor.data, DTensor) and tensor.data.placements[0].is_shard(0)


def like(saved: Tensor | Shards, wanted: Tensor) -> Tensor:
    """A saved tensor in the form of `wanted`: whole, or a DTensor of this process's rows."""
    if not isinstance(wanted, DTensor) or (isinstance(saved, Tensor) and saved.shape != wanted.shape):
        return saved if isinstance(saved, Tensor) else saved.rows()
    start, end = rows_here(wanted.shape[0])
    rows = (saved[start:end] if isinstance(saved, Tensor) else saved.rows(start, end)).to(wanted.device).contiguous()
    return DTensor.from_local(rows, wanted.device_mesh, wanted.placements, shape=wanted.shape, stride=wanted.stride())

