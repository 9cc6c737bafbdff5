"""Luthier: a workshop for fine-tuning. Published methods as plug-ins that compose in one recipe, with evidence.

    import luthier
    run = luthier.tune({"model": "smollm2-135m", "data": "train.jsonl", "objective": "asft"})

Importing this loads neither torch nor a method; both come when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier.advise import advise
    from luthier.catalog import entries as methods
    from luthier.catalog import method
    from luthier.compare import compare
    from luthier.core.models import load
    from luthier.papers import papers
    from luthier.recipe import Recipe, check
    from luthier.run import tune

__version__ = "0.1.0"
__all__ = ["Recipe", "__version__", "advise", "check", "compare", "load", "method", "methods", "papers", "tune"]

_HOMES: dict[str, tuple[str, str | None]] = {
    "tune": ("luthier.run", "tune"), "Recipe": ("luthier.recipe", "Recipe"), "check": ("luthier.recipe", "check"),
    "method": ("luthier.catalog", "method"), "methods": ("luthier.catalog", "entries"), "load": ("luthier.core.models", "load"),
    "papers": ("luthier.papers", None), "compare": ("luthier.compare", None), "advise": ("luthier.advise", None),
}  # fmt: skip
"""Where each public name lives. The modules `papers`, `compare` and `advise` are themselves called."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'luthier' has no attribute '{name}'")
    import importlib

    module, attribute = _HOMES[name]
    found = importlib.import_module(module)
    return found if attribute is None else getattr(found, attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
