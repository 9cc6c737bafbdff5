"""`luthier compress`: a finished model made lighter by a compressor of the catalogue, and what that changed: size, speed and quality.

Every figure is measured: bytes of files and of tensors, tokens a second of both models taking turns in one process, and the loss and the
run's own measures of the model as it is loaded again from the folder that was written.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.catalog import built, method
from luthier.core import checkpoint
from luthier.core.context import Context
from luthier.core.places import Place, named_base, place_of, refuse_quantised
from luthier.core.rows import Rows
from luthier.errors import ModelError, RecipeError, UserError

if TYPE_CHECKING:
    import torch

    from luthier.core.families import Family
    from luthier.recipe import Recipe

PACKED = "packed"
"""Where in the new folder the compressor's own compact files lie, out of the way of those that transformers reads."""
FACTS = "compressed.json"
ROWS = 256
"""At most so many rows are scored."""


@dataclass
class Facts:
    """What was measured of one model. None: it could not be measured, e.g. for want of rows."""

    disk_bytes: int | None = None
    """The weight files that transformers or peft reads."""
    packed_bytes: int | None = None
    """The compressor's own compact file."""
    memory_bytes: int = 0
    """Parameters and buffers of the loaded model."""
    parameters: int = 0
    scored_per_second: float | None = None
    """Tokens of a language model, rows of another one."""
    decoded_per_second: float | None = None
    loss: float | None = None
    """The mean loss on the held-out rows."""
    measures: dict[str, float | None] = field(default_factory=dict)
    """The run's own measures, as "measure/number"."""


@dataclass
class Compressed:
    """What came of a compression."""

    folder: Path
    method: str
    model: str
    adapter: bool
    """Whether peft loads the folder; else transformers does."""
    before: Facts
    after: Facts
    rows: int
    """How many held-out rows were scored."""
    unit: str
    """What the speed of scoring counts: tokens or rows."""
    better: dict[str, str]
    """Of the measures: whether higher or lower is better."""
    report: dict[str, Any] = field(default_factory=dict)
    """What the compressor says of what it did."""
    notes: list[str] = field(default_factory=list)


@dataclass
class Finished(Context):
    """The context of a compressor that is applied to a finished model. What is missing is named with the argument that gives it."""

    compressor: str = ""

    def has_rows(self, name: str) -> bool:
        if name == "train" and not super().has_rows(name):
            raise RecipeError(f"The compressor '{self.compressor}' looks at rows to decide what to leave out; name some with --data.")
        return super().has_rows(name)


def compress(
    model: Any, how: str, out: str | Path, options: Mapping[str, Any] | None = None, data: Any = None, test: Any = None, base: Any = None,
    device: str = "auto", tell: Callable[[str], None] | None = None,
) -> Compressed:  # fmt: skip
    """Compress a run's model, a folder, an adapter or a named model with the compressor `how`, and write the result to `out`.

    `options`: the compressor's fields. `data`: rows to calibrate on; `test`: rows to measure the loss on. A run brings its own of both, and
    of other models a tenth of `data` is held out. `base`: what the model was tuned from; runs and adapters know theirs."""
    say = tell or (lambda sentence: None)
    compressor = _compressor(how, dict(options or {}))
    folder = Path(out).expanduser()
    _refuse_taken(folder)
    place, recipe = place_of(model), _recipe(model)
    for one in _with_base(place):
        refuse_quantised(one, "compressing")
    from luthier.core.models import load

    family = load(_spec(place, recipe), device=device)
    refuse_loaded(family, place)
    if family.kind not in compressor.families:
        raise RecipeError(f"The compressor '{how}' serves {', '.join(sorted(compressor.families))}; {place.source} is of the family '{family.kind}'.")
    ctx = _context(family, place, recipe, how, data, test, base, say)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with checkpoint.disk_errors(folder.parent, "model"), tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        work = Path(scratch) / "model"
        ctx.folder = work / PACKED
        ctx.folder.mkdir(parents=True)
        adapter = _write(compressor, family, place, ctx, work)
        if folder.exists():
            folder.rmdir()
        work.rename(folder)
    report = {k: str(v).replace(str(work), str(folder)) if isinstance(v, str) else v for k, v in getattr(compressor, "report", {}).items()}
    found = Compressed(folder, how, place.source, adapter, Facts(), Facts(), 0, "", {}, report)
    _measure(found, family, place, recipe, ctx, device)
    checkpoint.replace_text(folder / FACTS, json.dumps(asdict(found), indent=1, default=str))
    return found


# -- what is compressed --------------------------------------------------------------------------------------------------


def _compressor(how: str, options: dict[str, Any]) -> Any:
    cls: Any = method("compress", how)
    if cls.tunes:
        raise RecipeError(f"'{how}' compresses a model while it is tuned, so it cannot be applied to a finished one; name it under `compress` of a recipe for `luthier tune`.")
    return built("compress", how, options)


def _refuse_taken(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} already holds something; name a new or an empty folder with --out.")


def _recipe(model: Any) -> Recipe | None:
    """The recipe of a run's folder."""
    from luthier.run import open_run

    is_run = isinstance(model, (str, Path)) and (Path(model).expanduser() / "recipe.yaml").is_file()
    return open_run(Path(model).expanduser()).recipe if is_run else None


def _with_base(place: Place) -> list[Place]:
    return [place, place_of(named_base(place))] if place.kind == "adapter" else [place]


def _spec(place: Place, recipe: Recipe | None) -> Any:
    from luthier.run import spec_of

    return place.source if recipe is None or place.path is None else spec_of(place.path, recipe)


def refuse_loaded(family: Family, place: Place) -> None:
    """Integers in place of weights, which a folder's configuration does not always tell."""
    if getattr(family.config, "quantization_config", None) or any(not p.is_floating_point() for p in family.network.parameters()):
        raise ModelError(f"{place.source} holds quantised weights; compressing takes floating-point weights. Name the model it was quantised from.")


def _context(family: Family, place: Place, recipe: Recipe | None, how: str, data: Any, test: Any, base: Any, say: Callable[[str], None]) -> Finished:
    from luthier.core.stage import Evaluator

    streams = _streams(recipe, data, test, family, say)
    known = base if base is not None else named_base(place) if place.kind == "adapter" else recipe.model_spec() if recipe is not None else None
    ctx = Finished(family, recipe.train.seed if recipe else 0, streams, {"base": _lazy(known, how, str(family.device))}, tell=say, compressor=how)
    ctx.train_on = recipe.data.train_on if recipe else "completion"
    ctx.evaluator = Evaluator(None, ctx)  # type: ignore[arg-type]  # it belongs to no stage
    return ctx


def _lazy(base: Any, how: str, device: str) -> Callable[[], Family]:
    """The base, loaded when a compressor asks for it."""

    def read() -> Family:
        from luthier.core.models import load
        from luthier.core.stage import frozen

        if base is None:
            raise RecipeError(f"The compressor '{how}' stores what was changed of a base, and this model does not say which; name it with --base.")
        return frozen(load(base, device=device))

    return read


def _streams(recipe: Recipe | None, data: Any, test: Any, family: Family, say: Callable[[str], None]) -> dict[str, Rows]:
    """The run's rows, or those given; `calibration` and `val` are there for whoever asks."""
    from luthier.core.loading import load_streams

    streams: dict[str, Rows] = {}
    if recipe is not None:
        try:
            streams = load_streams(recipe.data.to_dict(), base=recipe.base)
        except UserError as error:
            say(f"The run's own rows cannot be read, so only those of --data and --test are used. {error}")
    if test is not None:
        streams["test"] = load_streams({"test": test}, base=Path())["test"]
    if data is not None:
        given = load_streams({"train": data, **({"test": streams["test"]} if "test" in streams else {})}, base=Path(), tell=say)
        streams = {**given, **streams, "calibration": given["train"]}
    return {name: fitted for name, rows in streams.items() if (fitted := _fitted(rows, family, recipe, say)) is not None}


def _fitted(rows: Rows, family: Family, recipe: Recipe | None, say: Callable[[str], None]) -> Rows | None:
    """The rows that the model reads whole."""
    from luthier.core.preflight import positions
    from luthier.core.rows import fit_lengths

    limit = (recipe.data.max_length if recipe else None) or (positions(family) if "score" in family.verbs else None)
    tokenizer = getattr(family, "tokenizer", None)
    if limit is None or tokenizer is None or not len(rows):
        return rows
    fitted = fit_lengths(rows, tokenizer, limit, "skip", recipe.data.train_on if recipe else "completion")
    if len(fitted) < len(rows):
        say(f"{len(rows) - len(fitted)} of {len(rows)} rows of {rows.source} are longer than {limit} tokens and left out.")
    return fitted if len(fitted) else None


# -- the result ----------------------------------------------------------------------------------------------------------


def _write(compressor: Any, family: Family, place: Place, ctx: Finished, folder: Path) -> bool:
    """Compress and write; says whether the result is an adapter. Whole models keep the precision of the files they came from."""
    from luthier.core.models import save_network

    lighter = compressor.compress(family, ctx) or family
    adapter = hasattr(lighter.network, "peft_config")
    if adapter:
        lighter.network.save_pretrained(folder, save_embedding_layers=False)
        if lighter.processor is not None:
            lighter.processor.save_pretrained(folder)
    else:
        dtype = _stored(_with_base(place)[-1])
        if dtype is not None:
            lighter.network.to(dtype)
        save_network(lighter, folder)
    if ctx.folder is not None and not any(ctx.folder.iterdir()):
        ctx.folder.rmdir()
    return adapter


def _stored(place: Place) -> torch.dtype | None:
    """Half precision, where the files hold it."""
    import torch

    from luthier.core.tensorfile import open_checkpoint

    files = _weight_files(place)
    if not files or place.gguf:
        return None
    opened = [open_checkpoint(f) for f in files]
    found = {meta[1] for one in opened for name in one.where if (meta := one.meta(name)) is not None and meta[1].is_floating_point}
    return next(iter(found)) if len(found) == 1 and found <= {torch.bfloat16, torch.float16} else None


def _weight_files(place: Place) -> list[Path]:
    if place.path is None:
        from huggingface_hub import snapshot_download

        try:
            return sorted(Path(snapshot_download(place.source, local_files_only=True)).glob("*.safetensors"))
        except (OSError, ValueError):
            return []
    return [place.path / place.gguf] if place.gguf else sorted(place.path.glob("*.safetensors"))


def _bytes(files: list[Path]) -> int | None:
    return sum(f.stat().st_size for f in files) if files else None


# -- what is known of it -------------------------------------------------------------------------------------------------


def _measure(found: Compressed, family: Family, place: Place, recipe: Recipe | None, ctx: Finished, device: str) -> None:
    """Both models as they are used: the one that was given, its adapter merged in where the result has none, and the new one as it is loaded."""
    from luthier.core.models import load
    from luthier.core.stage import merged

    lighter = load(str(found.folder), device=device)
    whole = not found.adapter and place.kind == "adapter"
    models = {"before": merged(family) if whole else family, "after": lighter}
    found.before.disk_bytes = _bytes([f for p in (_with_base(place) if whole else [place]) for f in _weight_files(p)])
    found.after.disk_bytes = _bytes(sorted(found.folder.glob("*.safetensors")))
    found.after.packed_bytes = _bytes(sorted((found.folder / PACKED).glob("*")))
    facts = {"before": found.before, "after": found.after}
    rows = ctx.streams.get("test", ctx.streams.get("val"))
    for when, model in models.items():
        facts[when].memory_bytes, facts[when].parameters = _held(model)
        _quality(found, facts[when], model, rows, recipe, ctx)
    _speed(found, facts, models, rows, ctx)
    if found.after.packed_bytes and found.after.memory_bytes >= found.before.memory_bytes:
        found.notes.append(f"The loaded weights are plain floats as before, so memory and speed are as they were; what became small is the file in {found.folder / PACKED}.")
    if rows is None:
        found.notes.append("There are no held-out rows, so the loss was not measured; name some with --test.")


def _held(model: Family) -> tuple[int, int]:
    """Bytes of all tensors in memory, those that are shared counted once; and the number of parameters."""
    tensors = [*model.network.parameters(), *model.network.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()), sum(p.numel() for p in model.network.parameters())


def _quality(found: Compressed, facts: Facts, model: Family, rows: Rows | None, recipe: Recipe | None, ctx: Finished) -> None:
    """The loss, and the measures of the run's recipe that look at one model alone."""
    from luthier.core.landscape import Landscape, collated

    if rows is None or not len(rows):
        return
    found.rows = min(ROWS, len(rows))
    facts.loss = Landscape(model, collated(model, rows, ctx.train_on, ROWS)).loss()
    own = Context(model, ctx.seed, {**ctx.streams, "test": rows}, dict(ctx.models), recipe.build_helpers() if recipe else {}, train_on=ctx.train_on)
    for choice in recipe.measure if recipe else []:
        measure = choice.build()
        if measure.compares or model.kind not in measure.families:
            continue
        with model.evaluating():
            result = measure.measure(model, rows, own)
        facts.measures |= {f"{choice.method}/{name}": None if value is None else float(value) for name, value in result.numbers.items()}
        found.better |= {f"{choice.method}/{name}": way for name, way in result.better.items()}


def _speed(found: Compressed, facts: dict[str, Facts], models: dict[str, Family], rows: Rows | None, ctx: Finished) -> None:
    from luthier.core.landscape import Landscape, collated
    from luthier.core.speed import decoding, scoring, side_by_side

    if "score" in models["after"].verbs:
        found.unit, work = "tokens", {name: scoring(model) for name, model in models.items()}
    elif rows is not None and len(rows):
        found.unit, count = "rows", min(64, len(rows))

        def reading(model: Family) -> Callable[[], int]:
            here = Landscape(model, collated(model, rows, ctx.train_on, count))
            return lambda: count if here.loss() is not None else 0

        work = {name: reading(model) for name, model in models.items()}
    else:
        return
    for name, speed in side_by_side(work).items():
        facts[name].scored_per_second = speed
    if "generate" in models["after"].verbs:
        for name, speed in side_by_side({n: decoding(m) for n, m in models.items()}).items():
            facts[name].decoded_per_second = speed
