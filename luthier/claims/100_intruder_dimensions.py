"""Intruder dimensions: LoRA against full fine-tuning at equal accuracy on rotated digits."""

from luthier.claims import Claim
from luthier.lab import make

claim = Claim(
    paper=100,
    says="At equal accuracy on a new task LoRA leaves more leading singular vectors that resemble none of the base's than full fine-tuning does.",
    published="RoBERTa and Llama: full fine-tuning adds near to no intruder dimensions among the top 10 singular vectors, LoRA of low rank adds many and forgets more",
    metric="intruders",
    smallest=0.05,
    equal=("rows", "steps"),
    seeds=(0, 1, 2, 3, 4),
    methods=("measure/intruder-dimensions",),
    tasks=("digits",),
    departs="A perceptron of three hidden layers and digits turned by 30 degrees. The metric is the share of the three layers' 10 leading left singular vectors that are "
    "intruders (epsilon 0.5). Rates (of 1, 2, 3, 6 per decade) were set on seed 100: the least that reaches 0.97 on the new task.",
)
NEW = "rot30"
TRAIN = {"tokens_per_micro_batch": 1 << 16}


def base(trial):
    """A perceptron that knows upright digits."""
    from luthier.core.models import wrap
    from luthier.lab.nets import fresh

    rows = make("digits", seed=trial.seed).train
    return trial.tune(wrap(fresh("mlp", trial.seed)), rows, steps=600, lr=1e-3, optimize={"weight_decay": 0.05}, objective="classify", train=TRAIN)


def accuracy(model, rows):
    import torch

    with torch.no_grad():
        batch = model.collate(rows)
        return float((model.classify(batch).argmax(-1) == batch.tensors["labels"]).float().mean())


def adapted(trial, adapt, lr):
    """The base's weights, and the model that is tuned on turned digits, adapters merged."""
    from luthier.core.stage import merged

    start = trial.once("base", lambda: base(trial))
    rows = make("digits", seed=trial.seed, domain=NEW).train
    tuned = trial.tune(start, rows, steps=600, lr=lr, adapt=adapt, objective="classify", train=TRAIN)
    return start.network.state_dict(), merged(tuned)


def judged(trial, before, model):
    import torch

    from luthier.measure.intruder_dimensions import IntruderDimensions

    after = model.network.state_dict()
    found = IntruderDimensions().compare(before, after).numbers
    layers = [n for n in before if n.startswith("layers.") and before[n].ndim == 2]
    moved = sum(float(torch.dist(after[n], before[n]) / before[n].norm()) for n in layers) / len(layers)
    return {
        "intruders": found["intruders"] / (10 * len(layers)), "right intruders": found.get("right_intruders", 0.0) / (10 * len(layers)),
        "effective rank": found.get("effective_rank", 0.0), "moved": moved,
        "new": accuracy(model, make("digits", seed=trial.seed, domain=NEW).test), "old": accuracy(model, make("digits", seed=trial.seed).test),
    }  # fmt: skip


def lora(rank, scaled=False):
    return {"method": "rslora" if scaled else "lora", "rank": rank, "alpha": 2 * rank}


@claim.arm("method")
def lora_of_rank_8(trial):
    return judged(trial, *adapted(trial, lora(8), 2e-3))


@claim.arm("baseline")
def full(trial):
    return judged(trial, *adapted(trial, "full", 3e-4))


@claim.arm("control")
def full_as_far(trial):
    """A rate at which full fine-tuning moves the weights about as far as LoRA does."""
    return judged(trial, *adapted(trial, "full", 2e-3))


@claim.arm()
def lora_of_rank_2(trial):
    return judged(trial, *adapted(trial, lora(2), 6e-3))


@claim.arm()
def lora_of_rank_64(trial):
    return judged(trial, *adapted(trial, lora(64), 3e-4))


@claim.arm()
def rank_stabilised_64(trial):
    return judged(trial, *adapted(trial, lora(64, scaled=True), 6e-5))


@claim.arm()
def intruders_scaled(trial):
    """LoRA of rank 8 whose intruders are scaled by 0.7 after training."""
    from luthier.measure.intruder_dimensions import scale_intruders

    before, model = adapted(trial, lora(8), 2e-3)
    for i, layer in enumerate(model.network.layers):
        layer.weight.data = scale_intruders(before[f"layers.{i}.weight"], layer.weight, 0.7)
    return judged(trial, before, model)
