"""One page a method, and the axes: what each decides and its methods."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import yaml

from luthier._cli.claims import effect_text
from luthier._cli.explain import about_method
from luthier._recipe.check import SUPPLIED
from luthier.catalog import AXES, PACKAGE, Entry, entries, method
from luthier.core.plugin import ANY_FAMILY
from luthier.errors import UserError
from luthier.recipe import DEFAULTS, LISTS, PRESETS
from luthier.report.atlas import (
    Pages,
    axis_link,
    by_number,
    code,
    evidence_section,
    fenced,
    front,
    method_link,
    paper_link,
    plain,
    prose,
    table,
)

UP = "../../"


def axes() -> str:
    """Every axis: what it decides, how many methods a recipe may name, and the methods."""
    lines: list[str] = []
    for axis in AXES:
        found = entries(axis)
        many = "A list may name several." if axis in LISTS else "One method."
        absent = f" Without the key: {code(listed(DEFAULTS[axis]))}." if axis in DEFAULTS else ""
        lines += [f"## {axis} {{ #{axis} }}", "", f"{decides(axis)} {many}{absent}", "", table(("method", "idea", "papers"), [_row(e) for e in found]), ""]
    return "\n".join(lines)


def listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def decides(axis: str) -> str:
    """What an axis decides: the first sentence of its contract."""
    first = (importlib.import_module(f"luthier.{axis}").__doc__ or "").strip().split("\n")[0]
    words = first.partition(": ")[2] or first
    return words[:1].upper() + words[1:]


def _row(entry: Entry) -> list[str]:
    known = by_number()
    linked = ", ".join(f"[{n}](papers/{known[n].slug}.md)" for n in entry.papers if n in known)
    return [f"[{entry.name}](methods/{entry.axis}/{entry.name}.md)", plain(entry.idea), linked]


def method_pages() -> Pages:
    known = list(by_number().values())
    every = [about_method(entry, known) for entry in entries()]
    return {f"methods/{a['axis']}/{a['name']}.md": page(a, every) for a in every}


def page(about: dict[str, Any], every: list[dict[str, Any]]) -> str:
    """A method's page. `every`: what is known of all methods, for what cannot stand beside this one."""
    idea, _, rest = about["doc"].partition("\n\n")
    wraps = f" It wraps {code(about['wraps'])}." if about["wraps"] else ""
    lines = [front(f"{about['axis']}/{about['name']}", " ".join(idea.split())), f"# {about['axis']}/{about['name']}", "", plain(idea), ""]
    lines += [f"A method of the axis {axis_link(about['axis'], UP)}.{wraps}", "", *(f"- Paper {p['n']}: {paper_link(p, UP)} ({p['year']})" for p in about["papers"]), ""]
    lines += ["## Formula", "", prose(rest), ""] if rest else []
    lines += ["## When to use it", "", *_bullets(fits(about)), "", "## When not", "", *_bullets(fits_not(about, every)), ""]
    lines += ["## In a recipe", "", *_recipe(about), "", *_fields(about)]
    lines += ["## Requirements", "", table(("", ""), _requirements(about)), "", "## Evidence", ""]
    for found in about["evidence"]:
        lines += evidence_section(found, 3, UP)
    lines += [] if about["evidence"] else [no_evidence(about), ""]
    return "\n".join([*lines, *_related(about), *_source(about)]) + "\n"


def _bullets(sentences: list[str]) -> list[str]:
    return [f"- {s}" for s in sentences]


# -- when ----------------------------------------------------------------------------------------------------------------


def fits(about: dict[str, Any]) -> list[str]:
    """What must be so, and what the evidence speaks for."""
    everywhere = set(about["families"]) >= ANY_FAMILY
    said = ["Any family of models." if everywhere else f"The model's family is {_or(about['families'])}."]
    if about["columns"]:
        said.append("The rows have " + ", or ".join(" + ".join(code(c) for c in columns) for columns in about["columns"]) + ".")
    said += [_need(n) for n in about["needs"]]
    return said + [f"Its claim was reproduced here: {_short(e)}" for e in about["evidence"] if e["verdict"] == "reproduced"]


def fits_not(about: dict[str, Any], every: list[dict[str, Any]]) -> list[str]:
    """What it does not serve, what it cannot stand beside, and what the evidence speaks against."""
    others = sorted(ANY_FAMILY - set(about["families"]))
    said = [f"The model's family is {_or(others)}: it is refused."] if others else []
    if "ddp" not in about["parallel"] and "fsdp" not in about["parallel"]:
        said.append("The run has several processes: it runs in one only.")
    for hook in about["decides"]:
        rivals = [f"{o['axis']}/{o['name']}" for o in every if hook in o["decides"] and o["name"] != about["name"] and not (o["axis"] == about["axis"] and o["axis"] not in LISTS)]
        if rivals:
            said.append(f"Together with {_or([method_link(r, UP) for r in rivals], False)}: each decides {code(hook)}, and a stage can have one that does.")
    for e in about["evidence"]:
        if e["verdict"] == "not reproduced":
            said.append(f"You want what its paper reports: its claim was not reproduced here. {_short(e)}")
        elif e["verdict"] != "reproduced":
            said.append(f"You need a sure result: that of its claim is {e['verdict'] or 'not complete'}. {_short(e)}")
    if not about["evidence"]:
        said.append("You need measured evidence: there is none of it here yet.")
    return said


def _need(need: str) -> str:
    word, _, name = need.partition(":")
    if word == "generation":
        return "The model generates answers."
    if need in SUPPLIED:
        return f"It needs {code(need)}, which every run supplies."
    kind = {"helper": "helpers", "helpers": "helpers", "model": "models", "models": "models"}.get(word, "data")
    return f"The recipe names {code(name or need)} under {code(kind)}."


def _short(evidence: dict[str, Any]) -> str:
    """The claim's measure and effect; the rest stands further down."""
    return plain(f"{evidence['metric']}: {effect_text(evidence)}.") if evidence["effect"] else ""


def _or(words: list[str], as_code: bool = True) -> str:
    words = [code(w) for w in words] if as_code else words
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]


def no_evidence(about: dict[str, Any]) -> str:
    if about["papers"]:
        return "No claim of its paper has been run yet."
    return "It stands for no paper of the list, so there is no claim about it."


# -- how -----------------------------------------------------------------------------------------------------------------


def _recipe(about: dict[str, Any]) -> list[str]:
    """The method with its defaults; where these alone are refused, with values that are not."""
    cls: Any = method(about["axis"], about["name"])
    try:
        cls()
    except (UserError, TypeError) as error:
        example = {about["axis"]: yaml.safe_load(about["recipe"])[about["axis"]] | cls.toy}
        shown = yaml.safe_dump(example, sort_keys=False, allow_unicode=True).strip()
        return [fenced(shown, "yaml"), "", f"Its defaults alone are refused: {plain(str(error))} {code(', '.join(cls.toy))} is an example here; other lines may be left out."]
    return [fenced(about["recipe"], "yaml"), "", "Every line but `method` is a default and may be left out." if about["fields"] else ""]


def _fields(about: dict[str, Any]) -> list[str]:
    rows = [[code(f["name"]), code(f["type"]), "required" if f.get("required") else code(f["default"]), plain(f["doc"] or "")] for f in about["fields"]]
    return ["## Fields", "", table(("field", "type", "default", "what it does"), rows), ""] if rows else []


def _requirements(about: dict[str, Any]) -> list[list[str]]:
    columns = ", or ".join(" + ".join(code(c) for c in one) for one in about["columns"]) or "any"
    words = [("families of models", about["families"]), ("needs", about["needs"]), ("decides alone", about["decides"]), ("parallel modes it declares", about["parallel"])]
    rows = [[name, ", ".join(code(v) for v in values) or "nothing"] for name, values in words]
    return [[*rows[0]], ["columns of the rows", columns], *rows[1:]]


def _related(about: dict[str, Any]) -> list[str]:
    """Methods of the same papers, those that its text names, and presets that use it."""
    own = f"{about['axis']}/{about['name']}"
    same = {m: p for p in by_number().values() if own in p.methods or p.n in {q["n"] for q in about["papers"]} for m in p.methods if m != own}
    said = [f"- {method_link(m, UP)}, of the same paper {paper_link(p, UP, p.slug)}" for m, p in same.items()]
    said += [f"- {method_link(m, UP)}, named above" for m in _named(about) if m not in same]
    said += [f"- the preset {code(name)}, which uses it" for name in _presets(about)]
    return ["## Related", "", *(said or ["Nothing else of the catalogue names it."]), "", f"Other methods of its axis: {axis_link(about['axis'], UP)}.", ""]


def _named(about: dict[str, Any]) -> list[str]:
    """Methods that the docstring names as code."""
    words = set(re.findall(r"[\w-]+", " ".join(re.findall(r"`([^`\n]+)`", about["doc"])))) - {f["name"] for f in about["fields"]} - {about["name"]}
    return [f"{e.axis}/{e.name}" for e in entries() if e.name in words]


def _presets(about: dict[str, Any]) -> list[str]:
    from luthier.recipe import Recipe

    used = {}
    for file in sorted(PRESETS.glob("*.yaml")):
        recipe = Recipe.load(file)
        used[file.stem.replace("_", "-")] = {(c.axis, c.method) for r in recipe.stage_recipes() for c in r.choices() if c.axis in r.raw}
    return [name for name, found in used.items() if (about["axis"], about["name"]) in found]


def _source(about: dict[str, Any]) -> list[str]:
    """The method's file, by its path in the repository and whole."""
    file = Path(about["file"])
    text = file.read_text(encoding="utf-8").rstrip()
    shown = file.relative_to(PACKAGE.parent)
    inside = "\n".join(f"    {line}".rstrip() for line in fenced(text, "python").split("\n"))
    return ["## Code", "", f'<div markdown="1" data-search-exclude>\n\n??? abstract "{shown}"\n\n{inside}\n\n</div>', ""]

