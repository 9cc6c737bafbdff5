"""`luthier merge`: checkpoints of any size combined tensor by tensor, from folders into a folder that transformers loads.

Memory holds the few tensors that one tensor of the result is made of; of a merger that says `by_rows`, a few rows of them. A merge that was interrupted goes on with the first shard that
was not finished.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.catalog import built
from luthier.core import checkpoint
from luthier.core.context import Context
from luthier.core.places import Place, named_base, place_of, refuse_quantised
from luthier.core.source import SHARD, TensorSource
from luthier.errors import ModelError, UserError

Progress = Callable[[int, int, str], None]
WITHOUT_BASE = frozenset({"uniform-soup", "greedy-soup", "learned-soup", "linear", "slerp"})
"""Mergers of whole models; the others combine what was changed of a common base."""
BESIDE = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "modules.json", "sentence_bert_config.json", "1_Pooling",
          "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "spiece.model", "sentencepiece*", "chat_template*")  # fmt: skip
"""What a model folder holds besides its weights."""


@dataclass
class Merged:
    """What came of a merge."""

    folder: Path
    method: str
    models: list[str]
    base: str | None
    tensors: int
    bytes: int
    report: dict[str, Any] = field(default_factory=dict)
    """What the merger says of what it chose."""


def merge(
    models: SequenceOf[Any], how: str = "uniform-soup", out: str | Path = "merged", base: Any = None, options: Mapping[str, Any] | None = None,
    val: Any = None, max_shard_bytes: int = SHARD, progress: Progress | None = None, tell: Callable[[str], None] | None = None,
) -> Merged:  # fmt: skip
    """Combine models (folders, runs, adapters, embedded names, hub ids) and write the result to `out`.

    `base`: what they were tuned from; adapters name theirs. `options`: the merger's fields. `val`: rows to choose with, for mergers that
    score candidates. A folder that an interrupted merge left is continued, one with anything else in it is refused."""
    say = tell or (lambda sentence: None)
    merger = built("merge", how, options or {})
    places = [place_of(m) for m in _several(models)]
    home = _base(places, base, how)
    for place in [*([home] if home else []), *places]:
        refuse_quantised(place, "merging")
    start = None if home is None else _source(home, None)
    tuned = [_source(p, start) for p in places]
    folder, like = Path(out).expanduser(), home or places[0]
    identity = _identity(how, options, [*([home] if home else []), *places], val)
    _ready(folder, identity)
    ctx = _context(like, val, folder, say)
    for sentence in _notices(places):
        say(sentence)
    with checkpoint.disk_errors(folder, "model"):
        result = TensorSource.of(merger.merge(start, tuned, ctx))
        result.by_rows |= bool(getattr(merger, "by_rows", False))
        files = result.save(folder, max_shard_bytes, progress, identity)
        _beside(like, folder)
    report = {k: v for k, v in getattr(merger, "report", {}).items() if isinstance(v, (int, float, str, list))}
    return Merged(folder, how, [p.source for p in places], home.source if home else None, len(result.distinct), sum(f.stat().st_size for f in files), report)


# -- what is merged ------------------------------------------------------------------------------------------------------


def _several(models: SequenceOf[Any]) -> list[Any]:
    if isinstance(models, (str, Path)) or not len(models):
        raise UserError("Name the models to merge, e.g. `luthier merge A B C --method ties --base BASE`.")
    return list(models)


def _base(places: list[Place], base: Any, how: str) -> Place | None:
    """The common base: as given, or the one that all adapters name. Adapters of different bases cannot be combined."""
    named = {p.source: place_of(named_base(p)).source for p in places if p.kind == "adapter"}
    if base is not None:
        return place_of(base)
    if len(set(named.values())) > 1:
        (a, of_a), (b, of_b) = next((x, y) for x in named.items() for y in named.items() if x[1] != y[1])
        raise ModelError(f"These adapters belong to different models: {a} was trained on {of_a}, {b} on {of_b}. Merge adapters of one base, or name the base they share with --base.")
    if named:
        return place_of(next(iter(named.values())))
    if how not in WITHOUT_BASE:
        raise ModelError(f"The merger '{how}' combines what was changed of a common base; name the model that these were tuned from with --base.")
    return None


def _source(place: Place, base: TensorSource | None) -> TensorSource:
    """A model's tensors, read from its folder where that holds plain safetensors, else from the loaded model."""
    if place.path is not None and place.gguf is None:
        return TensorSource.of(place.path, base)
    from luthier.core.models import load

    return TensorSource.of(load(place.source, device="cpu"))


def _notices(places: list[Place]) -> list[str]:
    """What a user may want to know of adapters that differ."""
    known = {p.source: json.loads((p.path / "adapter_config.json").read_text(encoding="utf-8")) for p in places if p.kind == "adapter" and p.path is not None}
    said = []
    for key, word in (("r", "rank"), ("target_modules", "target modules")):
        values = {name: json.dumps(sorted(v) if isinstance(v := config.get(key), list) else v) for name, config in known.items()}
        if len(set(values.values())) > 1:
            said.append(f"The adapters differ in their {word}; each is merged as the full update that it stands for.")
    return said


# -- where it goes -------------------------------------------------------------------------------------------------------


def _identity(how: str, options: Mapping[str, Any] | None, places: list[Place], val: Any) -> str:
    """Changes when the merge would be another one: its method, options, models or their files."""
    stamps = [[p.source, sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in p.path.glob("*.safetensors")) if p.path else []] for p in places]
    told = json.dumps([how, sorted((options or {}).items()), stamps, str(val)], default=str)
    return hashlib.sha256(told.encode()).hexdigest()


def _ready(folder: Path, identity: str) -> None:
    """An empty folder, or one that this very merge left unfinished."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a new or an empty folder with --out.")
    left = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    if left and left != [".partial"]:
        raise UserError(f"{folder} already holds something; name a new or an empty folder with --out.")
    mark = folder / ".partial" / "identity"
    if left and (not mark.is_file() or mark.read_text() != identity):
        shutil.rmtree(folder / ".partial")
    folder.mkdir(parents=True, exist_ok=True)


def _context(like: Place, val: Any, folder: Path, say: Callable[[str], None]) -> Context:
    """What mergers that score candidates need: the validation rows, and a model to try weights in."""
    ctx = Context(tell=say)
    if val is None:
        return ctx
    from luthier.core.models import load
    from luthier.core.rows import load_streams
    from luthier.core.stage import Evaluator

    family = load(like.source, device="cpu")
    rows = load_streams({"val": val}, base=Path(), tell=say)
    if hasattr(family, "fit_to"):
        family.fit_to(rows["val"], 0)
    ctx.current, ctx.streams = family, rows
    ctx.evaluator = Evaluator(None, ctx)  # type: ignore[arg-type]  # it belongs to no stage
    return ctx


def _beside(like: Place, folder: Path) -> None:
    """Configuration and tokenizer, so that transformers loads the folder."""
    if like.path is None or like.gguf is not None:
        from luthier.core.models import load

        family = load(like.source, device="cpu")
        family.config.save_pretrained(folder)
        if family.processor is not None:
            family.processor.save_pretrained(folder)
        return
    for pattern in BESIDE:
        for found in like.path.glob(pattern):
            (shutil.copytree if found.is_dir() else shutil.copy2)(found, folder / found.name)
