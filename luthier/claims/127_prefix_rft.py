"""Prefix-RFT against plain fine-tuning, reinforcement, and one after the other: chains of seven operands, which the model never solves at first."""

from luthier.claims import Claim
from luthier.lab import make

UPDATES, PROMPTS, GROUP = 60, 16, 6
LEARNED = UPDATES * PROMPTS * GROUP
"""Answers that every arm learns from, whether given or drawn."""

claim = Claim(
    paper=127,
    says="Letting one answer of every group begin with a piece of a demonstration solves more problems than fine-tuning on the demonstrations.",
    published="Better than SFT, RFT and parallel mixed-policy RFT on mathematical reasoning (abstract; no figures verified)",
    metric="seven operands",
    smallest=0.02,
    equal=("rows",),
    methods=("objective/prefix-rft", "objective/grpo", "objective/sft"),
    tasks=("traces",),
    models=("lm-s",),
    departs="100 demonstrations and 300 more prompts of chains modulo 10; a model of 0.4 M parameters that knows two to four operands; groups of six, 60 updates. "
    "All arms learn from as many answers; drawing them is the reinforcing arms' extra cost. Learning rates are far above the paper's 1e-6.",
)
GRID = {"lr": (1e-4, 3e-4, 1e-3)}


def chains(seed):
    task = make("traces", skills="chain", operands="7", n=400, seed=seed, test=300)
    shown, bare = task.train[:100], [{k: v for k, v in row.items() if k != "completion"} for row in task.train[100:]]
    return task, shown, bare, make("traces", skills="chain", operands="8", n=1, seed=seed, test=200).test


def fine_tuned(trial, share=1.0):
    _, shown, _, _ = trial.once("chains", lambda: chains(trial.seed))
    return trial.tune("lab:lm-s", shown, steps=round(share * LEARNED / 32), batch=32, lr=trial["lr"])


def reinforced(trial, model, objective, rows, share=1.0):
    updates = round(share * UPDATES)
    recipe = {"group_size": GROUP, "max_new_tokens": 20, "verifier": "lab:traces", "eps_high": 0.28, **objective}
    tuned = trial.tune(model, rows, steps=updates, batch=PROMPTS, lr=trial["lr"], objective=recipe)
    trial.spend(rows=(GROUP - 1) * trial.scaled(updates) * PROMPTS)  # every prompt gives a group of answers
    return tuned


def judged(trial, model):
    task, _, _, longer = trial.once("chains", lambda: chains(trial.seed))

    def right(rows):
        return sum(task.verify(row, answer).parsed["final_right"] for row, answer in zip(rows, trial.answers(model, rows))) / len(rows)

    return {"seven operands": right(task.test), "eight operands": right(longer), "general": trial.general(model, 200)}


def prefixed(trial, **settings):
    _, shown, bare, _ = trial.once("chains", lambda: chains(trial.seed))
    return judged(trial, reinforced(trial, "lab:lm-s", {"method": "prefix-rft", **settings}, shown + bare))


def plain(trial, model, share=1.0):
    """Reinforcement on the same prompts with the same loss, without demonstrations."""
    _, shown, bare, _ = trial.once("chains", lambda: chains(trial.seed))
    return reinforced(trial, model, {"method": "grpo", "advantage": "dr-grpo", "loss_type": "dr_grpo"}, shown + bare, share)


@claim.arm("method", grid=GRID)
def prefix_rft(trial):
    return prefixed(trial)


@claim.arm("baseline", grid=GRID)
def sft(trial):
    return judged(trial, fine_tuned(trial))


@claim.arm("control", grid=GRID)
def sft_then_rft(trial):
    """Both signals, but one after the other."""
    return judged(trial, plain(trial, fine_tuned(trial, 0.5), 0.5))


@claim.arm(grid=GRID)
def rft(trial):
    return judged(trial, plain(trial, "lab:lm-s"))


@claim.arm(grid=GRID)
def whole_prefix(trial):
    """Without the entropy mask."""
    return prefixed(trial, keep=1.0)
