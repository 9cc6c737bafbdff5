import copy

import numpy as np
import pytest

from luthier.core.context import Context
from luthier.errors import DataError, RecipeError
from luthier.measure.context_control import context_control
from luthier.synthesize._shared import mentions, swap
from luthier.synthesize.kaft import KAFT, kaft
from tests.helpers import tiny_llama

CITIES = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo", "Peru": "Lima"}
ROWS = [
    {"question": f"capital of {land} ?", "context": f"{city} is old . The capital of {land} is {city} .", "answer": city, "subject": land, "type": "city"}
    for land, city in CITIES.items()
]


def made(**shares):
    return kaft(ROWS, [None] * 6, np.random.default_rng(0), **shares)


def test_a_counterfactual_context_names_the_new_answer_and_no_longer_the_old():
    rows = [r for r in made() if r["kind"] == "counterfactual"]
    assert len(rows) == 6
    for row in rows:
        assert mentions(row["context"], row["answer"]) and not mentions(row["context"], row["gold"])
        assert row["answer"] in CITIES.values() and row["answer"] != row["gold"]


def test_an_irrelevant_context_names_neither_answer_nor_subject():
    rows = [r for r in made(irrelevant=2.0) if r["kind"] == "irrelevant"]
    assert len(rows) == 12
    for row in rows:
        assert not mentions(row["context"], row["gold"]) and not mentions(row["context"], row["subject"])


def test_without_shares_the_original_set_comes_back_and_input_stays():
    before = copy.deepcopy(ROWS)
    rows = made(counterfactual=0, irrelevant=0, empty=0)
    assert [{k: r[k] for k in ROWS[0]} for r in rows] == ROWS == before


def test_memory_is_the_target_of_irrelevant_and_empty_rows():
    rows = kaft(ROWS, [f"m{i}" for i in range(6)], np.random.default_rng(0))
    memory = {r["question"]: f"m{i}" for i, r in enumerate(ROWS)}
    for row in rows:
        if row["kind"] in ("irrelevant", "empty"):
            assert row["answer"] == memory[row["question"]]
    assert all(r["context"] == "" for r in rows if r["kind"] == "empty")


def test_memory_is_the_frozen_base_models_greedy_answer():
    base = tiny_llama()
    rows = [{"question": f"w{i} w{i + 1}", "context": f"w{i + 9} is w{i + 20}", "answer": f"w{i + 20}"} for i in range(4)]
    ctx = Context(tiny_llama(seed=1), models={"base": base})
    out = KAFT(template_empty="{question}", max_new_tokens=4).synthesize(rows, ctx)
    from luthier.core.families import Decode
    from luthier.core.rows import prompt_ids

    wanted = {r["question"]: base.generate([prompt_ids({"prompt": r["question"]}, base.tokenizer)], Decode(max_new_tokens=4))[0][0].text or r["answer"] for r in rows}
    empty = [r for r in out if r["kind"] == "empty"]
    assert len(empty) == 4 and all(r["completion"] == wanted[r["question"]] for r in empty)


def test_whole_words_only():
    assert swap("Rome and Romeo saw ROME.", "Rome", "Paris") == "Paris and Romeo saw Paris."
    assert not mentions("Romeo", "Rome")


def test_bad_input():
    with pytest.raises(DataError, match="needs the column 'context', which row 0 lacks"):
        KAFT().synthesize([{"question": "a", "answer": "b"}])
    with pytest.raises(RecipeError, match="template"):
        KAFT(template="no slots")


def test_control_counts_known_questions_only():
    kinds = ["counterfactual", "counterfactual", "irrelevant", "irrelevant", "relevant", "empty"]
    answers = ["Rome", "Paris", "Paris", "Oslo", "paris.", "Lyon"]
    targets = ["Rome", "Rome", "x", "x", "Paris", "x"]
    gold = ["Paris"] * 6
    got = context_control(kinds, answers, targets, gold, [True, False, True, True, True, True])
    assert got == {"controllability": 1.0, "robustness": 0.5, "relevant": 1.0, "closed_book": 0.0}
    assert context_control([], [], [], [], [])["controllability"] is None
