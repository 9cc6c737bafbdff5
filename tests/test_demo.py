import datetime
import json

from babel.dates import format_date

from luthier.demo import FORMATS, QUESTION, SEEN, UNSEEN, dates, write
from luthier.recipe import Recipe, check


def test_every_date_is_what_the_text_says():
    rows = dates(SEEN, 200, seed=3)
    for row in rows:
        day = datetime.date.fromisoformat(row["completion"])
        language, form = row["meta"]["language"], row["meta"]["form"]
        assert row["prompt"] == QUESTION.format(format_date(day, format=form, locale=language)) and form in FORMATS
    english = [r for r in dates(("en",), 40, seed=1) if r["meta"]["form"] == "medium"]
    assert english and all(
        datetime.datetime.strptime(r["prompt"].partition(": ")[2], "%b %d, %Y").date().isoformat() == r["completion"] for r in english
    )


def test_held_out_languages_and_rows_are_held_out(tmp_path):
    recipe = write(tmp_path, train=300, test=40, ood=20, budget=100)
    read = {n: [json.loads(line) for line in (tmp_path / f"{n}.jsonl").read_text().splitlines()] for n in ("train", "test", "ood", "general")}
    prompts = {n: {r["prompt"] for r in rows} for n, rows in read.items()}
    assert not prompts["train"] & prompts["test"] and not set(SEEN) & set(UNSEEN)
    assert {r["meta"]["language"] for r in read["ood"]} <= set(UNSEEN)
    assert len(read["train"]) == 300 and len(read["general"]) >= 20
    assert check(Recipe.load(recipe)) is not None


def test_the_same_seed_gives_the_same_dates():
    assert dates(SEEN, 20, seed=5) == dates(SEEN, 20, seed=5) != dates(SEEN, 20, seed=6)
