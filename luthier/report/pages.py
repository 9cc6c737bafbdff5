"""One page a method, and an index: made from the code, papers.yaml and the evidence, so nothing is typed twice."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from luthier._cli.claims import told
from luthier._cli.explain import about_method
from luthier.catalog import AXES, entries
from luthier.papers import papers


def page(about: dict[str, Any]) -> str:
    """A method's page in Markdown."""
    idea, _, rest = about["doc"].partition("\n\n")
    lines = [f"# {about['axis']}/{about['name']}", "", idea.replace("\n", " "), ""]
    if rest:
        lines += ["```text", rest, "```", ""]
    if about["papers"]:
        lines += ["## Papers", "", *(f"- {p['n']}: {p['title']} ({p['year']})" for p in about["papers"]), ""]
    lines += ["## In a recipe", "", "```yaml", about["recipe"], "```", ""]
    if about["fields"]:
        lines += ["| field | type | default | |", "|---|---|---|---|"]
        lines += [f"| `{f['name']}` | {_cell(f['type'])} | `{_cell(f.get('default', 'required'))}` | {_cell(f['doc'] or '')} |" for f in about["fields"]]
        lines.append("")
    facts = [("Needs", about["needs"]), ("Families", about["families"]), ("Decides alone", about["decides"])]
    lines += [f"{name}: {', '.join(values)}." for name, values in facts if values]
    lines += ["", "## Evidence", ""]
    lines += ["```text", *(line for e in about["evidence"] for line in told(e)), "```"] if about["evidence"] else ["None yet."]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def write(folder: Path) -> int:
    """All pages and their index; returns how many."""
    known = papers()
    index = ["# Methods", ""]
    number = 0
    for axis in AXES:
        index += [f"## {axis}", ""]
        for entry in entries(axis):
            target = folder / axis / f"{entry.name}.md"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(page(about_method(entry, known)), encoding="utf-8")
            index.append(f"- [{entry.name}]({axis}/{entry.name}.md): {entry.idea}")
            number += 1
        index.append("")
    (folder / "index.md").write_text("\n".join(index), encoding="utf-8")
    return number


if __name__ == "__main__":
    written = write(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/methods"))
    sys.stdout.write(f"{written} pages\n")
