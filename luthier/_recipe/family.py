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
    """The family of a model in memory or in a local folder; None where it cannot be told without loading it."""
    if hasattr(source, "network"):
        return getattr(source, "kind", None)
    folder = Path(str(source["id"] if isinstance(source, dict) else source)).expanduser()
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


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
