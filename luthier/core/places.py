"""Where a model that a user names is: an embedded package, a lab model, a folder, a GGUF file, or the hub."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from luthier.core.fetch import ALIASES, EMBEDDED, fetch
from luthier.errors import ModelError, nearest

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")


@dataclass(frozen=True)
class Place:
    """A model's folder (None: the hub has it), what is in it, and the name under which it is found again."""

    kind: Literal["model", "adapter"]
    path: Path | None
    source: str
    gguf: str | None = None


def place_of(spec: Any) -> Place:
    """Find a model; a sentence says what is wrong if there is none."""
    name = str(spec)
    known = ALIASES.get(name.lower(), name)
    if known in EMBEDDED:
        return Place("model", fetch(known), known)
    if name.startswith("lab:"):
        from luthier.lab import model_path

        return Place("model", Path(model_path(name.removeprefix("lab:"))), name)
    path = Path(name).expanduser()
    if path.is_file():
        return _file(path.resolve())
    if path.is_dir():
        return _folder(path.resolve())
    if not HUB_ID.fullmatch(name) or isinstance(spec, Path):
        raise ModelError(f"There is no model at {name}.{nearest(name, [*EMBEDDED, *ALIASES])}")
    return _hub(name)


def named_base(place: Place) -> str:
    """The model that an adapter says it was trained on."""
    assert place.path is not None
    named = json.loads((place.path / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not named:
        raise ModelError(f"The adapter {place.source} does not say which model it was trained on; name it with --base.")
    return str(named)


def refuse_quantised(place: Place, doing: str) -> None:
    """One sentence for a folder whose configuration says that its weights are no plain numbers; `doing` says what needs those."""
    config = {} if place.path is None or place.kind == "adapter" or place.gguf else json.loads((place.path / "config.json").read_text(encoding="utf-8"))
    found = config.get("quantization_config")
    if found:
        kind = found.get("quant_method", "some method") if isinstance(found, Mapping) else "some method"
        raise ModelError(f"{place.source} holds weights that were quantised by {kind}; {doing} takes floating-point weights. Name the model it was quantised from.")


def _file(path: Path) -> Place:
    if path.suffix == ".gguf":
        return Place("model", path.parent, str(path), path.name)
    if path.suffix == ".safetensors":
        raise ModelError(f"{path} is a file of weights only; name the folder that holds it together with config.json and the tokenizer.")
    raise ModelError(f"{path} is no model: name a folder, a .gguf file, or one of {', '.join(EMBEDDED)}.")


def _folder(path: Path) -> Place:
    if (path / "adapter_config.json").is_file():
        return Place("adapter", path, str(path))
    if (path / "config.json").is_file():
        if not any(path.glob("*.safetensors")):
            _refuse_pickles(path)
        return Place("model", path, str(path))
    if (path / "recipe.yaml").is_file():
        if (path / "model").is_dir():
            return _folder(path / "model")
        raise ModelError(f"The run {path} has no model yet; it is not finished. Continue it with `luthier tune --resume`.")
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return _file(files[0])
    if files:
        raise ModelError(f"{path} holds {len(files)} GGUF files; name one of them, e.g. {files[0]}.")
    raise ModelError(f"{path} is no model folder: it has no config.json (nor adapter_config.json, recipe.yaml or a .gguf file).")


def _refuse_pickles(path: Path) -> None:
    pickles = [p for pattern in PICKLES for p in sorted(path.glob(pattern)) if p.name != "training_args.bin"]
    if pickles:
        raise ModelError(
            f"{pickles[0]} is in a format that can run code when it is read. Convert it once where you trust it: "
            "AutoModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) writes safetensors; use the class that config.json names."
        )
    raise ModelError(f"{path} has a config.json but no weights (*.safetensors).")


def _hub(name: str) -> Place:
    """A hub id, if its files are at hand or the hub can be reached (transformers itself would retry for half a minute)."""
    from huggingface_hub import try_to_load_from_cache

    known = f"There is no folder '{name}'{_or_else(name)}, and"
    if not isinstance(try_to_load_from_cache(name, "config.json"), str) and not _hub_reachable():
        raise ModelError(f"{known} the hub cannot be reached to look for a model of that name. Embedded models need no network: {', '.join(EMBEDDED)}.")
    return Place("model", None, name)


def _or_else(name: str) -> str:
    hint = nearest(name, [*EMBEDDED, *ALIASES])
    return f" ({hint.strip()})" if hint else ""


def _hub_reachable() -> bool:
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
        return False
    if any(os.environ.get(k) for k in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    from huggingface_hub import constants

    where = urlparse(constants.ENDPOINT)
    try:
        with socket.create_connection((where.hostname or "", where.port or 443), timeout=5):
            return True
    except OSError:
        return False
