"""The atlas's generated pages: nothing is missing, nothing is invented, text stays text, links lead somewhere."""

import html
import json
import posixpath
import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier import catalog
from luthier.catalog import entries
from luthier.errors import UserError
from luthier.papers import papers
from luthier.recipe import KEYS, LISTS, Recipe, Train, check
from luthier.report import atlas, atlas_links, atlas_methods, atlas_papers, atlas_reference, atlas_style, pages
from luthier.testing import toys

METHODS = [f"{e.axis}/{e.name}" for e in entries()]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Every page by its path, as `make docs` writes them."""
    folder = tmp_path_factory.mktemp("atlas")
    pages.write(folder)
    return {p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8") for p in folder.rglob("*.md")}


def rendered(text):
    import markdown

    return markdown.markdown(text, extensions=["tables", "fenced_code", "attr_list", "md_in_html"])


# -- the whole -----------------------------------------------------------------------------------------------------------


def test_every_method_and_paper_has_its_page_and_is_listed(written):
    for method in METHODS:
        assert f"methods/{method}.md" in written and f"(methods/{method}.md)" in written["axes.md"]
    for paper in papers():
        assert f"papers/{paper.slug}.md" in written and f'href="papers/{paper.slug}.html"' in written["evidence.md"]


def test_every_link_leads_to_a_page_and_an_anchor_that_are_there(written):
    for path, text in written.items():
        text = re.sub(r"(`{3,}).*?\1|`[^`\n]+`", "", text, flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#\s]*(?:#[\w-]+)?)\)", text):
            file, _, anchor = target.partition("#")
            other = posixpath.normpath(posixpath.join(posixpath.dirname(path), file)) if file else path
            assert other in written, f"{path} leads to {target}"
            headings = {re.sub(r"[^\w -]", "", h.lower()).strip().replace(" ", "-") for h in re.findall(r"^#+ (.*?)(?: \{.*)?$", written[other], re.MULTILINE)}
            assert not anchor or anchor in headings | set(re.findall(r"#([\w-]+) \}", written[other])), f"{path} leads to {target}"


def test_a_paper_that_is_planned_says_so_and_one_that_works_does_not(written):
    for paper in papers():
        page = written[f"papers/{paper.slug}.md"]
        assert ("It is planned" in page) == (paper.status == "planned")
        assert all(atlas.plain(m) in page for m in paper.missing)
        assert all(m in page.replace("\\", "") for m in paper.methods)


def test_the_table_says_for_every_paper_what_the_filters_ask_for(written):
    rows = re.findall(r'<tr data-axis="([\w-]+)" data-status="(\w+)" data-verdict="([\w ]+)">', written["evidence.md"])
    assert [(a, s) for a, s, _ in rows] == [(p.axis, p.status) for p in papers()]
    assert all((v == p.verdict) if p.verdict else v in ("none", "incomplete") for (_, _, v), p in zip(rows, papers()))


def test_what_stands_in_docs_is_written_by_hand(tmp_path, monkeypatch):
    """Generated pages go to their own folder, which is made anew: what was there before is gone."""
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "old.md").write_text("old")
    monkeypatch.setattr(pages.atlas_methods, "method_pages", lambda: {"methods/new.md": "new"})
    monkeypatch.setattr(pages.atlas_papers, "paper_pages", dict)
    monkeypatch.setattr(pages, "filled", lambda text, name: text)
    pages.write(tmp_path)
    assert sorted(p.name for p in (tmp_path / "methods").iterdir()) == ["new.md"]
    assert not (pages.ROOT / "docs" / "methods").exists()


# -- a method's page -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["objective/asft", "merge/ties", "adapt/lora", "select/mig", "adapt/spiel"])
def test_a_methods_page_holds_what_its_code_says(written, method):
    axis, _, name = method.partition("/")
    cls = catalog.method(axis, name)
    shown = html.unescape(re.sub(r"<[^>]+>|\s", "", rendered(written[f"methods/{method}.md"])))
    assert all(re.sub(r"[\s`]|^- |\n- ", "", part) in shown for part in re.split(r"\n\n|\n(?=- )", cls.__doc__.strip().replace("\n    ", "\n")))
    for field, about in catalog.field_docs(cls).items():
        assert field in shown and re.sub(r"[\s`]", "", about) in shown
    assert f"luthier/{axis}/{name.replace('-', '_')}.py" in written[f"methods/{method}.md"]


def test_when_to_use_a_method_follows_from_what_it_needs(written):
    page = written["methods/objective/dpo.md"]
    use, _, rest = page.partition("## When to use it")[2].partition("## When not")
    avoid = rest.partition("## In a recipe")[0]
    assert "`causal-lm`" in use and "`chosen` + `prompt` + `rejected`" in use and "`reference`, which every run supplies" in use
    assert "`image-classifier`" in avoid and "it is refused" in avoid and "`causal-lm`" not in avoid


def test_methods_that_decide_the_same_are_named_beside_each_other():
    one = {"axis": "objective", "name": "a", "families": ["causal-lm"], "parallel": ["ddp"], "decides": ["rollout"], "evidence": []}
    other = {**one, "name": "b"}
    said = " ".join(atlas_methods.fits_not(one, [one, other]))
    assert "objective/b" in said and "objective/a" not in said
    assert "rollout" not in " ".join(atlas_methods.fits_not({**one, "decides": []}, [one, other]))


@pytest.mark.parametrize("method", METHODS)
def test_the_recipe_on_a_methods_page_passes_check(written, method, tmp_path):
    axis, _, name = method.partition("/")
    shown = yaml.safe_load(re.search(r"## In a recipe\n\n```yaml\n(.*?)\n```", written[f"methods/{method}.md"], re.DOTALL)[1])
    assert list(shown) == [axis] and shown[axis]["method"] == name
    base = toys.recipe({axis: name}, toys.shared_family([catalog.method(axis, name)]), tmp_path)
    recipe = Recipe.from_dict({**base, **shown})
    check(recipe)
    (choice,) = getattr(recipe, axis)
    if "Its defaults alone are refused" not in written[f"methods/{method}.md"]:
        assert choice.build() == catalog.method(axis, name)()


def test_the_recipes_on_papers_pages_pass_check(written, tmp_path):
    for paper in papers():
        found = re.search(r"## In a recipe\n\n```yaml\n(.*?)\n```", written[f"papers/{paper.slug}.md"], re.DOTALL)
        if found is None:
            continue
        shown = yaml.safe_load(found[1])
        named = {axis: value if isinstance(value, list) else [value] for axis, value in shown.items()}
        classes = [catalog.method(axis, name) for axis, names in named.items() for name in names]
        base = toys.recipe({axis: names[0] for axis, names in named.items()}, toys.shared_family(classes), tmp_path)
        assert check(Recipe.from_dict({**base, **shown})) is not None, paper.slug


def test_the_recipes_on_papers_pages_name_one_method_where_the_axis_takes_one(written):
    for paper in papers():
        found = re.search(r"## In a recipe\n\n```yaml\n(.*?)\n```", written[f"papers/{paper.slug}.md"], re.DOTALL)
        assert not found or all(axis in LISTS or not isinstance(v, list) for axis, v in yaml.safe_load(found[1]).items()), paper.slug


# -- evidence ------------------------------------------------------------------------------------------------------------

ARMS = {
    "ours": {"role": "method", "settings": {"lr": 0.1}, "means": {"score": 0.7, "x": 1.0}, "values": {"score": {"0": 0.6, "1": 0.7, "2": 0.8}}, "seconds": 2.0},
    "<b>sft</b>": {"role": "baseline", "settings": {}, "means": {"score": 0.5}, "values": {"score": {"0": 0.5, "1": 0.4, "2": 0.6}}, "seconds": 1.0},
}  # fmt: skip
EFFECT = {"mean": 0.2, "low": -0.05, "high": 0.45, "n": 3}
EVIDENCE = {
    "paper": 117, "slug": "none", "says": "It is *better*.", "published": "+2 <points>", "departs": "", "metric": "score", "better": "higher", "smallest": 0.02, "at_least": 0.0,
    "verdict": "unclear", "reason": "", "flags": ["seed 1: unequal rows"], "waiting": [], "repeated": None, "methods": ["objective/sft", "objective/not-there-yet"], "arms": ARMS,
    "effect": {**EFFECT, "method": "ours", "baseline": "<b>sft</b>"}, "against": {"<b>sft</b>": EFFECT}, "cost": {"time": 2.0, "memory": None}, "versions": {"torch": "2"},
}  # fmt: skip


def test_evidence_shows_the_effect_every_seed_and_what_speaks_against_it():
    page = rendered("\n".join(atlas.evidence_section(EVIDENCE)))
    words = html.unescape(re.sub(r"<[^>]+>", "", page))
    assert "+0.2 (-0.05 to +0.45, 3 seeds)" in words and "asft: unclear" in words and "seed 1: unequal rows" in words and "It is *better*." in words and "+2 <points>" in words
    gains, values = re.findall(r"<figure.*?</figure>", page, re.DOTALL)
    assert gains.count('r="2.2"') == 3 and values.count('r="2.2"') == 6
    assert "not-there-yet (planned)" in words and "2.00 times" in words and "Memory" not in words
    assert "<b>sft" not in page


def test_differences_are_seed_by_seed_and_better_is_to_the_right():
    assert atlas._differences(EVIDENCE, "ours", "<b>sft</b>") == pytest.approx((0.1, 0.3, 0.2))
    assert atlas._differences({**EVIDENCE, "better": "lower"}, "ours", "<b>sft</b>") == pytest.approx((-0.1, -0.3, -0.2))


def test_evidence_that_is_not_whole_says_so_and_shows_no_figure():
    page = "\n".join(atlas.evidence_section({**EVIDENCE, "verdict": None, "effect": None, "against": {}, "arms": {}, "flags": [], "cost": None}))
    assert "asft: no verdict yet" in page and "not measured yet" in page and "<figure" not in page and "0.00" not in page


@pytest.mark.parametrize("paper", [p for p in papers() if p.verdict], ids=lambda p: p.slug)
def test_stored_evidence_is_on_its_paper_and_its_methods_pages(written, paper):
    found = json.loads((catalog.PACKAGE / "evidence" / f"{paper.claim}.json").read_text(encoding="utf-8"))
    mean = f"{found['effect']['mean']:+.3g}"
    assert mean in written[f"papers/{paper.slug}.md"]
    assert all(mean in written[f"methods/{m}.md"] for m in paper.present)


# -- writing -------------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(codec="ascii", exclude_characters="`\r\x0b\x0c\x1c\x1d\x1e\x1f", categories=["L", "N", "P", "S", "Zs"]), max_size=40))
def test_plain_text_means_itself(text):
    shown = html.unescape(re.sub(r"^<p>|</p>$", "", rendered(f"x{atlas.plain(text)}x")))
    assert shown == f"x{text}x"


def test_prose_keeps_lists_and_does_not_make_up_any():
    shown = rendered(atlas.prose("First a line\nthat goes on:\n- one *a*\n  and more\n- two\n\n1. Trim: x. 2. Elect."))
    assert shown.count("<li>") == 2 and "<ol>" not in shown and "one *a* and more" in shown and "First a line that goes on:" in shown


@pytest.mark.parametrize("value", ["a|b", "``x`` and `y`", "<b>", "a*b_c*"])
def test_code_in_a_table_shows_its_value(value):
    cells = re.findall(r"<td>(.*?)</td>", rendered(atlas.table(("a", "b"), [[atlas.code(value), "end"]])))
    assert [html.unescape(re.sub(r"</?code>", "", c)) for c in cells] == [value, "end"]


def test_code_that_holds_fences_stays_in_its_block():
    assert rendered(atlas.fenced("a\n```\nb\n```", "text")).count("<pre>") == 1


def test_the_charts_style_touches_charts_alone_and_leaves_none_of_their_marks_out():
    sheet = atlas_style.style()
    selectors = [s.strip() for group in re.findall(r"([^{}]+)\{[^{}]*\}", re.sub(r"@media[^{]*\{", "", sheet)) for s in group.split(",")]
    assert all(s == ":root" or s.startswith("figure.chart") for s in selectors if s)
    page = "\n".join(atlas.evidence_section(EVIDENCE))
    for name in {c for group in re.findall(r'class="([^"]+)"', page) for c in group.split()} - {"chart", "wide", "n", "k2", "k5"}:
        assert f".{name}" in sheet, name
    assert "prefers-color-scheme:dark" in sheet and "max-width" in sheet


# -- references and slots ------------------------------------------------------------------------------------------------


def test_the_command_line_reference_holds_every_command_and_argument():
    from luthier.cli import _parser

    found = atlas_reference.commands()
    for name, one in atlas_reference._subparsers(_parser()).items():
        part = found.partition(f"## luthier {name} ")[2].partition("\n## ")[0]
        assert one.description.rstrip(".")[1:] in part
        assert all(option in part for a in one._actions for option in a.option_strings if option not in ("-h", "--help"))
    assert "[-h] [--json]" in found


def test_the_recipe_reference_holds_every_key(written):
    page = written["recipes.md"]
    assert all(f"`{key}`" in page for key in KEYS)
    assert all(f"`{field}`" in page for field in Train.__dataclass_fields__)
    assert "Bounds memory only; the gradient is the same." in page and "streams" not in atlas_reference.settings("data")


def test_a_part_of_a_text_ends_at_the_next_heading_and_not_at_a_comment_in_code():
    text = "# One\na\n```\n# no heading\n```\nb\n# Two\nc\n"
    assert pages.part(text, "One") == "# One\na\n```\n# no heading\n```\nb\n"
    with pytest.raises(UserError, match="Did you mean 'Two'"):
        pages.part(text, "Twoo")


def test_an_unknown_slot_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match=r"docs/x\.md: there is no slot 'comands'\. Did you mean 'commands'"):
        pages.filled("a\n\n{{ comands }}\n", "x.md")
    assert pages.filled("{{ not a line }} of its own") == "{{ not a line }} of its own"


# -- dead links ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body, fault",
    [
        ('<a href="other.html#here">x</a><a href="#top">x</a><a href="https://example.org">x</a>', None),
        ('<a href="gone.html">x</a>', "gone.html leads nowhere"),
        ('<a href="other.html#there">x</a>', "other.html#there leads to an anchor that is not there"),
        ('<script src="https://cdn.example/x.js"></script>', "loaded from elsewhere"),
        ('<link rel="stylesheet" href="//fonts.example/x.css">', "loaded from elsewhere"),
        ('<img src="missing.png">', "missing.png leads nowhere"),
    ],
)
def test_a_dead_link_is_a_fault(tmp_path, body, fault):
    (tmp_path / "index.html").write_text(f"<html><body>{body}</body></html>")
    (tmp_path / "other.html").write_text('<h1 id="here">x</h1>')
    found = atlas_links.faults(tmp_path)
    assert (found == []) if fault is None else (len(found) == 1 and fault in found[0])
    assert atlas_links.main(str(tmp_path)) == (fault is not None)


def test_a_style_sheet_that_loads_fonts_from_elsewhere_is_a_fault(tmp_path):
    (tmp_path / "index.html").write_text("")
    (tmp_path / "a.css").write_text("@import 'https://fonts.example/a.css'; b{background:url(data:x)}")
    assert len(atlas_links.faults(tmp_path)) == 1
    assert atlas_links.faults(tmp_path / "nothing") != []


def test_counts_add_up():
    total, works, partly, planned, *_ = map(int, re.findall(r"\d+", atlas_papers.counts()))
    assert total == works + partly + planned == len(papers())
