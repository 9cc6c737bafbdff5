import math

from hypothesis import given
from hypothesis import strategies as st

from luthier.report.html import Raw, code, number, page, percent, section, table, text


@given(st.text())
def test_no_text_becomes_markup(words):
    for made in (text(words), table(("h",), [(words,)]), code(words), section(words, "x")):
        inside = made
        for tag in ("div", "table", "thead", "tbody", "tr", "th", "pre", "code", "section", "h2"):
            inside = __import__("re").sub(rf"</?{tag}( [^<>]*)?>", "", inside)
        assert "<" not in inside and ">" not in inside
    assert not any(0x202A <= ord(c) <= 0x202E or 0xD800 <= ord(c) < 0xE000 or ord(c) == 0 for c in text(words))


def test_missing_numbers_are_a_dash():
    assert [number(v) for v in (None, math.nan, math.inf)] == ["-"] * 3 and percent(None) == "-"
    assert (number(0), number(0.0), number(1234567), number(0.12345), number(1e-7)) == ("0", "0", "1,234,567", "0.123", "1.0e-07")


def test_numbers_sort_as_numbers_and_the_first_column_names_its_row():
    made = table(("a", "b"), [("x", 2.5), ("y", None)], sortable=True)
    assert 'data-v="2.5"' in made and made.count('scope="row"') == 2 and made.count("data-v") == 1 and "data-sort" in made


def test_a_page_loads_nothing_and_lists_its_parts():
    made = page("t <b>", "head", [section("First part", "body"), section("Second", Raw("<p>kept</p>"))])
    assert "t &lt;b&gt;" in made and '<a href="#first-part">First part</a>' in made and "<p>kept</p>" in made
    assert "http:" not in made and "https:" not in made and "src=" not in made and "default-src 'none'" in made
