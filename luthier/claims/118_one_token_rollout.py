"""One-token rollout against plain fine-tuning on 200 chains of five operands, judged on chains of five and on what the model could do before."""

from luthier.claims import Claim
from luthier.lab import make

claim = Claim(
    paper=118,
    says="A policy gradient on tokens drawn at every gold position leaves a more able model than plain fine-tuning, over the task and its old abilities.",
    published="Consistently above SFT on mathematical reasoning, code generation and general reasoning (abstract; no figures verified)",
    metric="macro right answers",
    smallest=0.02,
    equal=("rows", "steps"),
    seeds=(0, 1, 2, 3),
    methods=("objective/one-token-rollout", "objective/asft", "objective/sft"),
    tasks=("traces",),
    models=("lm-s",),
    departs="Chains modulo 10 on a model of 0.4 M parameters, first half-taught the task and its way of writing on other rows, as the method teaches only what the model might say. "
    "Learning rates are chosen per arm on the macro mean, 30 times the paper's and more. The paper's release is not public: draws, temperature and the wrong tokens' reward are our reading.",
    reason="Both reach the same macro mean in different ways: plain tuning learns more of the new chains (0.88 against 0.70), one-token rollout keeps more of what was known "
    "(0.62 against 0.50). DFT does about the same as one-token rollout. Wrong draws, which are half of the method's signal, teach a model with 1,024 words and one right "
    "answer little.",
)
GRID = {"lr": (1e-4, 3e-4, 1e-3, 3e-3)}
"""The card's three and a smaller one, as fine-tuning forgets less with it."""


def start(trial):
    """The shipped model, half-taught chains of five in the second style while it rehearses its base skills; and the task."""
    import numpy as np

    task = make("traces", skills="chain", operands="5", style="2", n=1000, seed=trial.seed, test=400)
    rows = task.train[:800] + make("traces", skills="base", n=600, seed=trial.seed).train
    order = np.random.default_rng(trial.seed).permutation(len(rows))
    return trial.tune("lab:lm-s", [rows[i] for i in order], steps=180, lr=2e-3), task


def judged(trial, objective=None):
    """The mean of right final answers to chains of five and to the general probe; and those to chains of six and seven."""
    model, task = trial.once("start", lambda: start(trial))
    if objective:
        model = trial.tune(model, task.train[800:], steps=120, batch=16, lr=trial["lr"], objective=objective)

    def right(rows):
        return sum(task.verify(row, answer).parsed["final_right"] for row, answer in zip(rows, trial.answers(model, rows, 48))) / len(rows)

    five, longer, general = right(task.test), right(task.ood[:200]), trial.general(model)
    return {"macro right answers": (five + general) / 2, "five operands": five, "six and seven": longer, "general": general}


@claim.arm("method", grid=GRID)
def one_token_rollout(trial):
    return judged(trial, {"method": "one-token-rollout", "samples": 256})


@claim.arm("baseline", grid=GRID)
def sft(trial):
    return judged(trial, {"method": "sft"})


@claim.arm("control", grid=GRID)
def dft(trial):
    """The likelihood weighed by the token's probability: what is left without the draws' noise, their temperature and the negative reward."""
    return judged(trial, {"method": "asft", "kl": 0.0})


@claim.arm(exempt=True)
def untouched(trial):
    return judged(trial)
