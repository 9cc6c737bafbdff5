"""The recipe's own settings: how the loop runs, which rows there are."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from luthier._recipe.choice import Frame
from luthier._recipe.fit import shown, types_of
from luthier.errors import RecipeError, nearest


@dataclass
class Train:
    """How the loop runs; what is learned and how is the methods' affair."""

    epochs: float = 1.0
    """Passes over the training rows."""
    steps: int | None = None
    """Optimiser steps; overrides epochs."""
    batch: int = 16
    """Rows a step."""
    tokens_per_micro_batch: int = 512
    """How many tokens pass the model at once; what rows begin with alike counts once. Bounds memory only; the gradient is the same."""
    seed: int = 0
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup: float = 0.03
    """Steps over which the learning rate rises: a share of all below 1, a count from 1 on."""
    clip: float | None = 1.0
    """The gradient's largest norm; null: none."""
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "auto"
    """auto: bf16 where the device has it, else fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    reuse: int = 1
    """How often the policy's own answers are learned from before new ones are drawn."""
    save_every: int | None = None
    """Steps between checkpoints; null: by time; 0: none."""
    keep: int = 2
    """How many checkpoints stay."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl."""
    eval_every: int | None = None
    """Steps between evaluations on the validation rows."""
    threads: int | None = None
    """CPU threads; null: torch's choice."""
    tracker: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    """Where metrics go besides metrics.jsonl."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the model is; auto: the first kind of accelerator that is there."""
    ray: int | None = None
    """Workers of a Ray cluster (at RAY_ADDRESS, else on this machine) that compute embeddings, losses and gradients of rows; null: none."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """Under torchrun or accelerate launch: whole weights in every process (ddp) or split over them (fsdp). auto: what accelerate's configuration asks for, else ddp."""

    def __post_init__(self) -> None:
        for name in ("batch", "tokens_per_micro_batch", "reuse", "keep", "log_every"):
            _at_least(name, getattr(self, name), 1)
        for name in ("steps", "eval_every", "threads", "ray"):
            _at_least(name, getattr(self, name), 1)
        for name in ("seed", "warmup", "save_every"):
            _at_least(name, getattr(self, name), 0)
        for name in ("epochs", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise RecipeError(f"{name} is {value}; it must be above 0" + (" (null for none)." if name == "clip" else "."))


def _at_least(name: str, value: float | None, low: int) -> None:
    if value is not None and value < low:
        raise RecipeError(f"{name} is {value}; it must be at least {low}.")


STREAMS = ("train", "test", "val", "general", "ood", "gold", "unlabelled", "calibration", "target")
"""Row streams that methods commonly ask for; a recipe may name more."""
OTHER_WORDS = {"validation": "val", "valid": "val", "dev": "val", "eval": "test", "unlabeled": "unlabelled"}


@dataclass
class Data:
    """Row streams by name, and how rows are read."""

    streams: dict[str, Any] = field(default_factory=dict)
    """A path, `lab:TASK`, a hub id or a list of rows for each of train, test, val, general, ood ..."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns to rename."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a bad row does: stop the run before training, or be set aside and counted."""
    train_on: Literal["completion", "assistant", "last", "all"] = "completion"
    """Which tokens are supervised."""
    max_length: int | None = None
    """Tokens a row may have."""
    too_long: Literal["stop", "skip", "cut"] = "stop"
    """What becomes of longer rows: refused, set aside and counted, or cut."""
    limit: int | None = None
    """How many rows of a stream are read at most."""
    holdout: int | float | None = None
    """How many training rows (a count, or a share below 1) are held out where no test rows are named; 0: none."""

    def __post_init__(self) -> None:
        for name in ("max_length", "limit"):
            _at_least(name, getattr(self, name), 1)
        _at_least("holdout", self.holdout, 0)

    def to_dict(self) -> dict[str, Any]:
        """As a recipe's `data` key has it."""
        return {**self.streams, **{k: v for k in OPTIONS if (v := getattr(self, k)) not in (None, {})}}


OPTIONS = tuple(f.name for f in dataclasses.fields(Data) if f.name != "streams")
MODEL_TYPES: dict[str, Any] = {
    "id": str, "dtype": Literal["auto", "fp32", "bf16", "fp16", "float32", "bfloat16", "float16"], "attention": str,
    "trust_remote_code": bool, "tokenizer": str, "template": str,
}  # fmt: skip


def train(value: Any, frame: Frame) -> Train:
    """The `train` key."""
    if value is None:
        return Train()
    known = types_of(Train)
    _keys(value, list(known), frame, "train", "setting of train")
    given = {k: frame.fit(("train", k), v, known[k]) for k, v in value.items()}
    try:
        return Train(**given)
    except RecipeError as error:
        raise frame.error(("train", str(error).split()[0]), f"{frame.label}train.{error}") from error


def data(value: Any, frame: Frame) -> Data:
    """The `data` key: one source of training rows, or a mapping of streams and options."""
    if value is None:
        return Data()
    if not isinstance(value, Mapping):
        value = {"train": value}
    known = types_of(Data)
    options, streams = {}, {}
    for key, item in value.items():
        if key in OPTIONS:
            options[key] = frame.fit(("data", key), item, known[key])
        elif item is not None:
            _stream_name(key, frame)
            streams[key] = _source(key, item, frame)
    try:
        return Data(streams, **options)
    except RecipeError as error:
        raise frame.error(("data", str(error).split()[0]), f"{frame.label}data.{error}") from error


def _stream_name(key: Any, frame: Frame) -> None:
    """Streams have free names, but one that is nearly a known word is a slip."""
    if not isinstance(key, str) or not key.isidentifier():
        raise frame.error(("data", key), f"data: {key!r} is no name of a row stream; use letters, digits and underscores.")
    if key in STREAMS or any(re.fullmatch(rf"{w}[_\d]\w*", key) for w in STREAMS):
        return
    meant = OTHER_WORDS.get(key) or next(iter(difflib.get_close_matches(key, (*STREAMS, *OPTIONS), n=1, cutoff=0.75)), None)
    if meant:
        raise frame.error(("data", key), f"data: '{key}' is neither a row stream nor an option. Did you mean '{meant}'?")


def _source(key: str, value: Any, frame: Frame) -> Any:
    if isinstance(value, (str, Path)):
        return str(value)
    if isinstance(value, (list, tuple)):
        if value and (all(isinstance(row, Mapping) for row in value) or all(isinstance(path, (str, Path)) for path in value)):
            return [str(v) if isinstance(v, Path) else v for v in value]
        raise frame.error(("data", key), f"data.{key} is a list of neither rows nor paths; give a path, a hub id, `lab:TASK` or a list of rows.")
    if isinstance(value, Mapping):
        return _detailed(key, value, frame)
    if hasattr(value, "__len__") and hasattr(value, "__getitem__") and not isinstance(value, (bytes, bytearray)):
        return value
    raise frame.error(("data", key), f"data.{key} is {shown(value)}; it must be a path, a hub id, `lab:TASK` or a list of rows.")


def _detailed(key: str, value: Mapping[Any, Any], frame: Frame) -> dict[str, Any]:
    """A stream with reading options of its own, {path: ..., columns: ..., on_error: ..., limit: ...}; or its columns as lists."""
    if value and all(isinstance(v, (list, tuple)) for v in value.values()) and "path" not in value:
        return dict(value)
    known = {"path": str | list[str], **{k: v for k, v in types_of(Data).items() if k in ("columns", "on_error", "limit")}}
    for name in value:
        if name not in known:
            raise frame.error(("data", key, name), f"data.{key}.{name} is no option of a stream of rows.{nearest(name, known)}")
    if "path" not in value:
        raise frame.error(("data", key), f"data.{key} names no rows; add `path:`.")
    return {k: frame.fit(("data", key, k), v, known[k]) for k, v in value.items()}


def model(value: Any, frame: Frame, place: tuple[str, ...]) -> Any:
    """A model's spec: a name or folder, a mapping of loading options, or a model in memory."""
    if value is None or hasattr(value, "network"):
        return value
    if isinstance(value, (str, Path)) and str(value):
        return {"id": str(value)}
    if not isinstance(value, Mapping):
        raise frame.error(place, f"{frame.key(place)} is {shown(value)}; it must be a name, a hub id, a folder, or {{id: ..., dtype: ...}}.")
    for key in value:
        if key not in MODEL_TYPES:
            raise frame.error((*place, key), f"{frame.key((*place, key))} is no option of a model.{nearest(key, MODEL_TYPES)}")
    if "id" not in value:
        raise frame.error(place, f"{frame.key(place)} names no model; add `id:`.")
    return {k: frame.fit((*place, k), v, MODEL_TYPES[k]) for k, v in value.items() if v is not None}


def _keys(value: Any, known: list[str], frame: Frame, place: str, what: str) -> None:
    if not isinstance(value, Mapping):
        raise frame.error((place,), f"{frame.key((place,))} is {shown(value)}; it must be keys with values ({{key: value}}).")
    for key in value:
        if key not in known:
            raise frame.error((place, key), f"{frame.key((place, key))} is no {what}.{nearest(key, known)}")
