"""Prefix-RFT against plain fine-tuning, reinforcement, and one after the other: chains of seven operands, of which the model solves few at first."""

from luthier.claims import Claim
from luthier.lab import make

UPDATES, PROMPTS, GROUP = 60, 16, 6
LEARNED = UPDATES * PROMPTS * GROUP
"""Answers that every arm learns from, whether given or drawn."""

claim = Claim(
    paper=127,
    says="Letting one answer of every group begin with a piece of a demonstration solves more problems than fine-tuning on the demonstrations.",
    published="Better than SFT, RFT and parallel mixed-policy RFT on mathematical reasoning (abstract; no figures verified)",
    metric="right answers",
    smallest=0.02,
    equal=("rows",),
    methods=("objective/prefix-rft", "objective/grpo", "objective/sft"),
    tasks=("traces",),
    models=("lm-s",),
    departs="Sixty demonstrated chains modulo 10, which are all the prompts; a model of 0.4 M parameters, half-taught chains of five to seven first, as rewards are rare else; "
    "groups of six, 60 updates. All arms learn from as many answers; drawing them is the reinforcing arms' extra cost. Judged on seven operands and on eight.",
    reason="With sixty rows all arms that see demonstrations end within the noise of three seeds; the method beats reinforcement alone by 9 points and keeps what the model knew "
    "(0.64 of the general probe, against 0.28 after plain tuning on the same rows). The paper judges harder mathematics, where demonstrations do not carry over so "
    "directly.",
)
GRID = {"lr": (1e-4, 3e-4, 1e-3)}


def start(trial):
    """The shipped model, half-taught chains of five to seven; sixty demonstrated chains of seven; test chains of seven and of eight."""
    taught = make("traces", skills="chain", operands="5-7", n=600, seed=trial.seed).train
    task = make("traces", skills="chain", operands="7", n=60, seed=trial.seed, test=300)
    return trial.tune("lab:lm-s", taught, steps=140, lr=1e-3), task, make("traces", skills="chain", operands="8", n=1, seed=trial.seed, test=300).test


def begun(trial):
    return trial.once("start", lambda: start(trial))[0]


def fine_tuned(trial, share=1.0):
    model, task, _ = trial.once("start", lambda: start(trial))
    return trial.tune(model, task.train, steps=round(share * LEARNED / 32), batch=32, lr=trial["lr"])


def reinforced(trial, model, objective, share=1.0):
    _, task, _ = trial.once("start", lambda: start(trial))
    updates = round(share * UPDATES)
    recipe = {"group_size": GROUP, "max_new_tokens": 20, "verifier": "lab:traces", "eps_high": 0.28, **objective}
    tuned = trial.tune(model, task.train, steps=updates, batch=PROMPTS, lr=trial["lr"], objective=recipe)
    trial.spend(rows=(GROUP - 1) * trial.scaled(updates) * PROMPTS)  # every prompt gives a group of answers
    return tuned


def judged(trial, model):
    _, task, longer = trial.once("start", lambda: start(trial))

    def right(rows):
        return sum(task.verify(row, answer).parsed["final_right"] for row, answer in zip(rows, trial.answers(model, rows))) / len(rows)

    seven, eight = right(task.test), right(longer)
    return {"right answers": (seven + eight) / 2, "seven operands": seven, "eight operands": eight, "general": trial.general(model, 200)}


@claim.arm("method", grid=GRID)
def prefix_rft(trial):
    return judged(trial, reinforced(trial, begun(trial), {"method": "prefix-rft"}))


@claim.arm("baseline", grid=GRID)
def sft(trial):
    return judged(trial, fine_tuned(trial))


def drawn(trial, model, share=1.0):
    """Reinforcement with the same loss, without demonstrations."""
    return reinforced(trial, model, {"method": "grpo", "advantage": "dr-grpo", "loss_type": "dr_grpo"}, share)


@claim.arm("control", grid=GRID)
def sft_then_rft(trial):
    """Both signals, but one after the other: half of the answers given, half drawn."""
    return judged(trial, drawn(trial, fine_tuned(trial, 0.5), 0.5))


@claim.arm(grid=GRID)
def rft(trial):
    return judged(trial, drawn(trial, begun(trial)))


@claim.arm(exempt=True)
def untouched(trial):
    return judged(trial, begun(trial))
