"""Self-data distillation: every kept rewrite passes the check, and nothing else of the data changes."""

from __future__ import annotations

import pytest

from luthier.core.context import Context
from luthier.core.families import Answer
from luthier.core.verify import verifier
from luthier.errors import DataError, RecipeError
from luthier.synthesize.self_data_distillation import SelfDataDistillation, self_data_distillation
from tests.helpers import tiny_llama

ROWS = [{"prompt": f"w{i} plus", "completion": f"w{i} gives #### {i}", "meta": i} for i in range(4)]


def teacher(replies):
    """A model that gives these answers: text, or (text, False) for one that was cut."""
    family = tiny_llama(seed=3)
    asked = []

    def generate(prompts, decode=None, n=1, batch=32):
        asked.extend(family.tokenizer.decode(p) for p in prompts)
        found = []
        for given in replies:
            given = given if isinstance(given, list) else [given]
            found.append([Answer([], g if isinstance(g, str) else g[0], isinstance(g, str)) for g in given])
        return found

    family.generate = generate
    return family, asked


def test_right_rewrites_replace_and_wrong_ones_do_not():
    check = verifier("number")
    made, changed = self_data_distillation(ROWS, [["so 0"], ["2"], [], ["x", "it is 3.0"]], lambda t, r: bool(check(t, r)))
    assert changed == [True, False, False, True]
    assert [r["completion"] for r in made] == ["so 0", ROWS[1]["completion"], ROWS[2]["completion"], "it is 3.0"]
    assert [(r["prompt"], r["meta"]) for r in made] == [(r["prompt"], r["meta"]) for r in ROWS]


def test_a_teacher_that_always_fails_leaves_the_data_as_they_are():
    family, _ = teacher(["99"] * 4)
    ctx = Context(tiny_llama(), models={"base": family})
    assert SelfDataDistillation().synthesize(ROWS, ctx) == ROWS
    assert any("Not one rewrite" in n for n in ctx.notices)


def test_every_kept_row_passes_the_check_and_cut_ones_are_not_used():
    family, _ = teacher(["we get 0", ("we get 1", False), "5", "w3 gives #### 3"])
    ctx = Context(tiny_llama(), models={"base": family})
    method = SelfDataDistillation()
    made = method.synthesize(ROWS, ctx)
    assert [r["completion"] for r in made] == ["we get 0", ROWS[1]["completion"], ROWS[2]["completion"], "w3 gives #### 3"]
    assert method.report["rewritten"] == 2 and method.report["verbatim copies"] == 1 and method.report["rows"] == 4
    assert all(verifier("number")(m["completion"], r) for m, r in zip(made, ROWS))


def test_the_teacher_is_the_base_and_sees_the_reference_unless_it_answers_alone():
    for mode, sees in (("rewrite", True), ("own", False)):
        family, asked = teacher(["0"] * 4)
        SelfDataDistillation(mode=mode, template="w30 {prompt} w31 {reference}").synthesize(ROWS, Context(tiny_llama(), models={"base": family}))
        assert len(asked) == 4 and (("w30" in asked[2]) == ("w31 w2" in asked[2]) == sees) and "w2" in asked[2]


def test_braces_in_rows_are_text():
    row = {"prompt": "a {reference} {x}", "completion": "b {prompt}"}
    assert SelfDataDistillation(template="<{prompt}|{reference}>")._rewriting(row)["prompt"] == "<a {reference} {x}|b {prompt}>"
    assert SelfDataDistillation(template="{reference}<{prompt}|{prompt}>")._rewriting(row)["prompt"] == "b {prompt}<a {reference} {x}|a {reference} {x}>"


def test_the_report_has_the_teachers_own_loss():
    family = tiny_llama(seed=3)
    ctx = Context(tiny_llama(), models={"base": family})
    method = SelfDataDistillation(mode="own", verify=None, max_new_tokens=200)
    rows = [{"prompt": f"w{i}", "completion": f"w{i + 1} w{i + 2}"} for i in range(6)]
    made = method.synthesize(rows, ctx)
    changed = [i for i in range(6) if made[i] != rows[i]]
    if changed:  # its own greedy words are likelier to it than ours
        assert method.report["teacher nll of rewritten"] < method.report["teacher nll of given"]
    assert method.report["rewritten"] + method.report["kept as given"] == 6


def test_conversations_keep_their_form():
    row = {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "#### 4"}]}
    made, _ = self_data_distillation([row], [["so 4"]], lambda t, r: True)
    assert made[0]["messages"] == [row["messages"][0], {"role": "assistant", "content": "so 4"}] and row["messages"][1]["content"] == "#### 4"
    turns = {"prompt": [{"role": "user", "content": "w1"}], "completion": [{"role": "assistant", "content": "4"}]}
    assert self_data_distillation([turns], [["so 4"]], lambda t, r: True)[0][0]["completion"] == [{"role": "assistant", "content": "so 4"}]


def test_bad_input():
    with pytest.raises(RecipeError, match="context"):
        SelfDataDistillation().synthesize(ROWS)
    with pytest.raises(DataError, match="row 0"):
        SelfDataDistillation().synthesize([{"text": "w1"}], Context(tiny_llama()))
    with pytest.raises(RecipeError, match="verifier"):
        SelfDataDistillation(verify="nonsense")
    for bad, name in (({"mode": "x"}, "mode"), ({"template": "{prompt}"}, "template"), ({"samples": 0}, "samples"), ({"samples": 3}, "temperature")):
        with pytest.raises(RecipeError, match=name):
            SelfDataDistillation(**bad)
