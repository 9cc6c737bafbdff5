"""KAFT against plain tuning on context questions: does the model obey a context that contradicts it, and ignore one beside the point?"""

from luthier.claims import Claim
from luthier.lab import make

claim = Claim(
    paper=131,
    says="Counterfactual, irrelevant and absent contexts in training make a model follow what a context says and fall back on its memory where it says nothing.",
    published="T5 and PaLM up to 62B: after plain tuning controllability and robustness are low at any size; KAFT raises both at all sizes (the summary; no cell is carried)",
    metric="weaker of control and robustness",
    smallest=0.05,
    equal=("rows", "steps"),
    seeds=(0, 1, 2, 3),
    methods=("synthesize/kaft", "measure/context_control"),
    tasks=("facts",),
    models=("lm-s",),
    departs="240 facts that a 0.43M model knows by heart; a context is one statement, a question the beginning of one; 300 steps on unknown people teach it to read. "
    "Training asks about one half of the countries and elements, the test about the other; the metric is the smaller of controllability and robustness.",
)
GRID = {"lr": (1e-4, 3e-4, 1e-3)}
PROMPTS = {"template": "context : {context} {question}", "template_empty": "{question}"}


def questions(rows):
    """Statements as context, the beginning of another statement as question. The stop belongs to the answer, as in what the model knows."""
    from luthier.lab._fact_text import cloze

    made = []
    for row in rows:
        meta = row["meta"]
        context = row["prompt"].removeprefix("context : ").split(" . ")[0] + " ."
        question = cloze(meta["subject"], meta["relation"], 0)
        made.append({"question": question, "context": context, "answer": f"{row['completion']} .", "subject": meta["subject"], "type": meta["relation"]})
    return made


def setting(trial):
    """The start, which can read: it has learned to find unknown people's facts in a context, and kept the real facts. Training questions;
    test questions with all four kinds of context, and which of them the start answers without any."""
    from luthier.synthesize.kaft import KAFT

    people = questions(make("facts", world="people", entities=298, context="relevant", documents=1, n=4000, seed=trial.seed).train)
    read = [{"prompt": PROMPTS["template"].format(**row), "completion": row["answer"]} for row in people]
    known = make("facts", world="real", entities=88, forms="statement", n=2000, seed=trial.seed).train
    start = trial.tune("lab:lm-s", read + known, steps=300, lr=1e-3)
    splits = make("facts", world="real", entities=88, context="relevant", documents=1, n=600, test=200, seed=trial.seed)
    test = KAFT(memory="gold", **PROMPTS).synthesize(questions(splits.test))
    closed = trial.answers(start, [{"prompt": row["question"]} for row in test], 8)
    return start, questions(splits.train), test, [said.strip() == row.get("gold", row["answer"]) for said, row in zip(closed, test)]


def judged(trial, tuned=True, **shares):
    from luthier.measure.context_control import context_control

    start, train, test, known = trial.once("setting", lambda: setting(trial))
    model = start
    if tuned:
        given = {"counterfactual": 0.0, "irrelevant": 0.0, "empty": 0.0, **shares}
        model = trial.tune(start, train, steps=300, lr=trial["lr"], synthesize={"method": "kaft", **PROMPTS, **given}, objective="sft")
    kinds, targets, gold = ([row[key] if key in row else row["answer"] for row in test] for key in ("kind", "answer", "gold"))
    found = context_control(kinds, trial.answers(model, test, 8), targets, gold, known)
    return {"weaker of control and robustness": min(found["controllability"], found["robustness"]), **found, "known": sum(known) / len(known), "general": trial.general(model, 200)}


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
    return judged(trial, tuned=False)
