"""Dead links of a built site, and whatever it would load from elsewhere: `python -m luthier.report.atlas_links site`."""

from __future__ import annotations

import re
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
"""What a browser fetches without being asked."""
FETCHED = re.compile(r"(?:url\(|@import)\s*[\"']?((?:https?:)?//[^\"')]+)")
"""The same in a style sheet."""


class _Page(HTMLParser):
    """A page's anchors, and where it points."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[tuple[str, bool]] = []
        """(where to, whether it is loaded with the page)."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {k: v for k, v in attrs if v}
        self.anchors |= {given[k] for k in ("id", "name") if k in given}
        target = given.get("href") or given.get("src")
        if target:
            self.links.append((target, given.get(LOADED.get(tag, "")) is not None))


@cache
def _read(file: Path) -> _Page:
    page = _Page()
    page.feed(file.read_text(encoding="utf-8"))
    return page


def faults(site: Path) -> list[str]:
    """One sentence for each link that leads nowhere and each thing that is fetched from another place."""
    if not (site / "index.html").is_file():
        return [f"{site} holds no site."]
    found = []
    # the page for what is not found can stand at any depth, so its links start at the server's root
    for file in sorted(f for f in site.rglob("*.html") if f.name != "404.html"):
        for target, loaded in dict.fromkeys(_read(file).links):
            wrong = _wrong(file, target, loaded)
            if wrong:
                found.append(f"{file.relative_to(site)}: {target} {wrong}.")
    for sheet in sorted(site.rglob("*.css")):
        named = FETCHED.findall(sheet.read_text(encoding="utf-8"))
        found += [f"{sheet.relative_to(site)}: {url} is loaded from elsewhere." for url in named]
    return found


def _wrong(file: Path, target: str, loaded: bool) -> str | None:
    """The end of a sentence that says what is wrong with a link."""
    parts = urlsplit(target)
    if parts.scheme == "data":
        return None
    if parts.scheme or parts.netloc:
        return "is loaded from elsewhere" if loaded else None
    other = file.parent / unquote(parts.path) if parts.path else file
    other = other / "index.html" if other.is_dir() else other
    if not other.is_file():
        return "leads nowhere"
    if parts.fragment and other.suffix == ".html" and unquote(parts.fragment) not in _read(other.resolve()).anchors | {"top"}:
        return "leads to an anchor that is not there"
    return None


def main(site: str) -> int:
    found = faults(Path(site))
    sys.stdout.writelines(f"{line}\n" for line in found)
    sys.stdout.write(f"{len(found)} faults\n")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1] if len(sys.argv) > 1 else "site"))
