"""The catalogue: which methods exist, found by file name, imported only when used.

A method is one file `luthier/<axis>/<name>.py` that registers itself with `@register("name", paper=36)`. Names have
hyphens in recipes and underscores in files. Listing reads the sources with `ast`, so it loads neither torch nor a method.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import itertools
import re
import sys
import textwrap
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from luthier.errors import RecipeError, nearest

AXES = ("select", "curate", "synthesize", "adapt", "objective", "optimize", "merge", "compress", "decode", "measure", "search")
"""One kind of decision each, in the order in which a recipe's plug-ins are called."""

PACKAGE = Path(__file__).parent
_registered: dict[tuple[str, str], type] = {}
T = TypeVar("T", bound=type)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One method, as its source file states it."""

    axis: str
    name: str
    path: Path
    papers: tuple[int, ...]
    class_name: str
    idea: str
    wraps: str | None = None

    def load(self) -> type:
        importlib.import_module(f"luthier.{self.axis}.{self.path.stem}")
        return _registered[self.axis, self.name]


def register(name: str, paper: int | tuple[int, ...] = (), wraps: str | None = None) -> Callable[[T], T]:
    """Put a method class into the catalogue. The axis is the folder, or for a user's own file the axis's base class.

    `paper` names the paper or papers it embodies; `wraps` the library call it is a thin shell around."""

    def add(cls: T) -> T:
        axis = axis_of(cls)
        marked: Any = cls  # any class; the marks are `Plugin`'s class variables
        marked.axis, marked.name = axis, name
        marked.papers = (paper,) if isinstance(paper, int) else tuple(paper)
        marked.wraps = wraps
        _registered[axis, name] = cls
        return cls

    return add


def axis_of(cls: type) -> str:
    """The axis whose contract a class implements."""
    for base in cls.__mro__:
        parts = base.__module__.split(".")
        if len(parts) >= 2 and parts[0] == "luthier" and parts[1] in AXES:
            return parts[1]
    raise RecipeError(
        f"{cls.__name__} implements no axis; derive it from a contract such as luthier.objective.Objective or luthier.select.Selector."
    )


@functools.cache
def entries(axis: str | None = None) -> tuple[Entry, ...]:
    """Every method of the library (of one axis), sorted, without importing any."""
    if axis is not None and axis not in AXES:
        raise RecipeError(f"There is no axis '{axis}'.{nearest(axis, AXES)} The axes are: {', '.join(AXES)}.")
    found = []
    for one in AXES if axis is None else (axis,):
        for path in sorted((PACKAGE / one).glob("*.py")):
            if not path.name.startswith("_"):
                found += _read(one, path)
    return tuple(found)


_HEAD = re.compile(r"^@register\(.*?^class [^\n]*:\n\s+[rR]?\"{3}.*?\"{3}", re.MULTILINE | re.DOTALL)
"""From a method's decorator to the end of its docstring: all that a listing needs, and a tenth of the time to parse."""


def _heads(text: str) -> list[ast.stmt]:
    """The registered classes of a source, without their bodies where that is easy to tell."""
    try:
        heads = [ast.parse(part).body for part in _HEAD.findall(text)]
    except SyntaxError:
        heads = []
    simple = len(heads) == len(re.findall(r"^@register\(", text, re.MULTILINE)) and all(len(h) == 1 for h in heads)
    return [h[0] for h in heads] if simple else ast.parse(text).body


def _read(axis: str, path: Path) -> list[Entry]:
    found = []
    for node in _heads(path.read_text(encoding="utf-8")):
        if not isinstance(node, ast.ClassDef):
            continue
        for call in node.decorator_list:
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "register":
                given = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
                papers = given.get("paper", ())
                papers = (papers,) if isinstance(papers, int) else tuple(papers)
                idea = (ast.get_docstring(node) or "").strip().split("\n\n")[0].replace("\n", " ")
                found.append(Entry(axis, ast.literal_eval(call.args[0]), path, papers, node.name, idea, given.get("wraps")))
    return found


def find(axis: str, name: str) -> Entry:
    """One method's entry; a wrong name is answered with the nearest right one."""
    for entry in entries(axis):
        if entry.name == name.replace("_", "-"):
            return entry
    elsewhere = [e.axis for e in entries() if e.name == name.replace("_", "-")]
    hint = f" It is a method of the axis '{elsewhere[0]}'." if elsewhere else nearest(name, [e.name for e in entries(axis)])
    raise RecipeError(f"There is no method '{name}' on the axis '{axis}'.{hint}")


def method(axis: str, name: str) -> type:
    """The class of a method: `method("merge", "lines")(alpha=0.3).merge(base, [tuned])`.

    `name` may also be a user's own file, `./mine.py:MyLoss`."""
    if ".py" in name:
        return _from_file(axis, name)
    if (axis, name) in _registered:
        return _registered[axis, name]
    return find(axis, name).load()


def is_registered(axis: str, name: str) -> bool:
    """Whether a method's class is already at hand: imported, or registered by the running program."""
    return (axis, name) in _registered


def _from_file(axis: str, spec: str) -> type:
    file, _, class_name = spec.partition(":")
    path = Path(file).expanduser().resolve()
    module = _module(path)
    own = {n: c for n, c in vars(module).items() if isinstance(c, type) and c.__module__ == module.__name__ and hasattr(c, "axis")}
    if not class_name and len(own) == 1:
        found = next(iter(own.values()))
    elif class_name in own:
        found = own[class_name]
    else:
        raise RecipeError(f"{path} holds no registered method class '{class_name}'.{nearest(class_name, own)} It holds: {', '.join(own) or 'none'}.")
    if found.axis != axis:
        raise RecipeError(f"{spec} is a method of the axis '{found.axis}', not of '{axis}'.")
    return found


def user_object(spec: str) -> Any:
    """What a user's own file holds under a name: `./mine.py:judge`."""
    file, _, name = spec.partition(":")
    path = Path(file).expanduser().resolve()
    module = _module(path)
    own = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
    if not name or not hasattr(module, name):
        raise RecipeError(f"{path} holds no '{name}'.{nearest(name, own)} Name one as {file}:NAME.")
    return getattr(module, name)


def _module(path: Path) -> types.ModuleType:
    """A user's file, imported once."""
    if not path.is_file():
        raise RecipeError(f"The file {path} does not exist.")
    module_name = f"luthier_user_{path.stem}_{abs(hash(str(path)))}"
    if module_name not in sys.modules:
        loader_spec = importlib.util.spec_from_file_location(module_name, path)
        assert loader_spec is not None and loader_spec.loader is not None
        module = importlib.util.module_from_spec(loader_spec)
        sys.modules[module_name] = module
        try:
            loader_spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[module_name]
            raise RecipeError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return sys.modules[module_name]


def fields_of(cls: type) -> list[dataclasses.Field[Any]]:
    """The recipe's schema of a method: its dataclass fields."""
    return [f for f in dataclasses.fields(cls) if f.init] if dataclasses.is_dataclass(cls) else []


def built(axis: str, name: str, options: Mapping[str, Any]) -> Any:
    """A method with these fields; a field that it has not is refused with the nearest that it has."""
    cls = method(axis, name)
    known = [f.name for f in fields_of(cls)]
    for option in options:
        if option not in known:
            raise RecipeError(f"{axis}/{name} has no option '{option}'.{nearest(option, known)} It has: {', '.join(known) or 'none'}.")
    return cls(**options)


def field_docs(cls: type) -> dict[str, str]:
    """What the source says about each field: the string literal under it, the `#:` lines above it or the comment behind it."""
    documented: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            documented |= _docs_in_source(base)
    return {f.name: documented.get(f.name, "") for f in fields_of(cls)}


def _docs_in_source(cls: type) -> dict[str, str]:
    try:
        source = textwrap.dedent(inspect.getsource(cls))
        node = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError):
        return {}
    lines, found = source.splitlines(), {}
    body = node.body if isinstance(node, ast.ClassDef) else []
    for item, following in zip(body, [*body[1:], None]):
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            literal = following.value.value if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant) else None
            text = inspect.cleandoc(literal) if isinstance(literal, str) else _comment(lines, item)
            if text:
                found[item.target.id] = text
    return found


def _comment(lines: list[str], item: ast.stmt) -> str:
    """The comment behind a statement, else the `#:` lines right above it."""
    behind = lines[(item.end_lineno or item.lineno) - 1].encode()[item.end_col_offset :].decode()
    if behind.strip().startswith("#"):
        return behind.strip().lstrip("#: ").strip()
    above = list(itertools.takewhile(lambda line: line.strip().startswith("#:"), reversed(lines[: item.lineno - 1])))
    return " ".join(line.strip()[2:].strip() for line in reversed(above))
