"""The demonstration: a small chat model learns to write dates of many languages as ISO 8601.

The dates come from CLDR through Babel, so the data is real, exact and needs no network. Some languages are never trained on: they
are the out-of-domain probe. Everything else is an ordinary recipe, written beside the data for the user to change.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np

from luthier.errors import UserError

SEEN = ("en", "de", "fr", "es", "it", "pt", "nl", "sv", "da", "pl", "cs", "ru", "tr", "fi", "hu", "ro", "id", "el", "bg", "hr")
UNSEEN = ("ca", "nb", "uk", "sk", "gl", "sl")
FORMATS = ("full", "long", "medium")
QUESTION = "Write this date as YYYY-MM-DD: {}"

RECIPE = """\
# SmolLM2-135M-Instruct learns to write dates of {seen} languages as ISO 8601; {unseen} other languages are held out.
name: dates
model: smollm2-135m
data: {{train: [{folder}/train.jsonl, {folder}/replay.jsonl], test: {folder}/test.jsonl, ood: {folder}/ood.jsonl, general: {folder}/general.jsonl}}
select: {{method: mig, budget: {budget}, tags: tags}}      # every language and month is covered, the common ones do not crowd out the rare
adapt: {{method: lora, rank: 16, alpha: 32}}
objective: sft
optimize: {{method: adamw, lr: 2e-3}}
train: {{epochs: 1, batch: 6, tokens_per_micro_batch: 1280, seed: 0, schedule: cosine, warmup: 0.05}}
measure:
  - {{method: task, max_new_tokens: 13, limit: 60}}
  - {{method: forgetting, max_new_tokens: 10}}
  - {{method: calibration, max_new_tokens: 13, limit: 60}}
  - weights
"""

GENERAL = (
    ("What is the capital of France?", "Paris"), ("What is the capital of Italy?", "Rome"), ("What is the capital of Japan?", "Tokyo"),
    ("What is the capital of Egypt?", "Cairo"), ("What is the capital of Spain?", "Madrid"), ("What is the capital of Germany?", "Berlin"),
    ("What colour is the sky on a clear day?", "blue"), ("How many days does a week have?", "seven"), ("What is the opposite of hot?", "cold"),
    ("What is the opposite of big?", "small"), ("Which animal says meow?", "cat"), ("What do bees make?", "honey"),
    ("What is frozen water called?", "ice"), ("Which planet do we live on?", "Earth"), ("What is the first month of the year?", "January"),
    ("What is the largest ocean?", "Pacific"), ("Which language is spoken in Brazil?", "Portuguese"), ("What gas do plants take in?", "carbon dioxide"),
    ("Who wrote Romeo and Juliet?", "Shakespeare"), ("What is the chemical symbol for water?", "H2O"),
)  # fmt: skip


REPLAY = (
    ("What is the capital of Norway?", "The capital of Norway is Oslo."), ("What is the capital of Portugal?", "The capital of Portugal is Lisbon."),
    ("What is the capital of China?", "The capital of China is Beijing."), ("What is the capital of Kenya?", "The capital of Kenya is Nairobi."),
    ("What is the capital of Peru?", "The capital of Peru is Lima."), ("What is the capital of Poland?", "The capital of Poland is Warsaw."),
    ("What colour is grass?", "Grass is green."), ("What colour is snow?", "Snow is white."), ("What colour is a ripe banana?", "A ripe banana is yellow."),
    ("How many months does a year have?", "A year has twelve months."), ("How many legs does a spider have?", "A spider has eight legs."),
    ("What is the opposite of up?", "The opposite of up is down."), ("What is the opposite of fast?", "The opposite of fast is slow."),
    ("What is the opposite of old?", "The opposite of old is young."), ("Which animal says woof?", "A dog says woof."), ("What do cows give us?", "Cows give us milk."),
    ("What is a baby dog called?", "A baby dog is called a puppy."), ("Which star does the Earth go around?", "The Earth goes around the Sun."),
    ("What is the last month of the year?", "The last month of the year is December."), ("What is the longest river in Africa?", "The longest river in Africa is the Nile."),
    ("Which language is spoken in Mexico?", "Spanish is spoken in Mexico."), ("What gas do we breathe in to live?", "We breathe in oxygen."),
    ("Who painted the Mona Lisa?", "Leonardo da Vinci painted the Mona Lisa."), ("What is the chemical symbol for gold?", "The chemical symbol for gold is Au."),
)  # fmt: skip
"""Some rows of something else: a model that only ever sees dates soon answers everything with a date."""


def dates(languages: tuple[str, ...], n: int, seed: int) -> list[dict[str, Any]]:
    """`n` distinct dates written out in the languages' own words, with their ISO forms."""
    try:
        from babel.dates import format_date
    except ImportError as error:
        raise UserError("The demonstration needs Babel: pip install 'luthier[demo]'.") from error
    rng = np.random.default_rng(seed)
    first, seen = datetime.date(1950, 1, 1), set[str]()
    rows: list[dict[str, Any]] = []
    while len(rows) < n:
        day = first + datetime.timedelta(days=int(rng.integers(0, 36_525)))
        language, form = str(rng.choice(languages)), str(rng.choice(FORMATS))
        text = format_date(day, format=form, locale=language)
        # Medium forms of some languages are digits only; which is day and which month cannot be known.
        if text in seen or not any(c.isalpha() for c in text):
            continue
        seen.add(text)
        tags = [language, form, f"{language} month {day.month}"]
        rows.append({"prompt": QUESTION.format(text), "completion": day.isoformat(), "tags": tags, "meta": {"language": language, "form": form}})
    return rows


def write(folder: Path, train: int = 3000, test: int = 60, ood: int = 40, budget: int = 720) -> Path:
    """Data and recipe of the demonstration; returns the recipe's path."""
    folder.mkdir(parents=True, exist_ok=True)
    pool = dates(SEEN, train + test, seed=0)
    general = [{"prompt": q, "completion": a} for q, a in GENERAL]
    replay = [{"prompt": q, "completion": a, "tags": ["other", q]} for q, a in REPLAY]
    for name, rows in (("train", pool[:train]), ("replay", replay), ("test", pool[train:]), ("ood", dates(UNSEEN, ood, seed=1)), ("general", general)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(seen=len(SEEN), unseen=len(UNSEEN), folder=".", budget=budget), encoding="utf-8")
    return recipe


def main(folder: str | Path = "runs/demo") -> Any:
    """Make the data, run the recipe, say what came of it."""
    import time

    from luthier.run import tune

    base = Path(folder)
    recipe = write(base / "data")
    run = base / time.strftime("%Y%m%d-%H%M%S")
    print(f"A date is a small thing to learn, and easy to check. Data and recipe: {recipe.parent}\n")
    done = tune(recipe, run=run, quiet=False)
    print(f'Now ask it:   luthier ask {run} "{QUESTION.format("14 juillet 1989")}"')
    print(f"Change it:    edit {recipe}, then luthier tune {recipe}")
    return done
