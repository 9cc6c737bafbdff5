"""Signals of rows under a model: embeddings, losses, gradients. Computed once for (weights, rows, options) and memory-mapped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from luthier.core.batch import Batch, Sequence, TokenForest
from luthier.core.context import seed_of
from luthier.core.rows import Rows, answer_of, prompt_text
from luthier.core.rowscores import RowScores
from luthier.errors import DataError, RecipeError, nearest

if TYPE_CHECKING:
    from luthier.core.context import Context

WINDOW = 256
"""Rows that are tokenised together."""
TOKENS = 2048
"""Tokens of a forward pass, padding included."""
Parts = Iterator[tuple[np.ndarray, np.ndarray]]
"""Positions of rows, and their values."""


def signal(name: str, rows: Any, ctx: Context, model: str = "stage", **options: Any) -> np.ndarray:
    """One value or vector a row, float32.

    "loss", "perplexity", "entropy", "hit": means over the supervised tokens (`reduce="sum"`: the loss's sum). "length": tokens.
    "embedding": pooled last hidden states; `text`: prompt | completion | both, `pooling`: mean | last, `normalise`, `branch` (of a
    model with two towers), `embedder`: a helper that is called with texts, one of the recipe's models, or a model to load. "gradient":
    of each row's mean token loss with respect to the parameters whose names contain one of `sites` (separated by commas; default: those
    that train, else all), sketched to `project` numbers (None: as it is), `normalise`.

    `model`: a name as for `ctx.model`, or "current" for the weights as they are now. Kept below the run's folder, or below
    LUTHIER_CACHE outside a run, under a hash of weights, template, rows and options. With `train.ray` the rows are computed by workers
    of a Ray cluster."""
    if name not in SIGNALS:
        raise RecipeError(f"There is no signal '{name}'.{nearest(name, SIGNALS)} There are: {', '.join(SIGNALS)}.")
    given = Rows.of(rows)
    family = _family(ctx, model, options.get("embedder"))
    key = [name, _identity(family), given.fingerprint, ctx.train_on, sorted((k, v) for k, v in options.items() if k != "embedder")]
    file = _file(ctx, f"{name}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.npy")
    kept = None if file is None else _kept(file)
    if kept is not None:
        return kept
    options.pop("embedder", None)
    if not hasattr(family, "network"):
        return _written(_texts_embedded(family, given, **options), len(given), file)
    if ctx.workers:
        from luthier.core.cluster import spread

        return _written(spread(name, family, given, ctx, options, ctx.workers), len(given), file)
    with family.evaluating(grad=name == "gradient"):
        return _written(SIGNALS[name](family, given, ctx, **options), len(given), file)


# -- where they are kept --------------------------------------------------------------------------------------------------------------


def _identity(family: Any) -> list[Any]:
    """What the values depend on besides the rows: weights, plug-ins' modules, the template. A helper goes by its name."""
    if not hasattr(family, "network"):
        return [getattr(family, "__module__", ""), getattr(family, "__qualname__", type(family).__name__)]
    from luthier.core.models import fingerprint

    words = getattr(family.processor, "tokenizer", family.processor)
    weights = [fingerprint(family.network), *(f"{k} {fingerprint(m)}" for k, m in sorted(family.modules.items()))]
    return [*weights, str(getattr(words, "chat_template", None)), len(words) if hasattr(words, "__len__") else 0]


def _file(ctx: Context, name: str) -> Path | None:
    root = ctx.folder or os.environ.get("LUTHIER_CACHE")
    return None if not root else Path(root).expanduser() / "signals" / name


def _kept(file: Path) -> np.ndarray | None:
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None  # not there, or cut short by a full disk: computed anew


def _written(parts: Parts, n: int, file: Path | None) -> np.ndarray:
    """All rows' values, streamed to a file beside the target that is then renamed: a reader never sees half a file."""
    out: np.ndarray | None = None
    fresh = None if file is None else file.with_name(f".{file.stem}.{os.getpid()}.npy")
    for positions, values in parts:
        if out is None:
            shape = (n, *values.shape[1:])
            out = np.zeros(shape, np.float32) if fresh is None else _new_file(fresh, shape)
        out[positions] = values
    if out is None:
        return np.zeros(0, np.float32)
    if fresh is None or file is None:
        return out
    out.flush()  # type: ignore[attr-defined]
    os.replace(fresh, file)
    return np.load(file, mmap_mode="r", allow_pickle=False)


def _new_file(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    return np.lib.format.open_memmap(path, "w+", np.float32, shape)


# -- which model, which rows ------------------------------------------------------------------------------------------------------------


def _family(ctx: Context, model: str, embedder: str | None) -> Any:
    if embedder is not None:
        if ctx.has_helper(embedder):
            return ctx.helper(embedder)
        if ctx.has_model(embedder):
            return ctx.model(embedder)
        from luthier.core.models import load

        return load(embedder)
    if model != "current" and ctx.has_model(model):
        return ctx.model(model)
    if ctx.current is None:
        raise RecipeError("A signal needs a model; there is none at hand.")
    return ctx.current


def _micro_batches(family: Any, rows: Rows, ctx: Context) -> Iterator[Batch]:
    """Batches of like lengths within a token budget; `ids` are positions among the rows."""
    for start in range(0, len(rows), WINDOW):
        at = np.arange(start, min(len(rows), start + WINDOW))
        yield from family.collate([rows[int(i)] for i in at], at, train_on=ctx.train_on).split(TOKENS, share=family.shares)


# -- one number a row ---------------------------------------------------------------------------------------------------------------------


def _row_scores(name: str) -> Callable[..., Parts]:
    def compute(family: Any, rows: Rows, ctx: Context, reduce: str = "mean") -> Parts:
        if reduce not in ("mean", "sum"):
            raise RecipeError(f"A signal is the mean or the sum over a row's tokens, not '{reduce}'.")
        for batch in _micro_batches(family, rows, ctx):
            values = np.asarray(RowScores(family, batch)[name], np.float32)
            if reduce == "sum" and batch.sequences:
                values = values * _per_row(batch, lambda s: len(s.supervised))
            yield batch.ids, values

    return compute


def _per_row(batch: Batch, measure: Callable[[Sequence], float]) -> np.ndarray:
    out = np.zeros(len(batch), np.float32)
    for s in batch.sequences:
        out[s.row] += measure(s)
    return out


def _length(family: Any, rows: Rows, ctx: Context) -> Parts:
    for batch in _micro_batches(family, rows, ctx):
        yield batch.ids, _per_row(batch, len)


# -- embeddings -----------------------------------------------------------------------------------------------------------------------------


def _embedding(
    family: Any, rows: Rows, ctx: Context, normalise: bool = False, text: str = "both", pooling: str = "mean", branch: str | None = None
) -> Parts:
    """The pooled vector of each row's first sequence: of its prompt, its completion (read behind the prompt) or both."""
    if text not in ("prompt", "completion", "both") or pooling not in ("mean", "last"):
        raise RecipeError(f"An embedding is the mean or last state of the prompt, the completion or both, not '{pooling}' of '{text}'.")
    if family.kind == "text-encoder" and not {"text", "anchor"} & set(rows[0] if len(rows) else ()):
        yield from _texts_embedded(lambda texts: family.embed(texts).float().cpu().numpy(), rows, normalise, text)
        return
    for batch in _micro_batches(family, rows, ctx):
        firsts = {s.row: s for s in reversed(batch.sequences)}
        if branch is not None:
            vectors = family.embed(batch, branch)
        elif family.kind == "causal-lm":
            vectors = _pooled(family, [firsts[i] for i in range(len(batch))], text, pooling)
        elif firsts:
            vectors = family.embed([firsts[i] for i in range(len(batch))])
        else:
            vectors = family.features(batch) if "features" in family.verbs else family.embed(batch)
        yield batch.ids, _scaled(vectors.detach().float().cpu().numpy(), normalise)


def _pooled(family: Any, sequences: list[Sequence], text: str, pooling: str) -> Tensor:
    """What comes before the first supervised token is the prompt. A causal model's states there do not know the rest."""
    cuts = [int(s.supervised[0]) if len(s.supervised) else len(s) for s in sequences]
    if text == "prompt":
        sequences = [Sequence(s.ids[:cut], s.mask[:cut]) for s, cut in zip(sequences, cuts)]
    forest: TokenForest = family.forest(sequences)
    hidden = family.hidden(forest).flatten(0, 1)
    width, found = forest.ids.shape[1], []
    for (b, path), cut in zip(forest.slots, cuts):
        path = path[cut:] if text == "completion" and cut < len(path) else path
        states = hidden[torch.from_numpy(path + b * width).to(hidden.device)].float()
        found.append(states.mean(0) if pooling == "mean" else states[-1])
    return torch.stack(found)


def _texts_embedded(embed: Callable[[list[str]], Any], rows: Rows, normalise: bool = False, text: str = "both") -> Parts:
    """By a callable that takes texts, or an object with `encode` such as a SentenceTransformer."""
    call = getattr(embed, "encode", embed)
    for start in range(0, len(rows), WINDOW):
        at = np.arange(start, min(len(rows), start + WINDOW))
        vectors = np.asarray(call([row_text(rows[int(i)], text) for i in at]), np.float32)
        if vectors.ndim != 2 or len(vectors) != len(at):
            raise DataError(f"The embedder gave an array of the shape {vectors.shape} for {len(at)} texts; one vector each is needed.")
        yield at, _scaled(vectors, normalise)


def row_text(row: Mapping[str, Any], text: str = "both") -> str:
    """A row's prompt, completion or both, as a person reads them."""
    prompt, answer = prompt_text(row), answer_of(row) or ""
    if text == "both":
        return "\n".join(part for part in (prompt, answer) if part)
    return (prompt or answer) if text == "prompt" else (answer or prompt)


def _scaled(x: np.ndarray, normalise: bool) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) if normalise else x


# -- gradients ------------------------------------------------------------------------------------------------------------------------------


def _gradient(
    family: Any, rows: Rows, ctx: Context, sites: str | None = None, project: int | None = 512, normalise: bool = False
) -> Parts:
    params = _sites(family, sites)
    flags = {n: p.requires_grad for n, p in family.network.named_parameters()}
    sketches = None if project is None else {n: _CountSketch(n, p.numel(), project) for n, p in params.items()}
    try:
        for n, p in family.network.named_parameters():
            p.requires_grad_(n in params)
        for i in range(len(rows)):
            batch = family.collate([rows[i]], train_on=ctx.train_on)
            grads = torch.autograd.grad(_mean_loss(family, batch), list(params.values()), allow_unused=True)
            flat = {n: (torch.zeros_like(p) if g is None else g).flatten().float().cpu() for (n, p), g in zip(params.items(), grads)}
            whole = torch.cat(list(flat.values())) if sketches is None else torch.stack([sketches[n](g) for n, g in flat.items()]).sum(0)
            yield np.array([i]), _scaled(whole[None].numpy(), normalise)
    finally:
        for n, p in family.network.named_parameters():
            p.requires_grad_(flags[n])


def _sites(family: Any, sites: str | None) -> dict[str, torch.nn.Parameter]:
    known = {n: p for n, p in family.network.named_parameters() if p.is_floating_point()}
    if sites is None:
        return {n: p for n, p in known.items() if p.requires_grad} or known
    wanted = [s.strip() for s in sites.split(",") if s.strip()]
    found = {n: p for n, p in known.items() if any(s in n for s in wanted)}
    if not found:
        raise RecipeError(f"No parameter's name contains {' or '.join(wanted) or 'nothing'}; name others in `sites`.")
    return found


def _mean_loss(family: Any, batch: Batch) -> Tensor:
    if "score" in family.verbs and batch.sequences:
        return -family.score(batch).logp.mean()
    return torch.nn.functional.cross_entropy(family.classify(batch).float(), batch.tensors["labels"].to(family.device))


class _CountSketch:
    """A random projection in linear time: every entry is added, with a random sign, to one of k random places.

    E<s(g), s(h)> = <g, h> with a variance of about |g|^2 |h|^2 / k, as for a dense random matrix. Fixed by the tensor's name."""

    def __init__(self, name: str, size: int, k: int) -> None:
        g = torch.Generator().manual_seed(seed_of("gradient", name, k))
        self.place = torch.randint(k, (size,), generator=g, dtype=torch.int32)
        self.sign = torch.randint(0, 2, (size,), generator=g, dtype=torch.int8)
        self.k = k

    def __call__(self, flat: Tensor) -> Tensor:
        return torch.zeros(self.k).index_add_(0, self.place, flat * (2.0 * self.sign - 1))


SIGNALS: dict[str, Callable[..., Parts]] = {
    "embedding": _embedding, "loss": _row_scores("loss"), "perplexity": _row_scores("perplexity"), "entropy": _row_scores("entropy"),
    "hit": _row_scores("hit"), "length": _length, "gradient": _gradient,
}  # fmt: skip
