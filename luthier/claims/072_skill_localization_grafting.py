"""Grafting: one tuned entry in a hundred copied onto the base, chosen by a learned mask, by how far entries moved, or at random."""

from luthier.claims import Claim
from luthier.lab import make

WORDS = {"no": "0", "yes": "1"}
"""The answers in words that the model knows, as its embeddings and head are fixed."""

claim = Claim(
    paper=72,
    says="A learned mask of one entry in a hundred recovers more of what a fine-tune gained than as many entries that moved most.",
    published="About 0.01 % of RoBERTa's parameters recover over 95 % of the fine-tuned performance; calibration error 40 to 90 % lower than fine-tuning's (abstract)",
    metric="recovered",
    smallest=0.02,
    span=(-0.5, 1.5),
    seeds=(0, 1, 2, 3),
    methods=("merge/graft", "adapt/full"),
    tasks=("traces",),
    models=("lm-s",),
    departs="A decoder of 0.4 M parameters answers 1 or 0 (does a list contain a number), judged by the likelier of the two; embeddings and head are fixed. It has far fewer spare parameters, so 1 % and 0.1 % stand for the paper's 0.01 %. The mask is held to its share, which the paper's may outgrow; `learned, free` is the "
    "paper's. Recovered is (graft - base) / (fine-tune - base) in accuracy. The model has no biases, so there is no bias-only arm.",
)


def fine_tune(trial):
    """The base, the fine-tune, test rows and longer ones, rows to learn a mask on and rows to choose it with."""
    from luthier.core.models import load

    task = make("traces", skills="contains", n=3000, seed=trial.seed, test=400)
    rows, test, longer = ([{**row, "completion": WORDS[row["completion"]]} for row in part] for part in (task.train, task.test, task.ood))
    base = load("lab:lm-s")
    tuned = trial.tune(base, rows[200:], steps=250, lr=1e-3, adapt={"method": "full", "freeze": ["embed_tokens", "lm_head"]})
    return base, tuned, test, longer, rows[200:], rows[:200]


def answered(model, rows):
    """Accuracy by the likelier word, and the expected calibration error of its probability."""
    import torch

    from luthier.measure._shared import ece

    words = tuple(WORDS.values())
    scores = torch.stack(model.options([row["prompt"] for row in rows], [words] * len(rows))).float()
    sure, said = scores.softmax(-1).max(-1)
    right = torch.tensor([words[int(i)] == row["completion"] for i, row in zip(said, rows)]).float()
    return float(right.mean()), ece(sure.numpy(), right.numpy())


def judged(trial, **options):
    from luthier.core.context import Context
    from luthier.core.models import load_state
    from luthier.core.rows import Rows
    from luthier.merge.graft import Graft

    base, tuned, test, ood, learn, choose = trial.once("fine-tune", lambda: fine_tune(trial))
    model = tuned
    if options:
        ctx = Context(base.frozen_copy(), trial.seed, {"train": Rows.of(learn), "val": Rows.of(choose)})
        graft = Graft(updates=trial.scaled(60), accumulation=8, batch=32, judge=300, **options)
        merged = graft.merge(base.network.state_dict(), [tuned.network.state_dict()], ctx)
        model = base.frozen_copy()
        load_state(model, merged)
        trial.notes["density"] = graft.report["regions"][0]["density"]
        trial.spend(passes=len(graft.report["regions"][0].get("losses", [])) * 8)
    before, after = (trial.once(name, lambda m=m: answered(m, test)) for name, m in (("before", base), ("after", tuned)))
    accuracy, error = answered(model, test)
    gained = after[0] - before[0]
    longer, _ = answered(model, ood)
    return {"recovered": (accuracy - before[0]) / gained if abs(gained) > 0.02 else 0.0, "accuracy": accuracy, "ece": error, "longer lists": longer, "general": trial.general(model)}


@claim.arm("method")
def learned(trial):
    return judged(trial, density=0.01, exact=True)


@claim.arm("baseline")
def moved_most(trial):
    return judged(trial, density=0.01, mask="movement")


@claim.arm("control")
def at_random(trial):
    return judged(trial, density=0.01, mask="random")


@claim.arm()
def learned_free(trial):
    """The paper's: every gamma above one half counts, so the region may grow; the density is noted."""
    return judged(trial, density=0.01)


@claim.arm()
def learned_thousandth(trial):
    return judged(trial, density=0.001, exact=True)


@claim.arm()
def moved_most_thousandth(trial):
    return judged(trial, density=0.001, mask="movement")


@claim.arm(exempt=True)
def fine_tuned(trial):
    return judged(trial)
