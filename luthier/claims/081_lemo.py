"""LeMo: numbers scattered over long filler are compared, learnt by LoRA while most layers compute half of the blocks of tokens."""

from luthier.claims import Claim
from luthier.lab import make

STEPS, BATCH, WORDS = 45, 8, 160
SETTING = {"block_size": 16, "first": 1, "samples": 32}

claim = Claim(
    paper=81,
    says="Leaving the blocks of tokens that predictors call uninformative out of the layers' computation keeps far fewer activations, and the model learns a long-context "
    "task as well (perplexity within 3 %).",
    published="Up to 1.93 times less memory and 1.36 times the speed of the best other systems (abstract); Llama2-7B, 4K tokens: 31.3 GB against LoRA's 39.2, perplexity "
    "within 3 % of LoRA's",
    metric="answer loss",
    better="lower",
    span=(0.0, 10.0),
    smallest=0.03,
    at_least=-0.03,
    equal=("rows", "steps"),
    seeds=(0, 1, 2, 3),
    methods=("adapt/lemo", "adapt/lora"),
    tasks=("traces",),
    models=("lm-m",),
    departs="Six layers in place of 32, of which the first and the last stay dense; prompts of 160 words, among them three to six numbers to compare, in blocks of 16 "
    "tokens, half of the blocks kept in every other layer, where the paper searches thresholds by layer. Memory is what autograd keeps for the backward pass of four rows, "
    "logits included, and not the device's peak. The predictors' training is not on the account of rows. At 45 steps plain LoRA has begun to compare the numbers but makes mistakes (looked at on another seed): 30 teach it nothing and after 60 there is none left to make.",
)
GRID = {"lr": (1e-3, 3e-3, 1e-2)}


def scattered(trial):
    """Lists to tell the largest number of, whose numbers stand far apart in filler words; the model knows them side by side."""
    import numpy as np

    from luthier.lab._trace_faults import with_filler

    splits, rng = make("traces", skills="max", n=STEPS * BATCH, seed=trial.seed, test=200), np.random.default_rng([81, trial.seed])
    for row in (*splits.train, *splits.test):
        row["prompt"] = f"{with_filler(rng, ' , '.join(row['meta']['body'].split()) + ' : ' + row['meta']['skill'], WORDS)} ="
    return splits


def task(trial):
    return trial.once("task", lambda: scattered(trial))


def kept(trial, adapt):
    """Megabytes that autograd keeps of a training pass of four rows."""
    from luthier.catalog import method
    from luthier.core.context import Context
    from luthier.core.meters import saved_bytes
    from luthier.core.models import load
    from luthier.core.rows import Rows

    rows, model = task(trial).train, load("lab:lm-m")
    short = {"predictor_steps": 1, "samples": 4} if adapt["method"] == "lemo" else {}  # how well blocks are guessed changes no sizes
    fields = {k: v for k, v in {**adapt, **short}.items() if k != "method"}
    method("adapt", adapt["method"])(**fields).attach(model, Context(model, trial.seed, {"train": Rows.of(rows)}))
    model.train()
    with saved_bytes(model.network) as saved:
        loss = model.score(model.collate(rows[:4])).logp.mean()
        size = saved.now
    assert loss.requires_grad
    return size / 2**20


def answer_loss(model, tests):
    """Nats a token of the answers, every token computed in every layer."""
    from luthier.core.rows import encode

    with model.evaluating():
        return -float(model.score([encode(row, model.processor, train_on="completion", row=i)[-1] for i, row in enumerate(tests)]).logp.mean())


def judged(trial, adapt):
    from luthier.core.models import load

    splits = task(trial)
    before = trial.once("before", lambda: answer_loss(load("lab:lm-m"), splits.test))
    model = trial.tune("lab:lm-m", splits.train, steps=STEPS, batch=BATCH, lr=trial["lr"], adapt={"rank": 8, "alpha": 16.0, **adapt})
    right = trial.right(model, splits.test, splits.verify)
    return {"answer loss": answer_loss(model, splits.test), "before": before, "right answers": right, "saved megabytes": kept(trial, adapt)}


@claim.arm("method", grid=GRID)
def lemo(trial):
    return judged(trial, {"method": "lemo", "ratio": 0.5, **SETTING})


@claim.arm("baseline", grid=GRID)
def dense(trial):
    """LoRA in which every token passes through every layer."""
    return judged(trial, {"method": "lora"})


@claim.arm("control", grid=GRID)
def random_blocks(trial):
    """As few tokens, whichever: does it matter which?"""
    return judged(trial, {"method": "lemo", "ratio": 0.5, "scores": "random", **SETTING})


@claim.arm(grid={"lr": (3e-3,)})
def a_quarter(trial):
    return judged(trial, {"method": "lemo", "ratio": 0.25, **SETTING})


@claim.arm(grid={"lr": (3e-3,)})
def latest_blocks(trial):
    """The half that is nearest to the question."""
    return judged(trial, {"method": "lemo", "ratio": 0.5, "scores": "recent", **SETTING})
