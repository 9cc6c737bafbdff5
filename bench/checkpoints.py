"""Fine-tunes of one base, made by chance: every tensor of the base with noise of its own."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bench.worker import sample_of


def make(base: Path, folder: Path, number: int) -> tuple[str, list[str]]:
    """The base in fp32 and `number` fine-tunes of it below `folder`; what is there already is kept."""
    made = []
    for seed in range(number + 1):
        target = folder / ("base" if seed == 0 else f"tuned-{seed}")
        made.append(str(target))
        if (target / "model.safetensors").exists():
            continue
        target.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(base / name, target / name)
        generator = torch.Generator().manual_seed(seed)
        with safe_open(base / "model.safetensors", "pt") as source:
            tensors = {name: source.get_tensor(name).float() for name in source.keys()}  # noqa: SIM118
        if seed:
            for tensor in tensors.values():
                tensor += 1e-3 * torch.randn(tensor.shape, generator=generator)
        save_file(tensors, target / "model.safetensors.part", {"format": "pt"})
        (target / "model.safetensors.part").rename(target / "model.safetensors")
    if hasattr(os, "sync"):
        os.sync()  # so that nobody's merge waits for these to reach the disk
    return made[0], made[1:]


def samples(folder: Path) -> list[float]:
    """The norm of every tensor of a merged checkpoint and some of its entries."""
    found: dict[str, list[float]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as source:
            for name in source.keys():  # noqa: SIM118
                found[name] = sample_of(source.get_tensor(name), name)
    return [value for name in sorted(found) for value in found[name]]
