"""The small training loop of the builds: batches from a stream of chunks, a decaying rate, checkpoints that go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from luthier.lab.mixture import drawn, encoded

CACHE = Path.home() / ".cache" / "luthier" / "lab-build"
Batch = dict[str, torch.Tensor]


@dataclass
class Plan:
    """How long and how fast a build learns; `units` are tokens, or images for a vision model."""

    units: int
    rate: float = 2e-3
    final_rate: float = 1e-4
    warmup: int = 50
    decay: float = 0.3
    weight_decay: float = 0.05
    minutes: float | None = None
    """Ends (and anneals) by this wall time when the machine is too slow for all units."""


@dataclass
class State:
    chunk: int = 0
    steps: int = 0
    units: int = 0
    seconds: float = 0.0
    notes: dict = field(default_factory=dict)


def rate_at(progress: float, steps: int, plan: Plan) -> float:
    """Warm-up, constant, then linear decay over the last `decay` of the work."""
    fall = max(0.0, progress - (1 - plan.decay)) / plan.decay
    return min(1.0, (steps + 1) / plan.warmup) * (plan.rate + (plan.final_rate - plan.rate) * min(1.0, fall))


def groups(model: torch.nn.Module, plan: Plan) -> list[dict]:
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    rest = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    return [{"params": matrices, "weight_decay": plan.weight_decay}, {"params": rest, "weight_decay": 0.0}]


def train(name: str, model: torch.nn.Module, chunks: Callable[[int], Iterator[tuple[Batch, int]]], loss: Callable,
          plan: Plan, after_chunk: Callable[[State, float], None] | None = None) -> State:  # fmt: skip
    """Run `chunks(0), chunks(1), ...` until the plan is done; a killed build goes on with the chunk it was in."""
    optimizer = torch.optim.AdamW(groups(model, plan), lr=plan.rate, betas=(0.9, 0.98), fused=True)
    state, folder = State(), CACHE / name
    folder.mkdir(parents=True, exist_ok=True)
    resume(folder / "state.pt", model, optimizer, state)
    started, shown, losses = time.time() - state.seconds, time.time(), []
    model.train()
    while progress_of(state, plan) < 1:
        for batch, units in chunks(state.chunk):
            state.seconds = time.time() - started
            rate = rate_at(progress_of(state, plan), state.steps, plan)
            for group in optimizer.param_groups:
                group["lr"] = rate
            value = loss(model, batch, progress_of(state, plan))
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(value.item())
            state.steps, state.units = state.steps + 1, state.units + units
            if time.time() - shown > 20:
                print(f"{name}: {state.seconds:6.0f} s, {state.units / 1e6:6.2f} M units, step {state.steps}, "
                      f"{100 * progress_of(state, plan):5.1f} %, rate {rate:.1e}, loss {np.mean(losses):.4f}", flush=True)  # fmt: skip
                shown, losses = time.time(), []
        state.chunk += 1
        if after_chunk:
            after_chunk(state, progress_of(state, plan))
        state.seconds = time.time() - started
        save_state(folder / "state.pt", model, optimizer, state)
    return state


def progress_of(state: State, plan: Plan) -> float:
    by_time = state.seconds / (60 * plan.minutes) if plan.minutes else 0.0
    return max(state.units / plan.units, by_time)


def save_state(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: State) -> None:
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": vars(state)}, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def resume(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: State) -> None:
    if path.exists():
        found = torch.load(path, weights_only=True)
        model.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])
        vars(state).update(found["state"])
        print(f"{path.parent.name}: goes on at {state.units / 1e6:.2f} M units", flush=True)


def text_chunks(mixture: list | Callable[[int], list], seed: int, rows: int = 20_000, tokens: int = 1024) -> Callable:
    """Chunk i is a pure function of (seed, i): rows of the mixture in batches of like length."""

    def chunk(i: int) -> Iterator[tuple[Batch, int]]:
        rng = np.random.default_rng([seed, i])
        made = [encoded(pair) for pair in drawn(rng, rows, mixture(i) if callable(mixture) else mixture)]
        yield from text_batches(made, rng, tokens)

    return chunk


def text_batches(made: list[tuple[list[int], int]], rng: np.random.Generator, tokens: int) -> Iterator[tuple[Batch, int]]:
    order = sorted(range(len(made)), key=lambda j: len(made[j][0]) + rng.random())
    batches, start = [], 0
    while start < len(order):
        # Rows come shortest first, so the last row of a batch decides its width.
        size = 1
        while start + size < len(order) and (size + 1) * len(made[order[start + size]][0]) <= tokens:
            size += 1
        batches.append(order[start : start + size])
        start += size
    for b in rng.permutation(len(batches)):
        yield _batch([made[j] for j in batches[b]])


def _batch(rows: list[tuple[list[int], int]]) -> tuple[Batch, int]:
    width = max(len(ids) for ids, _ in rows)
    table = np.zeros((len(rows), width), dtype=np.int64)
    supervised = np.zeros((len(rows), width), dtype=bool)
    for r, (ids, first) in enumerate(rows):
        table[r, : len(ids)] = ids
        supervised[r, first : len(ids)] = True
    return {"ids": torch.from_numpy(table), "supervised": torch.from_numpy(supervised)}, sum(len(ids) for ids, _ in rows)


def causal_loss(model: torch.nn.Module, batch: Batch, progress: float) -> torch.Tensor:
    """Mean next-token loss at supervised places; the vocabulary is only touched there."""
    hidden = model.model(input_ids=batch["ids"], use_cache=False).last_hidden_state[:, :-1]
    wanted = batch["supervised"][:, 1:]
    return F.cross_entropy(model.lm_head(hidden[wanted]), batch["ids"][:, 1:][wanted])
