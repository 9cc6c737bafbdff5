"""What is known about a paper or a method, as plain values and as text."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from luthier import catalog
from luthier._cli.claims import told
from luthier._cli.text import paragraph
from luthier.catalog import AXES, Entry
from luthier.errors import RecipeError, UserError, nearest
from luthier.papers import Paper, evidence_of, papers
from luthier.recipe import LISTS


def explain(which: str) -> dict[str, Any]:
    """A paper by its number or slug, a method by axis/name or by its name alone."""
    known = papers()
    axis, slash, name = which.partition("/")
    if slash:
        return about_method(catalog.find(axis, name), known)
    for one in known:
        if which in (str(one.n), f"{one.n:03d}", one.slug):
            return about_paper(one)
    named = [e for e in catalog.entries() if e.name == which.replace("_", "-")]
    if len(named) == 1:
        return about_method(named[0], known)
    if named:
        raise RecipeError(f"'{which}' is a method of several axes: {', '.join(f'{e.axis}/{e.name}' for e in named)}.")
    words = [*(p.slug for p in known), *(e.name for e in catalog.entries())]
    raise RecipeError(f"There is neither a paper nor a method '{which}'.{nearest(which, words)} `luthier papers` and `luthier methods` list them.")


# -- papers --------------------------------------------------------------------------------------------------------------


def about_paper(one: Paper) -> dict[str, Any]:
    ideas = {f"{e.axis}/{e.name}": e.idea for e in catalog.entries()}
    methods = [{"method": m, "idea": ideas.get(m)} for m in one.methods]
    return {"kind": "paper", **one.to_dict(), "methods": methods, "recipe": _paper_recipe(one), "evidence": evidence_of(one), "relations": _relatives(one)}


def _paper_recipe(one: Paper) -> str | None:
    if one.preset:
        return None if f"preset {one.preset}" in one.missing else f"luthier tune {one.preset} --model MODEL --data FILE"
    by_axis: dict[str, list[str]] = {}
    for method in one.present:
        axis, _, name = method.partition("/")
        by_axis.setdefault(axis, []).append(name)
    return "\n".join(_line(a, n) for a in AXES if (n := by_axis.get(a))) or None


def _line(axis: str, names: list[str]) -> str:
    """An axis's methods as a recipe takes them: several where it takes a list, else one and the others beside it."""
    if len(names) > 1 and axis in LISTS:
        return f"{axis}: [{', '.join(names)}]"
    return f"{axis}: {names[0]}" + (f"  # or {', '.join(names[1:])}" if names[1:] else "")


def _relatives(one: Paper) -> list[str]:
    """Other papers that use one of its methods."""
    return [f"{p.slug} also uses {m}" for p in papers() if p.n != one.n for m in p.methods if m in one.methods]


# -- methods -------------------------------------------------------------------------------------------------------------


def about_method(entry: Entry, known: list[Paper]) -> dict[str, Any]:
    cls = _loaded(entry)
    key = f"{entry.axis}/{entry.name}"
    mine = [p for p in known if p.n in entry.papers or key in p.methods]
    return {
        "kind": "method", "axis": entry.axis, "name": entry.name, "idea": entry.idea, "wraps": entry.wraps, "file": str(entry.path),
        "papers": [{"n": p.n, "slug": p.slug, "title": p.title, "year": p.year} for p in mine],
        "doc": inspect.getdoc(cls) or "",
        "fields": fields(cls),
        "needs": _words(cls, "needs"), "families": _words(cls, "families"), "parallel": _modes(cls),
        "columns": [sorted(c) for c in getattr(cls, "columns", ())],
        "decides": _decides(cls),
        "recipe": _snippet(entry, cls),
        "evidence": [e for p in mine if (e := evidence_of(p))],
        "relations": [f"{m} (paper {p.n}, {p.slug})" for p in mine for m in p.methods if m != key],
    }  # fmt: skip


def _modes(cls: type) -> list[str]:
    """The parallel modes that it works in."""
    from luthier.core.ranks import modes

    return sorted(modes(cls)) if hasattr(cls, "parallel") else _words(cls, "parallel")


def _loaded(entry: Entry) -> type:
    try:
        return entry.load()
    except ImportError as error:
        raise UserError(f"{entry.axis}/{entry.name} needs the package '{error.name}', which is not installed: pip install {error.name}.") from error


def fields(cls: type) -> list[dict[str, Any]]:
    """A method's fields: name, type, default, documentation."""
    from luthier._recipe.fit import typename, types_of

    documented, types = catalog.field_docs(cls), types_of(cls) if dataclasses.is_dataclass(cls) else {}
    return [{"name": f.name, "type": typename(types[f.name]), **_default(f), "doc": documented[f.name]} for f in catalog.fields_of(cls)]


def _default(field: dataclasses.Field[Any]) -> dict[str, Any]:
    if field.default is not dataclasses.MISSING:
        return {"default": field.default}
    if field.default_factory is not dataclasses.MISSING:
        return {"default": field.default_factory()}
    return {"required": True}


def _words(cls: type, name: str) -> list[str]:
    return sorted(getattr(cls, name, ()))


def _decides(cls: type) -> list[str]:
    """Hooks of which a stage can have one."""
    from luthier.core.plugin import SINGLE_DEFINER, Plugin

    base = {hook: getattr(Plugin, hook, None) for hook in SINGLE_DEFINER}
    return [hook for hook in SINGLE_DEFINER if getattr(cls, hook, base[hook]) is not base[hook]]


def _snippet(entry: Entry, cls: type) -> str:
    import yaml

    from luthier._recipe.write import plain

    values = {f.name: _default(f).get("default", "...") for f in catalog.fields_of(cls)}
    text: str = yaml.safe_dump({entry.axis: plain({"method": entry.name, **values})}, sort_keys=False, allow_unicode=True)
    return text.strip()


# -- as text -------------------------------------------------------------------------------------------------------------


def as_text(about: dict[str, Any]) -> str:
    return _paper_text(about) if about["kind"] == "paper" else _method_text(about)


def _paper_text(about: dict[str, Any]) -> str:
    parts = [
        f"Paper {about['n']}: {about['slug']}   ({about['axis']}, {about['modality']}, {about['year']})\n{about['title']}",
        paragraph(about["idea"]),
        _block("Methods", [f"{m['method']}: {m['idea'] or 'not there yet'}" for m in about["methods"]]),
        f"Status: {about['status']}" + (f"; missing: {', '.join(about['missing'])}" if about["missing"] else ""),
    ]
    if about["recipe"]:
        parts.append(_block("Recipe", about["recipe"].splitlines()))
    parts.append(_evidence(about["evidence"]))
    if about["relations"]:
        parts.append(_block("Related", about["relations"]))
    return "\n\n".join(parts)


def _method_text(about: dict[str, Any]) -> str:
    parts = [f"{about['axis']}/{about['name']}" + (f"   (wraps {about['wraps']})" if about["wraps"] else ""), about["doc"]]
    parts += [_block("Papers", [f"{p['n']} {p['slug']}: {p['title']} ({p['year']})" for p in about["papers"]])] if about["papers"] else []
    rows = []
    for field in about["fields"]:
        given = "required" if field.get("required") else f"= {field['default']!r}"
        rows.append(f"{field['name']}: {field['type']} {given}" + (f"\n      {field['doc']}" if field["doc"] else ""))
    parts.append(_block("Fields", rows or ["none"]))
    facts = [
        ("needs", ", ".join(about["needs"]) or "nothing"), ("families", ", ".join(about["families"])), ("parallel", ", ".join(about["parallel"])),
        ("columns", " or ".join(" + ".join(c) for c in about["columns"]) or "any"), ("decides", ", ".join(about["decides"])),
    ]  # fmt: skip
    parts.append(_block("Requirements", [f"{k}: {v}" for k, v in facts if v]))
    parts.append(_block("Recipe", about["recipe"].splitlines()))
    parts.append("\n".join(_evidence(e) for e in about["evidence"]) or _evidence(None))
    if about["relations"]:
        parts.append(_block("Goes with", about["relations"]))
    return "\n\n".join([*parts, f"Source: {about['file']}"])


def _block(title: str, lines: list[str]) -> str:
    return "\n".join([title, *(f"  {line}" for line in lines)])


def _evidence(found: dict[str, Any] | None) -> str:
    if not found:
        return "Evidence: none yet"
    return _block("Evidence", "\n".join(told(found)).split("\n"))
