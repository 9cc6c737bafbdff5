"""A method's fields, read from its source: a wrong key is refused before torch or a user's file is imported."""

from __future__ import annotations

import ast
import functools
import types
import typing
from pathlib import Path
from typing import Any

from luthier.catalog import PACKAGE

_NAMES = {**vars(typing), "Literal": typing.Literal, "Any": Any}


def static_types(path: Path, class_name: str) -> dict[str, Any] | None:
    """The fields of a dataclass with their types (Any where a type is not a builtin); None if the source alone does not tell."""
    tree = _parsed(path)
    if tree is None:
        return None
    node = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == class_name), None)
    if node is None:
        return None
    found: dict[str, Any] = {}
    for base in reversed(node.bases):
        inherited = _base(tree, path, base)
        if inherited is None:
            return None
        found |= inherited
    if _is_dataclass(node):
        found |= {name: hint for name, hint in map(_field, node.body) if name}
    return found


def sole_method(path: Path) -> str | None:
    """The class that a file registers, if it is one."""
    tree = _parsed(path)
    registered = [n.name for n in tree.body if isinstance(n, ast.ClassDef) and _has(n, "register")] if tree else []
    return registered[0] if len(registered) == 1 else None


def _parsed(path: Path) -> ast.Module | None:
    try:
        return _parsed_at(path, path.stat().st_mtime_ns)
    except (OSError, SyntaxError, ValueError):
        return None


@functools.lru_cache(maxsize=512)
def _parsed_at(path: Path, changed: int) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _base(tree: ast.Module, path: Path, base: ast.expr) -> dict[str, Any] | None:
    """The fields that a base class brings, wherever in the library it is written."""
    if not isinstance(base, ast.Name):
        return None
    if any(isinstance(n, ast.ClassDef) and n.name == base.id for n in tree.body):
        return static_types(path, base.id)
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level == 0 and any((a.asname or a.name) == base.id for a in node.names):
            original = next(a.name for a in node.names if (a.asname or a.name) == base.id)
            file = _module_file(node.module or "")
            return {} if file is not None and original == "Plugin" else static_types(file, original) if file else None
    return {} if base.id in ("object", "ABC") else None


def _module_file(module: str) -> Path | None:
    parts = module.split(".")
    if parts[0] != PACKAGE.name:
        return None
    place = PACKAGE.joinpath(*parts[1:])
    return next((p for p in (place.with_suffix(".py"), place / "__init__.py") if p.is_file()), None)


def _has(node: ast.ClassDef, name: str) -> bool:
    for decorator in node.decorator_list:
        called = decorator.func if isinstance(decorator, ast.Call) else decorator
        if name in (getattr(called, "id", None), getattr(called, "attr", None)):
            return True
    return False


def _is_dataclass(node: ast.ClassDef) -> bool:
    return _has(node, "dataclass")


def _field(node: ast.stmt) -> tuple[str, Any]:
    if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
        return "", None
    written = ast.unparse(node.annotation)
    if "ClassVar" in written or _is_internal(node.value):
        return "", None
    holder = types.SimpleNamespace(__annotations__={node.target.id: written})
    try:
        return node.target.id, typing.get_type_hints(holder, globalns=dict(_NAMES))[node.target.id]
    except (NameError, AttributeError, TypeError, SyntaxError):
        return node.target.id, Any


def _is_internal(value: ast.expr | None) -> bool:
    """`field(init=False, ...)` is state, not an option."""
    return isinstance(value, ast.Call) and any(k.arg == "init" and getattr(k.value, "value", True) is False for k in value.keywords)
