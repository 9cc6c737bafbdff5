"""AutoPEFT against random search: which projections of which layers get a LoRA of which rank, 20 short trainings each."""

from luthier.claims import Claim
from luthier.lab import make

TRIALS, INITIAL, STEPS = 20, 8, 30
KINDS = {"queries and values": ("q_proj", "v_proj"), "keys": ("k_proj",), "attention out": ("o_proj",), "up and gate": ("up_proj", "gate_proj"), "down": ("down_proj",)}
RANKS, LAYERS = (1, 2, 4, 8, 16), range(6)
SPACE = {"rank": list(RANKS), **{kind: [False, True] for kind in KINDS}, **{f"layer {layer}": [False, True] for layer in LAYERS}}

claim = Claim(
    paper=56,
    says="Bayesian optimisation of score and size together finds a better front of small trainings than as many random configurations do.",
    published="GLUE and SuperGLUE: better than existing efficient methods and on a par with full fine-tuning (abstract); about 83.2 with 1.4 % of the parameters against "
    "82.5-82.7 (the card is unsure)",
    metric="hypervolume",
    smallest=0.01,
    equal=("trials",),
    seeds=(0, 1, 2),
    methods=("search/autopeft", "adapt/lora"),
    tasks=("traces",),
    models=("lm-m",),
    departs="The space is a LoRA's rank, its projections and its layers, 10,240 choices on a model of 1.1 M parameters, in place of two kinds of bottleneck and a prefix; 20 "
    "trainings of 30 steps in place of 200 longer ones; a plain Gaussian process. The score is the share of answer tokens that are right. Sizes count on a logarithmic scale, "
    "and the front that validation rows chose is judged on test rows.",
)


def rows(trial):
    return make("traces", skills="sort", n=STEPS * 16 + 120, seed=trial.seed, test=200)


def measured(trial, point):
    """A short training of a configuration: how many numbers it trains, and the share of right answer tokens. Every arm may use it again."""
    chosen = [f"model.layers.{layer}.{part}.{name}" for layer in LAYERS if point[f"layer {layer}"] for kind, names in KINDS.items() if point[kind] for name in names
              for part in ["self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"]]  # fmt: skip
    return trial.once(("trained", point["rank"], *chosen), lambda: _measured(trial, chosen, point["rank"]))


def _measured(trial, chosen, rank):
    from luthier.core.models import load

    splits, cut = trial.once("rows", lambda: rows(trial)), STEPS * 16
    model, numbers = load("lab:lm-m"), 0
    if chosen:
        numbers = sum(rank * (layer.in_features + layer.out_features) for layer in map(model.network.get_submodule, chosen))
        model = trial.tune(model, splits.train[:cut], steps=STEPS, batch=16, lr=5e-3, adapt={"method": "lora", "rank": rank, "alpha": 16, "targets": chosen})
    return {"score": right_tokens(model, splits.train[cut:]), "parameters": float(numbers), "test": right_tokens(model, splits.test)}


def right_tokens(model, some):
    import torch

    with torch.no_grad(), model.evaluating():
        scores = model.score(model.collate(some))
        return float(scores.map(lambda logits, at: (logits.argmax(-1) == scores.target[at]).float()).mean())


def volume(trial, front):
    """The share of (size, score) that the front's configurations cover: sizes on a logarithmic scale, scores above those of the untouched model."""
    import math

    import numpy as np

    everything = measured(trial, {k: v[-1] for k, v in SPACE.items()})
    nothing = measured(trial, {k: v[0] for k, v in SPACE.items()})
    smaller = [1 - math.log1p(p["parameters"]) / math.log1p(everything["parameters"]) for p in front]
    better = [max(0.0, p["test"] - nothing["test"]) / (1 - nothing["test"]) for p in front]
    found, reached = 0.0, 0.0
    for i in np.argsort([-b for b in better]):
        found += max(0.0, smaller[i] - reached) * better[i]
        reached = max(reached, smaller[i])
    few = [p["test"] for p in front if p["parameters"] <= 0.02 * sum(t.numel() for t in trial.once("network", shipped).parameters())]
    return {"hypervolume": found, "best score": max(p["test"] for p in front), "best score, 2 % trained": max(few, default=nothing["test"]), "front": len(front)}


def shipped():
    from luthier.core.models import load

    return load("lab:lm-m").network


def searched(trial, surrogate):
    from luthier.search.autopeft import AutoPEFT

    number = trial.scaled(TRIALS)
    search = AutoPEFT(trials=number, initial=min(INITIAL, number // 2), batch=4, maximise=["score"], minimise=["parameters"], surrogate=surrogate, seed=trial.seed)
    found = search.search(SPACE, lambda point: measured(trial, point))
    trial.spend(trials=number)
    return volume(trial, [p["metrics"] for p in found])


@claim.arm("method")
def autopeft(trial):
    return searched(trial, "gp")


@claim.arm("baseline")
def random_search(trial):
    return searched(trial, "random")


@claim.arm("control", exempt=True)
def all_layers(trial):
    """A LoRA everywhere at each rank: what one would try by hand."""
    everywhere = [measured(trial, {**dict.fromkeys(SPACE, True), "rank": rank}) for rank in RANKS]
    trial.spend(trials=len(RANKS))
    return volume(trial, everywhere)
