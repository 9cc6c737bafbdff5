"""Streaming statistics of what enters a model's linear layers, from a few calibration rows.

`collect` runs the model once over rows in eval mode and keeps, for every linear layer, only what was asked for: the second
moment X^T X, the column norms, the largest absolute inputs, the mean. Padding is left out; a language model sees every row as a
sequence of its own (rows that share a beginning are not merged, so a token counts once for every row it is in).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from luthier.core.families import Family

What = Literal["second_moment", "column_norm", "abs_max", "abs_mean", "mean"]
Scale = Literal["none", "abs_max", "max"]


def linear_layers(network: nn.Module, head: bool = False) -> dict[str, nn.Module]:
    """Linear layers (and transformers' Conv1D) by name, without the language-model head unless asked. Layers below a layer are left out."""
    from transformers.pytorch_utils import Conv1D

    output = getattr(network, "get_output_embeddings", lambda: None)()
    return {n: m for n, m in network.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and (head or m is not output)}


def collect(
    model: Family,
    rows: SequenceOf[Mapping[str, Any]],
    what: Iterable[What] = ("second_moment",),
    sites: Mapping[str, nn.Module] | SequenceOf[str] | None = None,
    scale: Scale = "none",
    batch: int = 16,
    dtype: torch.dtype = torch.float32,
) -> dict[str, dict[str, Any]]:
    """Statistics of the inputs of linear layers, by layer name.

    `sites`: names (of `model.base_network`) or modules by name; default every linear layer but the head. Each layer gets

    - second_moment: sum over tokens of x x^T, [in, in];
    - column_norm: sqrt(sum over tokens of x_j^2), [in] (Wanda's ||X_j||_2);
    - abs_max: max over tokens of |x_j|, [in];
    - abs_mean, mean: mean over tokens of |x_j| and of x_j, [in];
    - tokens, sequences: how many were seen (always).

    `scale` divides each sequence's inputs by its largest |x| ("abs_max") or by |its largest x| ("max") before the sums, as
    CorDA does; all sums are then of the scaled inputs. Weights, gradients and train/eval modes are left as they are."""
    wanted: set[str] = set(what)
    unknown = wanted - set(get_args(What))
    if unknown:
        raise ValueError(f"collect knows no statistic {sorted(unknown)[0]!r}.")
    layers = _sites(model, sites)
    sums = {name: _Sums(wanted, scale, dtype) for name in layers}
    current: dict[str, Tensor | None] = {"mask": None}
    handles = [m.register_forward_pre_hook(sums[n].hook(current)) for n, m in layers.items()]
    try:
        with model.evaluating():
            for run, mask in passes(model, rows, batch):
                current["mask"] = mask
                run()
    finally:
        for handle in handles:
            handle.remove()
    return {name: one.result() for name, one in sums.items() if one.tokens}


def passes(model: Family, rows: SequenceOf[Mapping[str, Any]], batch: int = 16) -> Iterator[tuple[Callable[[], Any], Tensor | None]]:
    """Forward passes over rows, unpacked: a function that runs one, and which of its [sequences, tokens] are real (None: all)."""
    from luthier.core.batch import TokenForest

    for start in range(0, len(rows), batch):
        collated = model.collate([rows[i] for i in range(start, min(len(rows), start + batch))])
        if collated.sequences and hasattr(model, "hidden"):
            forest = TokenForest.pack(collated.sequences, share=False, pad=getattr(model, "pad_id", 0))
            mask = torch.from_numpy(forest.nodes >= 0).to(model.device)
            yield functools.partial(model.hidden, forest), mask
        elif collated.sequences and "image" in collated.tensors:
            for branch in dict.fromkeys(s.branch for s in collated.sequences):
                padded = model.padded([s for s in collated.sequences if s.branch == branch])  # type: ignore[attr-defined]
                yield functools.partial(model.embed, collated, branch), padded["attention_mask"].bool()
            yield functools.partial(model.embed, collated, "image"), None
        else:
            real = collated.tensors.get("attention_mask")
            yield _verb(model, collated), None if real is None else real.bool()


def _verb(model: Family, batch: Any) -> Callable[[], Any]:
    for verb in ("classify", "embed", "score"):
        if verb in model.verbs:
            return lambda: getattr(model, verb)(batch)
    raise ValueError(f"A model of the family '{model.kind}' has no verb to collect statistics with.")


def _sites(model: Family, sites: Mapping[str, nn.Module] | SequenceOf[str] | None) -> dict[str, nn.Module]:
    if isinstance(sites, Mapping):
        return dict(sites)
    layers = linear_layers(model.base_network, head=sites is not None)
    if sites is None:
        return layers
    missing = [s for s in sites if s not in layers]
    if missing:
        raise ValueError(f"The network has no linear layer '{missing[0]}'.")
    return {s: layers[s] for s in sites}


@dataclass
class _Sums:
    """The running sums of one layer."""

    what: set[str]
    scale: Scale
    dtype: torch.dtype
    tokens: int = 0
    sequences: int = 0
    values: dict[str, Tensor] = field(default_factory=dict)

    def hook(self, current: dict[str, Tensor | None]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def listen(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self.add(inputs[0].detach(), current["mask"])

        return listen

    def add(self, x: Tensor, mask: Tensor | None = None) -> None:
        """`x` is [sequences, tokens, in] or [rows, in]; `mask` says which tokens count."""
        x = x.to(self.dtype)
        x = x.flatten(1, -2) if x.ndim > 3 else x[:, None] if x.ndim == 2 else x
        if mask is not None and mask.shape == x.shape[:2]:
            x = x * mask[..., None]
            tokens, sequences = int(mask.sum()), int(mask.any(1).sum())
        else:
            tokens, sequences = x.shape[0] * x.shape[1], x.shape[0]
            mask = None
        if self.scale != "none":
            top = x.abs() if self.scale == "abs_max" else x if mask is None else x.masked_fill(~mask[..., None], -torch.inf)
            top = top.flatten(1).amax(1).abs()
            top = torch.where(torch.isfinite(top) & (top > 0), top, torch.ones_like(top))
            x = x / top[:, None, None]
        self.tokens += tokens
        self.sequences += sequences
        flat = x.flatten(0, 1)
        if "second_moment" in self.what:
            self._sum("second_moment", flat.T @ flat)
        if "column_norm" in self.what:
            self._sum("column_norm", flat.square().sum(0))
        if "mean" in self.what:
            self._sum("mean", flat.sum(0))
        if "abs_mean" in self.what:
            self._sum("abs_mean", flat.abs().sum(0))
        if "abs_max" in self.what:
            top = flat.abs().amax(0)
            self.values["abs_max"] = torch.maximum(self.values.get("abs_max", top), top)

    def _sum(self, name: str, value: Tensor) -> None:
        self.values[name] = self.values[name] + value if name in self.values else value

    def result(self) -> dict[str, Any]:
        out: dict[str, Any] = {**self.values, "tokens": self.tokens, "sequences": self.sequences}
        if "column_norm" in out:
            out["column_norm"] = out["column_norm"].sqrt()
        for name in {"mean", "abs_mean"} & set(out):
            out[name] = out[name] / max(1, self.tokens)
        return out
