"""Verifiers: what passes, what does not, and what is never guessed."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.core.verify import Verdict, final_number, gold, normalise, verifier
from luthier.errors import DataError, RecipeError


def score(spec, answer, row, **options):
    return verifier(spec, **options)(answer, row).score


@pytest.mark.parametrize(
    ("text", "value"),
    [("#### 7", 7), ("7 ; 9 ; 7 ; # 7", 7), ("it is 3-4", 4), ("x=-4.", -4), ("cost: $1,234.50 in all", Fraction("1234.5")), ("3/4", Fraction(3, 4)), ("12 / 5 apples", Fraction(12, 5)),
     ("first 2, then 5", 5), ("2e3", 2000), ("+5%", 5), ("\N{MINUS SIGN}8", -8), (".5", Fraction(1, 2)), ("５", 5), ("# 7 and not 8", 7), ("12 and 1,2", 2)],
)  # fmt: skip
def test_final_number(text, value):
    assert final_number(text) == value


@pytest.mark.parametrize("text", ["", "none", "v1.2b", "a1 b2", "9/0", "# none", "9" * 500])
def test_no_number_is_none(text):
    assert final_number(text) is None


@given(st.integers(-(10**9), 10**9))
def test_every_integer_is_read_back(n):
    for text in (f"so {n}", f"so {n:,}", f"1 2 # {n}", f"{n}.0"):
        assert final_number(text) == n


@given(st.text(max_size=200))
def test_no_text_breaks_a_verifier(text):
    row = {"answer": "3", "labels": ["3", "four"]}
    for spec in ("exact", "normalised", "number", "number:strict", "label", "contains", "json", r"regex:(\d+)"):
        try:
            assert 0 <= score(spec, text, row) <= 1
        except DataError:
            assert spec == "json"


def test_number_compares_by_value_and_needs_no_wording():
    row = {"answer": "#### 0.75"}
    assert score("number", "that makes 3/4", row) == 1 == score("number", "0.7500000001", row)
    assert score("number", "0.76", row) == 0
    assert score("number", "1000000", {"answer": "1000001"}) == 0
    verdict = verifier("number")("no idea", row)
    assert verdict == Verdict(0.0, None, "no number can be read from the answer") and not verdict
    with pytest.raises(DataError, match="no number"):
        verifier("number")("4", {"answer": "yes"})


def test_strict_wants_the_whole_answer():
    row = {"answer": "7"}
    for good in ("7", " $7. ", "# 7", "7.0"):
        assert score("number:strict", good, row) == 1 == score("number", good, row, strict=True)
    for loose in ("it is 7", "5 # 7", "7 apples", "# 7 8"):
        assert score("number:strict", loose, row) == 0 and score("number", loose, row) == 1
    labels = {"label": "yes", "labels": ["yes", "no"]}
    assert score("label", "I say yes!", labels) == 1 and score("label:strict", "I say yes!", labels) == 0 and score("label:strict", " Yes.", labels) == 1


def test_exact_and_normalised():
    row = {"answer": "New York"}
    assert score("exact", " New York\n", row) == 1 and score("exact", "new york", row) == 0
    assert score("normalised", '"new   york".', row) == 1 and score("normalised", "York", row) == 0
    assert normalise("(Ａ b)!") == "a b"


def test_any_right_answer_passes():
    row = {"answer": ["four", "4"]}
    assert score("exact", "4", row) == score("exact", "four", row) == 1
    assert score("number", "4.0", {"answers": ["4", "5"]}) == 1


def test_label_reads_one_label_or_none():
    row = {"label": "safe", "labels": ["safe", "not safe", "unclear"]}
    assert score("label", "The text is Safe.", row) == 1
    assert score("label", "The text is not safe.", row) == 0
    assert verifier("label")("The text is not safe.", row).parsed == "not safe"
    assert "several" in verifier("label")("safe or unclear", row).reason
    assert "no label" in verifier("label")("unsafely", row).reason
    assert score("label", " Safe ", {"label": "safe"}) == 1 and score("label", "is safe", {"label": "safe"}) == 0
    numbered = {"label": 1, "options": [0, 1]}
    assert score("label", "class 1", numbered) == 1 and score("label", "class 11", numbered) == 0


def test_contains_needs_whole_tokens():
    assert score("contains", "there are 12 of them", {"answer": "12"}) == 1
    assert score("contains", "there are 126 of them", {"answer": "12"}) == 0
    assert score("contains", "It was New York, I think", {"answer": "new york"}) == 1
    assert score("contains", "anything", {"answer": ""}) == 0


def test_regex():
    assert score(r"regex:answer is (\w+)", "the answer is 3; no, the answer is Four", {"answer": "four"}) == 1
    assert score(r"regex:^[ab]+$", "abba", {"answer": "x"}) == 1 and score(r"regex:^[ab]+$", "abc", {}) == 0
    assert verifier("regex", strict=True, pattern=r"#(\d)")("see #4", {"answer": "4"}).score == 0
    with pytest.raises(RecipeError, match="not a regular expression"):
        verifier("regex:(")
    with pytest.raises(RecipeError, match="needs a pattern"):
        verifier("regex")


def test_json_compares_keys_and_values():
    row = {"answer": '{"name": "x", "n": 1, "deep": {"a": [1, 2]}}'}
    good = 'Here: {"deep": {"a": [1, 2]}, "n": 1.0, "name": "x"} done'
    assert score("json", good, row) == 1 and score("json:strict", good, row) == 0
    verdict = verifier("json")('{"name": "y", "n": 1, "more": 0, "deep": {"a": [1, 2]}}', row)
    assert verdict.score == 0 and verdict.reason == "these keys differ: more, name"
    assert score("json", "{not json} {", row) == 0
    assert score("json", '{"a": 1}', {"answer": {"a": 1}}) == 1


def test_gold_is_found_where_rows_keep_it():
    assert gold({"prompt": "p", "completion": "c"}) == ["c"]
    assert gold({"prompt": "p", "completion": [{"role": "assistant", "content": "c"}]}) == ["c"]
    assert gold({"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "c"}]}) == ["c"]
    assert gold({"prompt": "p", "meta": {"answer": 7}}) == ["7"]
    assert gold({"label": 0, "completion": "c"}) == ["0"]
    with pytest.raises(DataError, match="no right answer"):
        gold({"prompt": "p"})


def test_own_functions_and_rows_that_carry_their_check():
    assert verifier(lambda a, r: a == r["x"])("1", {"x": "1"}) == Verdict(1.0, "1")
    assert verifier(lambda a, r: 0.25)("1", {}).score == 0.25
    assert verifier(lambda a, r: Verdict(0.5, None, "half"))("1", {}).reason == "half"
    assert score("lab", "5", {"verify": lambda a, r: a == "5"}) == 1
    assert score("lab", "so 5", {"meta": {"verify": "number"}, "answer": "5"}) == 1
    with pytest.raises(DataError, match="carries no check"):
        verifier("lab")("5", {"answer": "5"})
    for name in ("../os", "no_such_task", "tokenizer"):
        with pytest.raises(DataError):
            verifier("lab")("5", {"meta": {"task": name}})


def test_lab_tasks_judge_their_own_rows():
    from luthier.lab.traces import traces

    rows = traces(seed=0, n=20).train
    check = verifier("lab:traces")
    assert all(check(r["completion"], r).score == 1 for r in rows)
    assert all(check(r["completion"] + " 3", r).score < 1 for r in rows)


@pytest.mark.parametrize("bad", ["exakt", "number:loose", "exact:strictly"])
def test_unknown_names_are_refused(bad):
    with pytest.raises(RecipeError):
        verifier(bad)
    with pytest.raises(RecipeError, match="Did you mean 'exact'"):
        verifier("exakt")
