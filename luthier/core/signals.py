"""Signals of rows under a model: embeddings, losses, gradients. Computed once for (weights, rows, options) and memory-mapped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from luthier.core.context import seed_of
from luthier.errors import RecipeError, nearest

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family

BATCH = 32


def signal(name: str, rows: Any, ctx: Context, model: str = "stage", **options: Any) -> np.ndarray:
    """One value or vector a row.

    `name`: "embedding" (options `normalise`, `text`: prompt | completion | both, `embedder`: another model's name), "loss",
    "perplexity", "entropy", "hit" (means over the supervised tokens), "length" (tokens), "gradient" (per-row gradients of the parameters whose
    names contain one of `sites`, projected to `project` numbers by a seeded random matrix). `model`: a name as for `ctx.model`, or
    "current" for the weights as they are now. Kept below the run's folder under a hash of weights, rows and options."""
    if name not in SIGNALS:
        raise RecipeError(f"There is no signal '{name}'.{nearest(name, SIGNALS)} There are: {', '.join(SIGNALS)}.")
    from luthier.core.models import fingerprint
    from luthier.core.rows import Rows

    given = Rows.of(rows)
    family = _family(ctx, model if options.get("embedder") is None else str(options.pop("embedder")))
    key = hashlib.sha256(json.dumps([name, fingerprint(family.network), given.fingerprint, ctx.train_on, sorted(options.items())]).encode()).hexdigest()[:32]
    file = None if ctx.folder is None else Path(ctx.folder) / "signals" / f"{name}-{key}.npy"
    if file is not None and file.exists():
        return np.load(file, mmap_mode="r", allow_pickle=False)
    with family.evaluating(grad=name == "gradient"):
        found = SIGNALS[name](family, given, ctx, **options)
    return found if file is None else _kept(file, found)


def _kept(file: Path, values: np.ndarray) -> np.ndarray:
    """Written beside, then renamed: a reader never sees half a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.stem}.{os.getpid()}.npy")
    np.save(fresh, values, allow_pickle=False)
    os.replace(fresh, file)
    return np.load(file, mmap_mode="r", allow_pickle=False)


def _family(ctx: Context, model: str) -> Family:
    if model == "current" or not ctx.has_model(model):
        if ctx.current is None:
            raise RecipeError("A signal needs a model; there is none at hand.")
        return ctx.current
    return ctx.model(model)


def _batches(family: Any, rows: Any, ctx: Context) -> Any:
    for start in range(0, len(rows), BATCH):
        part = [rows[i] for i in range(start, min(len(rows), start + BATCH))]
        yield family.collate(part, rows.ids[start : start + BATCH], train_on=ctx.train_on)


def _embedding(family: Any, rows: Any, ctx: Context, normalise: bool = False, text: str = "both") -> np.ndarray:
    """The model's pooled vector of each row: of its prompt, its completion or both."""
    if text not in ("prompt", "completion", "both"):
        raise RecipeError(f"An embedding is of the prompt, the completion or both, not of '{text}'.")
    found = []
    for batch in _batches(family, rows, ctx):
        firsts = {s.row: s for s in reversed(batch.sequences)}
        if "score" in family.verbs and firsts:
            vectors = family.embed([_part(firsts[i], text) for i in range(len(batch))])
        elif firsts:
            vectors = family.embed([firsts[i] for i in range(len(batch))])
        else:
            vectors = family.features(batch) if "features" in family.verbs else family.embed(batch)
        found.append(vectors.float().cpu().numpy())
    x = np.concatenate(found) if found else np.zeros((0, 1), np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) if normalise else x


def _part(sequence: Any, text: str) -> Any:
    """The tokens before the first supervised one, those from there on, or all."""
    from luthier.core.batch import Sequence

    cut = int(sequence.supervised[0]) if len(sequence.supervised) else len(sequence)
    ids = {"prompt": sequence.ids[:cut], "completion": sequence.ids[cut:], "both": sequence.ids}[text]
    return Sequence(ids if len(ids) else sequence.ids, np.zeros(len(ids) or len(sequence), bool))


def _row_means(name: str) -> Callable[..., np.ndarray]:
    def compute(family: Any, rows: Any, ctx: Context) -> np.ndarray:
        from luthier.core.rowscores import RowScores

        found = [np.asarray(RowScores(family, batch)[name], np.float32) for batch in _batches(family, rows, ctx)]
        return np.concatenate(found) if found else np.zeros(0, np.float32)

    return compute


def _length(family: Any, rows: Any, ctx: Context) -> np.ndarray:
    found = []
    for batch in _batches(family, rows, ctx):
        lengths = np.zeros(len(batch), np.float32)
        for s in batch.sequences:
            lengths[s.row] += len(s)
        found.append(lengths)
    return np.concatenate(found) if found else np.zeros(0, np.float32)


def _gradient(family: Any, rows: Any, ctx: Context, sites: str = "weight", project: int = 512) -> np.ndarray:
    """Row by row: the gradient of the mean token loss with respect to the named tensors, through a random projection (Rademacher / sqrt(k))."""
    wanted = [s for s in sites.split(",") if s]
    params = {n: p for n, p in family.network.named_parameters() if any(s in n for s in wanted)}
    if not params:
        raise RecipeError(f"No parameter's name contains {' or '.join(wanted)}; name others in `sites`.")
    flags = {n: p.requires_grad for n, p in family.network.named_parameters()}
    out = np.zeros((len(rows), project), np.float32)
    try:
        for n, p in family.network.named_parameters():
            p.requires_grad_(n in params)
        for i in range(len(rows)):
            batch = family.collate([rows[i]], train_on=ctx.train_on)
            grads = torch.autograd.grad(_mean_loss(family, batch), list(params.values()), allow_unused=True)
            for name, grad in zip(params, grads):
                if grad is not None:
                    out[i] += _projected(name, grad.detach().flatten().float().cpu(), project)
    finally:
        for n, p in family.network.named_parameters():
            p.requires_grad_(flags[n])
    return out


def _mean_loss(family: Any, batch: Any) -> torch.Tensor:
    if "score" in family.verbs:
        return -family.score(batch).logp.mean()
    return torch.nn.functional.cross_entropy(family.classify(batch).float(), batch.tensors["labels"].to(family.device))


def _projected(name: str, flat: torch.Tensor, k: int, block: int = 4096) -> np.ndarray:
    """The same random signs for the same tensor name and block, so that rows can be compared without storing the matrix."""
    total = torch.zeros(k)
    for number, start in enumerate(range(0, len(flat), block)):
        part = flat[start : start + block]
        signs = torch.randint(0, 2, (len(part), k), generator=torch.Generator().manual_seed(seed_of(name, number, k)), dtype=torch.int8)
        total += part @ (2.0 * signs - 1)
    return (total / k**0.5).numpy()


SIGNALS: dict[str, Callable[..., np.ndarray]] = {
    "embedding": _embedding, "loss": _row_means("loss"), "perplexity": _row_means("perplexity"), "entropy": _row_means("entropy"),
    "hit": _row_means("hit"), "length": _length, "gradient": _gradient,
}  # fmt: skip
