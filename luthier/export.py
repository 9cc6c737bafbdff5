"""Writing a run's model for use elsewhere: merged, as an adapter, or as a GGUF file."""

from __future__ import annotations

import shutil
from pathlib import Path

from luthier.errors import ModelError, UserError
from luthier.run import Run, open_run, spec_of


def export(run: str | Path, form: str, out: str | Path | None = None) -> Path:
    """Write a run's model as "merged" (plain transformers), "adapter" (peft) or "gguf"."""
    from luthier.core.models import export_gguf, load, save_network
    from luthier.core.stage import merged

    opened = open_run(run)
    adapter = (opened.model_path / "adapter_config.json").is_file()
    if form == "adapter" and not adapter:
        raise ModelError("This run's result is a whole model, not an adapter; use --merged.")
    target = _target(opened, form, out)
    if form == "adapter":
        shutil.copytree(opened.model_path, target, dirs_exist_ok=True)
        return target
    family = merged(load(spec_of(opened.model_path, opened.recipe), device="cpu"))
    if form == "merged":
        save_network(family, target)
        return target
    whole = opened.folder / ".merged-for-gguf"
    try:
        save_network(family, whole)
        return export_gguf(whole, target)
    finally:
        shutil.rmtree(whole, ignore_errors=True)


def _target(opened: Run, form: str, out: str | Path | None) -> Path:
    """Where an export goes: by default into the run, else a file or folder that holds nothing yet."""
    if out is None:
        return opened.folder / {"merged": "merged", "adapter": "adapter", "gguf": "model.gguf"}[form]
    target = Path(out).expanduser()
    if form == "gguf" and target.is_dir():
        return target / "model.gguf"
    if form != "gguf" and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} already holds something; name a new or an empty folder with --out.")
    return target
