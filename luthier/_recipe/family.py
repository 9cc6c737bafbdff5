"""What kind of model a folder holds, from its config.json alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DUAL = ("clip", "siglip", "siglip2", "chinese_clip", "altclip", "align", "vision-text-dual-encoder")
VISION = ("vit", "deit", "beit", "swin", "swinv2", "convnext", "convnextv2", "resnet", "dinov2", "mobilenet_v2", "efficientnet")
TEXT = (
    "bert", "roberta", "xlm-roberta", "distilbert", "mpnet", "albert", "electra", "deberta", "deberta-v2", "modernbert", "camembert", "nomic_bert", "ernie",
)  # fmt: skip


def family_of(source: Any) -> str | None:
    """The family of a model in memory, an embedded one or a local folder; None where it cannot be told without loading it."""
    if hasattr(source, "network"):
        return getattr(source, "kind", None)
    name = str(source["id"] if isinstance(source, dict) else source)
    folder = _place(name)
    if folder is None:
        # Not fetched yet: a GGUF file holds a language model.
        return "causal-lm" if (package := embedded(name)) is not None and package[1].gguf else None
    adapter = _json(folder / "adapter_config.json")
    if adapter and not (folder / "config.json").is_file():
        base = Path(str(adapter.get("base_model_name_or_path")))
        return family_of(base) if base.is_dir() and base != folder else None
    config = _json(folder / "config.json")
    kind = str(config.get("model_type", ""))
    for name in config.get("architectures") or []:
        if str(name).endswith(("ForCausalLM", "LMHeadModel")):
            return "causal-lm"
        if str(name).endswith("ForImageClassification"):
            return "image-classifier"
        if kind not in DUAL and str(name).endswith(("ForSequenceClassification", "ForMaskedLM")):
            return "text-encoder"
    if kind in DUAL:
        return "dual-encoder"
    return "text-encoder" if kind in TEXT else "image-classifier" if kind in VISION else None


def embedded(name: str) -> tuple[str, Any] | None:
    """The full name and the package of a model that comes with the library."""
    from luthier.core.fetch import ALIASES, EMBEDDED

    known = ALIASES.get(name.lower(), name)
    return (known, EMBEDDED[known]) if known in EMBEDDED else None


def _place(name: str) -> Path | None:
    """The folder that a name means; None for an embedded model that is not fetched yet."""
    if (package := embedded(name)) is not None:
        from luthier.core.fetch import cache_folder

        folder = cache_folder() / package[0]
        return folder if folder.is_dir() else None
    if name.startswith("lab:"):
        from luthier.lab import WEIGHTS

        return Path(WEIGHTS) / name.removeprefix("lab:")
    return Path(name).expanduser()


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
