"""PV-Tuning against straight-through estimation: a model at one bit a weight is tuned towards what it was."""

from luthier.claims import Claim
from luthier.lab import make

STEPS, BATCH = 300, 32
CODED = {"method": "pv-tuning", "group": 4, "codes": 16, "codebooks": 1}

claim = Claim(
    paper=71,
    says="Big steps of a few codes at a time, beside small steps of the codebooks, bring a model of one bit a weight nearer to the original than straight-through steps "
    "of all codes do.",
    published="Llama-2-7B on WikiText-2: perplexity 5.68 at 2 bits (one codebook, groups of 8) and 9.21 at about 1 bit; the first Pareto-optimal Llama-2 at 2 bits a parameter "
    "(abstract)",
    metric="KL to the original",
    smallest=0.02,
    better="lower",
    span=(0.0, 10.0),
    equal=("rows", "steps"),
    seeds=(0, 1, 2, 3),
    methods=("compress/pv-tuning", "optimize/pv-tuning", "objective/asft"),
    tasks=("traces",),
    models=("lm-s",),
    departs="A model of 0.4 M parameters whose linear layers take one code of 16 for every four weights, 300 steps of 32 rows of what it knows (the paper: a billion tokens "
    "at most). The loss is the KL to the original with a thousandth of the answers' likelihood. Straight-through means the paper's optimiser with a kept buffer and no limit "
    "on how many codes change; the rates of codes and codebooks, and for the method the share of groups, are chosen from eight settings for either of the two.",
    reason="Starting every step from the codes does not work here at any of eight settings: where codes change at all (rates of the size of the distance between codes), the "
    "model ends behind one whose codes rest (0.17 against 0.14), and behind it by far where more of them change (1.3 at five groups in a hundred). A kept buffer with the "
    "same limit of one group in a hundred, which is how the authors released it, does help (0.11), and without a limit most (0.09): the small steps that a buffer sums up "
    "say more of a code than one large step on one batch. The paper takes batches of 128 long texts, here they are 32 lines.",
)
RATES = (3e-3, 1e-2)


def rows(trial):
    """What the model knows, in equal shares of the eight base skills."""
    return trial.once("rows", lambda: make("traces", skills="base", n=STEPS * BATCH // 2, seed=trial.seed, test=300))


def distance(model, tests):
    """Held-out KL(original || model) and the likelihood loss, means over the answers' tokens."""
    from luthier.core.models import load
    from luthier.core.rows import encode
    from luthier.core.scores import kl

    original, drift, loss, count = load("lab:lm-s"), 0.0, 0.0, 0
    with original.evaluating(), model.evaluating():
        for start in range(0, len(tests), 100):
            batch = [encode(row, model.processor, train_on="completion", row=i)[-1] for i, row in enumerate(tests[start : start + 100])]
            scores, wanted = model.score(batch), original.score(batch)
            drift += float(scores.map(lambda logits, at, anchor: kl(anchor, logits), wanted).sum())
            loss, count = loss - float(scores.logp.sum()), count + len(scores)
    return {"KL to the original": drift / count, "likelihood loss": loss / count}


def judged(trial, optimize):
    task = rows(trial)
    objective = {"method": "asft", "weighting": "none", "kl": 1000.0}
    model = trial.tune("lab:lm-s", task.train, steps=STEPS, batch=BATCH, objective=objective, optimize=optimize, compress=CODED)
    return {**distance(model, task.test), "general": trial.general(model, 200)}


def tuned(trial, **fields):
    return judged(trial, {"method": "pv-tuning", "lr": trial["lr"], "code_lr": trial["code_lr"], **fields})


@claim.arm("method", grid={"lr": RATES, "code_lr": (0.3, 0.5), "max_change": (1e-2, 5e-2)})
def pv_tuning(trial):
    """The paper's algorithm: every step starts from the codes, and one to five groups in a hundred may change."""
    return tuned(trial, delta_decay=1.0, max_change=trial["max_change"])


@claim.arm("baseline", grid={"lr": RATES, "code_lr": (1e-2, 3e-2, 1e-1, 3e-1)})
def straight_through(trial):
    return tuned(trial, delta_decay=0.0, max_change=1.0)


@claim.arm("control", grid={"lr": (1e-3, 3e-3, 1e-2, 3e-2)})
def codebooks_only(trial):
    """The codes rest: is there anything in moving them?"""
    return judged(trial, {"method": "pv-tuning", "lr": trial["lr"], "code_lr": 1e-12})


@claim.arm(grid={"lr": RATES, "code_lr": (1e-2, 3e-2)})
def as_released(trial):
    """A kept buffer, but only one group in a hundred may change."""
    return tuned(trial, delta_decay=0.0, max_change=0.01)


@claim.arm(exempt=True)
def k_means(trial):
    """What tuning begins with."""
    from luthier.compress.pv_tuning import PVTuning
    from luthier.core.models import load

    task = rows(trial)
    model = PVTuning(**{k: v for k, v in CODED.items() if k != "method"}).compress(load("lab:lm-s"))
    return {**distance(model, task.test), "general": trial.general(model, 200)}
