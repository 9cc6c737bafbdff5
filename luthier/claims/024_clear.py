"""CLEAR against training on the raw rows: 1,200 lists and fact questions, three in ten with a wrong answer."""

from luthier.claims import Claim
from luthier.lab import make

claim = Claim(
    paper=24,
    says="Dropping doubted rows and correcting them with the tuned model's sure answers beats training on all rows.",
    published="SQuAD, Emails and DROP with corrupted rows: filtering, and filtering with correction, raise accuracy and the share of valid JSON of GPT-3.5-Turbo and "
    "Llama-2-7B-chat over the raw set, without a larger model (the summary; no cell is carried)",
    metric="exact match",
    smallest=0.02,
    equal=("rows", "steps"),
    seeds=(0, 1, 2, 3),
    methods=("curate/clear", "measure/bs_detector"),
    tasks=("traces", "facts"),
    models=("lm-s",),
    departs="Lists and questions about real facts, another row's answer in 30 % of 1,200 rows; the model has had 200 steps on 3,000 other rows, so that it half knows the task. "
    "It cannot be asked whether an answer is right: reflection is the answer's mean token probability in three levels, similarity that of edits; "
    "the judge compares likelihoods under the start. The budget counts the last tuning; the first one, whose model corrects, is in the time.",
)
GRID = {"lr": (1e-4, 3e-4, 1e-3)}
STEPS = 150


def task(trial):
    """The model that half knows the task, its rows with wrong answers, and test questions."""

    def rows(seed, n, wrong):
        lists = make("traces", skills="sort,sub", n=n * 2 // 3, wrong=wrong, seed=seed, test=300)
        facts = make("facts", world="real", entities=80, n=n // 3, wrong=wrong, seed=seed, test=150)
        return lists, facts

    lists, facts = rows(trial.seed, 1200, 0.3)
    asked = {row["prompt"] for row in lists.test + facts.test}
    warm = [row for part in rows(trial.seed + 1000, 3000, 0.0) for row in part.train if row["prompt"] not in asked]
    start = trial.tune("lab:lm-s", warm, steps=200, lr=1e-3)
    noisy = [{**row, "number": i} for i, row in enumerate(lists.train + facts.train)]
    return start, noisy, [(part.test, part.verify) for part in (lists, facts)]


def context(trial, model, **others):
    from luthier.core.context import Context

    return Context(model, seed=trial.seed, models={"base": model, **others})


def filtered(trial):
    """The half of the rows whose answer the start doubts least."""
    from luthier.curate.clear import Clear

    start, rows, _ = trial.once("task", lambda: task(trial))
    return Clear(measure_options={"reflection": "probability", "max_new_tokens": 12}).curate(rows, context(trial, start))


def judged(trial, rows):
    start = trial.once("task", lambda: task(trial))[0]
    model = trial.tune(start, rows, steps=STEPS, lr=trial["lr"], objective="sft")
    return scores(trial, model) | {"rows left": len(rows), "wrong rows left": sum(not row["meta"]["clean"] and not row.get("corrected") for row in rows) / len(rows)}


def scores(trial, model):
    lists, facts = (trial.right(model, rows, verify, 12) for rows, verify in trial.once("task", lambda: task(trial))[2])
    return {"exact match": (lists + facts) / 2, "lists": lists, "facts": facts, "general": trial.general(model, 100)}


@claim.arm("method", grid=GRID)
def clear(trial):
    """Filter, tune, let the tuned model answer, take its answer where the start is sure that it is better, tune again from the start."""
    from luthier.curate.clear import Clear

    start, noisy, _ = trial.once("task", lambda: task(trial))
    kept = trial.once("filtered", lambda: filtered(trial))
    spent = dict(trial.spent)
    tuned = trial.tune(start, kept, steps=STEPS, lr=trial["lr"], objective="sft")
    trial.spent = spent
    fixed = Clear(stage="correct", judge="likelihood", max_new_tokens=12).curate(noisy, context(trial, start, previous=tuned))
    numbers = {row["number"] for row in kept}
    replaced = [row for row in fixed if row.get("corrected")]
    right = sum(row["completion"] == noisy[row["number"]]["meta"].get("answer") for row in replaced) / max(1, len(replaced))
    return judged(trial, [row for row in fixed if row.get("corrected") or row["number"] in numbers]) | {"rows corrected": len(replaced), "corrections that are right": right}


@claim.arm("baseline", grid=GRID)
def raw(trial):
    return judged(trial, trial.once("task", lambda: task(trial))[1])


@claim.arm("control", name="filter", grid=GRID)
def filter_only(trial):
    """The first half of CLEAR: shows what correction adds."""
    return judged(trial, trial.once("filtered", lambda: filtered(trial)))


@claim.arm(grid=GRID)
def random_half(trial):
    """As few rows as the filter keeps, by chance."""
    import numpy as np

    rows = trial.once("task", lambda: task(trial))[1]
    return judged(trial, [rows[i] for i in np.random.default_rng([trial.seed, 24]).permutation(len(rows))[: len(rows) // 2]])


@claim.arm(grid=GRID, exempt=True)
def clean_rows(trial):
    """An upper bound: the rows that are right."""
    return judged(trial, [row for row in trial.once("task", lambda: task(trial))[1] if row["meta"]["clean"]])


@claim.arm(exempt=True)
def start(trial):
    return scores(trial, trial.once("task", lambda: task(trial))[0])
