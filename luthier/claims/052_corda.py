"""CorDA that keeps knowledge against LoRA: learn to sort at rank 8 and still know the facts that the decomposition was shown."""

from luthier.claims import Claim
from luthier.lab import make

RANK, STEPS = 8, 120

claim = Claim(
    paper=52,
    says="Training only the components of each weight that samples of knowledge use least leaves a better mean of new skill and kept knowledge than LoRA does.",
    published="The knowledge-preserved mode beats LoRA on the tuned tasks and forgets less world knowledge (abstract; the card verifies no figure of it)",
    metric="mean of sorting and facts",
    smallest=0.02,
    equal=("rows", "steps"),
    seeds=(0, 1, 2, 3),
    methods=("adapt/corda", "adapt/lora", "adapt/full"),
    tasks=("traces", "facts"),
    models=("lm-m",),
    departs="A model of 1.1 M parameters that knows 240 facts learns to sort lists of 3 to 6 digits in 120 steps of 32 rows; rank 8 of 128; calibration on 256 facts stated "
    "in the templates the model was trained with. Rates are chosen per arm on the mean, and larger than the paper's.",
    reason="It learns faster than LoRA at any one rate and forgets faster as well, so its best point is another on the same trade-off: 0.70 of sorting with 0.89 of the facts, "
    "against 0.61 with 0.98. The calibration itself does matter: on noise in place of facts the mean falls to 0.72, and with the weights' own smallest directions to 0.75. "
    "In a model 128 numbers wide few directions are free of what it knows; the paper's are 4,096 wide.",
)
GRID = {"lr": (1e-3, 3e-3, 1e-2)}
"""Rank 8 learns nothing here at 1e-4."""


def knowledge(seed):
    return make("facts", world="real", entities=80, forms="statement", n=256, seed=seed).train


def judged(trial, adapt=None, calibration=()):
    from luthier.lab.abilities import fact_accuracy

    task = trial.once("task", lambda: make("traces", skills="sort", n=800, seed=trial.seed, test=300))
    model = "lab:lm-m"
    if adapt:
        model = trial.tune(model, task.train, steps=STEPS, lr=trial["lr"], adapt=adapt, data={"calibration": list(calibration)} if calibration else {})
    else:
        from luthier.core.models import load

        model = load(model)
    sort, longer = (trial.right(model, rows, task.verify) for rows in (task.test, task.ood))
    facts = fact_accuracy(model.network)
    return {"mean of sorting and facts": (sort + facts) / 2, "sort": sort, "facts": facts, "longer lists": longer, "general": trial.general(model)}


def corda(trial, rows=(), **options):
    return judged(trial, {"method": "corda", "rank": RANK, "samples": 256, **options}, rows)


@claim.arm("method", grid=GRID)
def keep_knowledge(trial):
    return corda(trial, trial.once("facts", lambda: knowledge(trial.seed)), mode="kpm")


@claim.arm("baseline", grid=GRID)
def lora(trial):
    return judged(trial, {"method": "lora", "rank": RANK, "alpha": RANK})


@claim.arm("control", grid=GRID)
def smallest_of_the_weight_alone(trial):
    """The last components of the plain decomposition, which knows no inputs."""
    return corda(trial, mode="kpm", orientation="none")


@claim.arm(grid=GRID)
def calibrated_on_noise(trial):
    """The same with random words in the place of knowledge."""
    import numpy as np

    rng, words = np.random.default_rng([52, trial.seed]), sorted({w for row in knowledge(trial.seed) for w in row["prompt"].split()})
    noise = [{"prompt": " ".join(rng.choice(words, 6)), "completion": " ".join(rng.choice(words, 2))} for _ in range(256)]
    return corda(trial, noise, mode="kpm")


@claim.arm(grid=GRID)
def learn_the_task(trial):
    """The other mode: the largest components, oriented by the task's own rows."""
    return corda(trial, mode="ipm")


@claim.arm(grid={"lr": (1e-4, 3e-4, 1e-3)})
def full(trial):
    return judged(trial, {"method": "full"})


@claim.arm(exempt=True)
def untouched(trial):
    return judged(trial)
