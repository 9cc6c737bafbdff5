"""Masked-thought fine-tuning against plain fine-tuning on 250 chains of five operands whose every line copies what is left, trained for a long time."""

from luthier.claims import Claim
from luthier.lab import make

claim = Claim(
    paper=36,
    says="Hiding random input tokens of the worked solution, all labels kept, gives more right answers than plain fine-tuning on the same few rows.",
    published="GSM8K, Llama-2-7B: 42.8 with SFT, 47.3 with MFT (random ids, rate 0.4); MetaMath Mistral-7B 77.7 and 79.9 (mask token, rate 0.2)",
    metric="right answers",
    smallest=0.02,
    equal=("rows", "steps"),
    seeds=(0, 1, 2, 3),
    methods=("objective/masked-thought", "objective/sft"),
    tasks=("traces",),
    models=("lm-s",),
    departs="250 chains of five operands modulo 10, each line the expression that remains, seen 32 times; a model of 0.4 M parameters that knows chains of two to four, written shorter. "
    "The method's arm is the MetaMath form (mask token, rate 0.2), as a tiny model is hurt more by corruption; the GSM8K form is an arm beside it.",
    reason="Seeds differ by more than the methods do (0.27 to 0.43 with masks, 0.34 to 0.39 without). Where each line repeats all that remains, hidden words can be read off the "
    "line before, so little is asked of the model that plain tuning does not ask; without that, so small a model loses by masks. Masks in the question help here (+0.12), "
    "which the paper does not see.",
)
GRID = {"lr": (1e-4, 3e-4, 1e-3)}
LONGEST = 32
"""Tokens of the longest solution, and a few more."""


def chains(seed):
    return make("traces", skills="chain", operands="5", style="redundant", n=250, seed=seed, test=300)


def judged(trial, change=None, **recipe):
    """Tune on the chains, `change`d or not; count right final answers, and how often a planted false state is seen through."""
    task = trial.once("chains", lambda: chains(trial.seed))
    rows = change(task.train) if change else task.train
    model = trial.tune("lab:lm-s", rows, steps=500, batch=16, lr=trial["lr"], **recipe)
    right = [task.verify(row, answer).parsed["final_right"] for row, answer in zip(task.test, trial.answers(model, task.test, LONGEST))]
    return {"right answers": sum(right) / len(right), "sees through a false state": through(trial, model, task.test), "general": trial.general(model, 200)}


def through(trial, model, tests):
    """Begin the solution with a first line whose value is false: how many final answers are right all the same. It takes the question to get there."""
    begun = []
    for row in tests:
        value, rest = row["completion"].split(" ; ")[0].split(" ", 1)
        begun.append({**row, "prompt": f"{row['prompt']} {(int(value) + 1) % 10} {rest} ;"})
    return sum(answer.rpartition("# ")[2] == row["meta"]["answer"] for row, answer in zip(tests, trial.answers(model, begun, LONGEST))) / len(tests)


def prompt_noise(rows):
    """Twenty copies of every row, a tenth of each question's numbers and signs replaced: noise of the same kind where it cannot teach reliance on the question."""
    import numpy as np

    rng, copies = np.random.default_rng(36), []
    for row in rows * 20:
        head, body = row["prompt"].split(" : ")
        words = body.split()[:-1]
        noisy = [str(rng.choice(list("0123456789" if word.isdigit() else "+-*"))) if rng.random() < 0.1 else word for word in words]
        copies.append({**row, "prompt": f"{head} : {' '.join(noisy)} ="})
    return copies


@claim.arm("method", grid=GRID)
def masked_thought(trial):
    return judged(trial, objective={"method": "masked-thought", "mode": "mask", "rate": 0.2})


@claim.arm("baseline", grid=GRID)
def sft(trial):
    return judged(trial)


@claim.arm("control", grid=GRID)
def noise_in_the_question(trial):
    return judged(trial, prompt_noise)


@claim.arm(grid=GRID)
def random_ids(trial):
    return judged(trial, objective={"method": "masked-thought", "mode": "random", "rate": 0.4})
