"""All pages of the atlas as Markdown: the hand-written ones of `docs/` with their slots filled, and one for every method and paper.

A hand-written page may hold lines such as `{{ commands }}`; each is replaced by what the code says.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from luthier.catalog import PACKAGE
from luthier.errors import UserError, nearest
from luthier.report import atlas_methods, atlas_papers, atlas_reference, atlas_scale
from luthier.report.atlas_style import style

ROOT = PACKAGE.parent
"""The repository."""
SLOTS: dict[str, Callable[[], str]] = {
    "axes": atlas_methods.axes, "evidence": atlas_papers.evidence_table, "counts": atlas_papers.counts, "commands": atlas_reference.commands,
    "recipe": atlas_reference.recipe_keys, "train": lambda: atlas_reference.settings("train"), "data": lambda: atlas_reference.settings("data"),
    "streams": atlas_reference.streams, "rows": atlas_reference.kinds_of_rows,
    "memory": atlas_scale.memory_table, "time": atlas_scale.time_table, "selection": atlas_scale.selection_table, "constants": atlas_scale.constants,
    "adding a method": lambda: part(_contributing(), "Adding a method"), "adding a claim": lambda: part(_contributing(), "Adding a claim"),
}  # fmt: skip
SLOT = re.compile(r"^\{\{ *(.+?) *\}\}$", re.MULTILINE)


def write(folder: Path) -> int:
    """All pages, anew; returns how many."""
    source = ROOT / "docs"
    if not source.is_dir():
        raise UserError(f"{source} does not exist: the atlas is built from a copy of the repository.")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source / "assets", folder / "assets")
    (folder / "assets" / "charts.css").write_text(style(), encoding="utf-8")
    written = {f.name: filled(f.read_text(encoding="utf-8"), f.name) for f in sorted(source.glob("*.md"))}
    for path, text in {**written, **atlas_methods.method_pages(), **atlas_papers.paper_pages()}.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    return len(list(folder.rglob("*.md")))


def filled(text: str, name: str = "a page") -> str:
    """A hand-written page with what the code says in its slots."""

    def fill(found: re.Match[str]) -> str:
        if found[1] not in SLOTS:
            raise UserError(f"docs/{name}: there is no slot '{found[1]}'.{nearest(found[1], SLOTS)} There are: {', '.join(SLOTS)}.")
        return SLOTS[found[1]]()

    return SLOT.sub(fill, text)


def part(text: str, heading: str) -> str:
    """What stands under a first-level heading of a Markdown text, with the heading."""
    code = False
    inside: list[list[str]] = []
    for line in text.split("\n"):
        code ^= line.startswith("```")
        if not code and line.startswith("# "):
            inside.append([line])
        elif inside:
            inside[-1].append(line)
    found = next((p for p in inside if p[0] == f"# {heading}"), None)
    if found is None:
        raise UserError(f"There is no heading '# {heading}'.{nearest(heading, [p[0][2:] for p in inside])}")
    return "\n".join(found).strip() + "\n"


def _contributing() -> str:
    return (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


if __name__ == "__main__":
    sys.stdout.write(f"{write(Path(sys.argv[1] if len(sys.argv) > 1 else 'build/docs'))} pages\n")
