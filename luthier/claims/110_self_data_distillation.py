"""Self-data distillation against plain tuning of a model that lost two of its six blocks."""

from luthier.claims import Claim
from luthier.lab import make

ROWS, STEPS, DROP = 600, 120, 2
GRID = {"lr": (3e-4, 1e-3, 3e-3)}

claim = Claim(
    paper=110,
    says="A pruned model tuned on targets in the unpruned model's own words keeps more of its other abilities than one tuned on the data set's own targets.",
    published="Llama-3.1-8B-Instruct minus 6 of 32 layers: 91.2 % of the original quality (OpenLLM v1 mean) against 81.7 % with SFT on the data set's targets (abstract)",
    metric="untouched abilities",
    smallest=0.02,
    equal=("steps", "rows"),
    seeds=(0, 1, 2),
    methods=("synthesize/self-data-distillation", "compress/depth-prune"),
    tasks=("traces",),
    models=("lm-m",),
    departs="A six-layer model of width 128 loses two blocks by angular distance and is tuned by LoRA on chain calculations written in a style that it has never seen. So small a model cannot rewrite by "
    "instruction: it answers by itself, and its answer is taken where the final result is right (the same prompts in all arms). What is untouched is the probe of what the model could do "
    "when it shipped. Distilling logits and merging two distilled models are left out.",
)


def chains(trial):
    return make("traces", seed=trial.seed, n=ROWS, skills="chain", style="2")


def pruned(trial):
    """The model that all arms begin with."""
    from luthier.compress.depth_prune import DepthPrune
    from luthier.core.context import Context
    from luthier.core.models import load
    from luthier.core.rows import Rows

    whole = load("lab:lm-m")
    rows = trial.once("chains", lambda: chains(trial)).train
    return DepthPrune(drop=DROP).compress(whole, Context(whole, trial.seed, {"train": Rows.of(rows)}))


def judged(trial, model):
    from luthier.lab.general import verify_general

    task = trial.once("chains", lambda: chains(trial))
    return {"untouched abilities": trial.general(model), "task": trial.right(model, task.test, verify_general)}


def final_result(answer, row):
    """The reference's final result, in whatever style."""
    from luthier.lab.general import verify_general

    return bool(verify_general(row, answer))


def distilled(trial, check):
    """The rows with the unpruned model's own answers as targets, where they pass the check."""
    from luthier.core.context import Context
    from luthier.core.models import load
    from luthier.synthesize.self_data_distillation import SelfDataDistillation

    whole = load("lab:lm-m")
    rows = trial.once("chains", lambda: chains(trial)).train
    method = SelfDataDistillation(mode="own", verify=check, max_new_tokens=24)
    made = method.synthesize(rows, Context(whole, trial.seed, models={"base": whole}))
    trial.notes.update({k: v for k, v in method.report.items() if isinstance(v, (int, float))})
    return made


def tuned_on(trial, rows):
    start = trial.once("pruned", lambda: pruned(trial))
    return judged(trial, trial.tune(start, rows, steps=STEPS, batch=16, lr=trial["lr"], adapt={"method": "lora", "rank": 8}, objective="sft"))


@claim.arm("method", grid=GRID)
def self_data_distillation(trial):
    return tuned_on(trial, distilled(trial, final_result))


@claim.arm("baseline", grid=GRID)
def given_targets(trial):
    return tuned_on(trial, trial.once("chains", lambda: chains(trial)).train)


@claim.arm("control", exempt=True)
def pruned_only(trial):
    """What tuning has to repair."""
    return judged(trial, trial.once("pruned", lambda: pruned(trial)))


@claim.arm(grid=GRID)
def unfiltered(trial):
    """All of the model's own answers, right or wrong."""
    return tuned_on(trial, distilled(trial, None))


@claim.arm(exempt=True)
def unpruned(trial):
    """The original: what recovery is measured against."""
    from luthier.core.models import load

    return judged(trial, load("lab:lm-m"))
