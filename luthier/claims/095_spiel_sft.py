"""SpIEL against LoRA of rank 1: as many trained numbers, but at places of the weights that move to where the gradients are."""

from luthier.claims import Claim
from luthier.lab import make

STEPS, SKILLS = 150, "sort,sub"

claim = Claim(
    paper=95,
    says="A sparse update whose places are moved to where gradients are large learns new skills better than a low-rank update of the same size.",
    published="Often better than LoRA and other efficient methods at comparable run time; the variant with accumulated gradients is best (abstract; the card verifies no figure)",
    metric="right answers",
    smallest=0.02,
    equal=("rows", "steps"),
    seeds=(0, 1, 2, 3),
    methods=("adapt/spiel", "adapt/lora", "adapt/shira", "optimize/sm3"),
    tasks=("traces",),
    models=("lm-m",),
    departs="Sorting and two-digit subtraction learned together in 150 steps of 32 rows on a model of 1.1 M parameters; 13,056 numbers train, 1.3 % of the weights, as in a "
    "LoRA of rank 1 (the paper: rank 64). The places move every 20 steps. Rates come from a grid, as do all arms'.",
    reason="The largest gradients of a weight crowd here into a third of its rows and half of its columns (as many random places reach nine tenths of both), so places that "
    "follow them repeat one another: a random support that stays learns more (0.18) than one that moves (0.08), which still beats the places of the first gradients "
    "(0.03). LoRA of rank 1 touches every row and column (0.32). The paper trains millions of places for thousands of steps.",
)
GRID = {"lr": (3e-3, 1e-2, 3e-2)}
"""So few numbers learn nothing at the usual rates."""


def numbers():
    """How many a LoRA of rank 1 trains: inputs and outputs of every linear layer of the blocks."""
    from luthier.core.collect import linear_layers
    from luthier.core.models import load

    return sum(layer.in_features + layer.out_features for layer in linear_layers(load("lab:lm-m").network).values())


def judged(trial, adapt, **recipe):
    task = trial.once("task", lambda: make("traces", skills=SKILLS, n=1600, seed=trial.seed, test=400))
    if adapt["method"] == "spiel":
        adapt = {"weights": trial.once("numbers", numbers), "every": 20, "collect": 5, **adapt}
    model = trial.tune("lab:lm-m", task.train, steps=STEPS, lr=trial["lr"], adapt=adapt, **recipe)
    right = {skill: [] for skill in SKILLS.split(",")}
    for row, answer in zip(task.test, trial.answers(model, task.test)):
        right[row["meta"]["skill"]].append(task.verify(row, answer).score >= 1)
    share = {skill: sum(found) / len(found) for skill, found in right.items()}
    return {"right answers": sum(share.values()) / len(share), **share, "general": trial.general(model)}


@claim.arm("method", grid=GRID)
def spiel(trial):
    return judged(trial, {"method": "spiel"})


@claim.arm("baseline", grid=GRID)
def lora(trial):
    return judged(trial, {"method": "lora", "rank": 1, "alpha": 1})


@claim.arm("control", grid=GRID)
def places_of_the_first_gradients(trial):
    """Moved once, after five steps, to the largest gradients, and then never again."""
    return judged(trial, {"method": "spiel", "rate": 1e-9})


@claim.arm(grid=GRID)
def random_places(trial):
    """A random support that stays."""
    return judged(trial, {"method": "shira", "rank": 1, "seed": trial.seed})


@claim.arm(grid={"lr": (1e-2, 3e-2, 1e-1)})
def momentum_approximation(trial):
    """Places by SM3's row and column covers, which needs no sums of gradients."""
    return judged(trial, {"method": "spiel", "variant": "ma"}, optimize={"method": "sm3"})


@claim.arm(grid={"lr": (1e-4, 3e-4, 1e-3)}, exempt=True)
def full(trial):
    """All weights: an upper bound."""
    return judged(trial, {"method": "full"})
