"""KAFT against plain tuning on context questions: does the model obey a context that contradicts it, and ignore one beside the point?"""

from luthier.claims import Claim
from luthier.lab import make

claim = Claim(
    paper=131,
    says="Counterfactual, irrelevant and absent contexts in training make a model follow what a context says and fall back on its memory where it says nothing.",
    published="T5 and PaLM up to 62B: after plain tuning controllability and robustness are low at any size; KAFT raises both at all sizes (the summary; no cell is carried)",
    metric="control and robustness",
    smallest=0.05,
    equal=("rows", "steps"),
    seeds=(0, 1, 2, 3, 4),
    methods=("synthesize/kaft", "measure/context_control"),
    tasks=("facts",),
    models=("lm-s",),
    departs="240 facts that a 0.43M model knows by heart; contexts are two statements of one relation and a question is the beginning of a statement. "
    "Training asks about one half of the countries and elements, the test about the other; the metric is the mean of controllability and robustness.",
)
GRID = {"lr": (1e-4, 3e-4, 1e-3)}
PROMPTS = {"template": "context : {context} {question}", "template_empty": "{question}"}


def questions(rows):
    """Statements as context, the beginning of another statement as question. The stop belongs to the answer, as in what the model knows."""
    from luthier.lab._fact_text import cloze

    made = []
    for row in rows:
        meta = row["meta"]
        context = " . ".join(row["prompt"].removeprefix("context : ").split(" . ")[:2]) + " ."
        question = cloze(meta["subject"], meta["relation"], 0)
        made.append({"question": question, "context": context, "answer": f"{row['completion']} .", "subject": meta["subject"], "type": meta["relation"]})
    return made


def setting(trial):
    """Training questions; test questions with all four kinds of context, and which of them the untouched model answers without any."""
    from luthier.core.models import load
    from luthier.synthesize.kaft import KAFT

    splits = make("facts", world="real", entities=88, context="relevant", n=400, test=200, seed=trial.seed)
    test = KAFT(memory="gold", **PROMPTS).synthesize(questions(splits.test))
    closed = trial.answers(load("lab:lm-s"), [{"prompt": row["question"]} for row in test], 8)
    return questions(splits.train), test, [said.strip() == row.get("gold", row["answer"]) for said, row in zip(closed, test)]


def judged(trial, model=None, **shares):
    from luthier.measure.context_control import context_control

    train, test, known = trial.once("setting", lambda: setting(trial))
    if model is None:
        given = {"counterfactual": 0.0, "irrelevant": 0.0, "empty": 0.0, **shares}
        model = trial.tune("lab:lm-s", train, steps=300, lr=trial["lr"], synthesize={"method": "kaft", **PROMPTS, **given}, objective="sft")
    kinds, targets, gold = ([row[key] if key in row else row["answer"] for row in test] for key in ("kind", "answer", "gold"))
    found = context_control(kinds, trial.answers(model, test, 8), targets, gold, known)
    return {"control and robustness": (found["controllability"] + found["robustness"]) / 2, **found, "known": sum(known) / len(known), "general": trial.general(model, 200)}


@claim.arm("method", grid=GRID)
def kaft(trial):
    return judged(trial, counterfactual=1.0, irrelevant=1.0, empty=1.0)


@claim.arm("baseline", grid=GRID)
def vanilla(trial):
    """The questions with their relevant contexts."""
    return judged(trial)


@claim.arm("control", grid=GRID)
def counterfactual_only(trial):
    return judged(trial, counterfactual=1.0)


@claim.arm(grid=GRID)
def irrelevant_only(trial):
    return judged(trial, irrelevant=1.0)


@claim.arm(exempt=True)
def start(trial):
    from luthier.core.models import load

    return judged(trial, load("lab:lm-s"))
