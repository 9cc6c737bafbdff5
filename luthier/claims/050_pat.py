"""PAT against plain LoRA, and against pruning before and after it: a new skill is learned and old ones are kept with a quarter of the width gone."""

from luthier.claims import Claim
from luthier.lab import make

STEPS, BATCH, KEEP = 200, 24, 0.75
TRAVEL = 3.0
"""How far the mask would go if every step went the same way at the full rate. Half of that is lost to the schedule and more to steps back and forth, and it should come to 1/2."""
GRID = {"lr": (1e-3, 3e-3, 1e-2)}
LORA = {"method": "lora", "rank": 16, "alpha": 32}

claim = Claim(
    paper=50,
    says="A model that loses a quarter of its hidden width while it is tuned answers more rightly than the unpruned model after as many steps of LoRA.",
    published="Llama2-7B with a quarter of the width pruned: up to 1.26 points better than the LoRA-tuned unpruned model, and 1.33 times as fast (abstract)",
    metric="right answers",
    smallest=0.02,
    equal=("rows", "steps"),
    seeds=(0, 1, 2, 3),
    methods=("compress/pat", "adapt/lora"),
    tasks=("traces",),
    models=("lm-m",),
    departs="A decoder of 1.1 M parameters and width 128 that has little width to spare; 800 lists to sort and 800 rows of its old abilities in the place of instructions, 200 "
    "steps in the place of 10 000, so the mask learns faster by a factor that lets it travel as far. The metric is the mean of right answers on sorting and on the "
    "probe of what the model could do when it shipped. Channels are pruned before or after tuning where the stream is weakest on training rows. Nobody expects a win "
    "over the unpruned model at this size; what can be seen is pruning during tuning against pruning before or after it.",
    reason="The new skill is learned as well with a quarter of the width gone (0.77 against 0.76 with all of it); the old ones are not kept (0.50 of the general probe against "
    "0.93), since a model of width 128 that was trained to its limit has no quarter to spare. Pruning before tuning does better than during (0.70), as 200 steps are few "
    "for a mask that must first find the channels and then for the rest to make up for them; pruning after tuning leaves nothing (0.14). The paper's models lose redundant "
    "channels over 10,000 steps.",
)


def rows_of(trial):
    """A new skill to be learned, and as many rows of the old ones."""

    def rows():
        sort = make("traces", skills="sort", n=800, seed=trial.seed, test=200)
        return sort, [*sort.train, *make("traces", skills="base", n=800, seed=trial.seed).train]

    return trial.once("rows", rows)


def cut(trial, model):
    """The model without the quarter of its channels in which the stream is weakest on training rows."""
    import torch

    from luthier.compress.pat import shrink
    from luthier.core.residual import Residual

    strength = []
    with model.evaluating():
        batch = model.collate(rows_of(trial)[1][::8])
        hooks = [norm.register_forward_hook(lambda module, args, out: strength.append(args[0].detach().square().flatten(0, -2).mean(0))) for norm in Residual(model).norms]
        model.score(batch)
        for hook in hooks:
            hook.remove()
    small = model.frozen_copy()
    residual = Residual(small)
    relative = torch.stack([s / s.sum() for s in strength]).sum(0)  # every place of the stream counts alike
    kept = relative.argsort(descending=True)[: round(KEEP * residual.width)].sort().values
    shrink(residual, [torch.eye(residual.width)] * (1 + len(residual.writers)), kept)
    return small


def whole(model):
    """With what LoRA learned in the weights."""
    if hasattr(model.network, "merge_and_unload"):
        model.network = model.network.merge_and_unload()
    return model


def tuned(trial, start, **recipe):
    return whole(trial.tune(start, rows_of(trial)[1], steps=STEPS, batch=BATCH, lr=trial["lr"], adapt=LORA, **recipe))


def judged(trial, model):
    task, _ = rows_of(trial)
    sort, general = trial.right(model, task.test, task.verify), trial.general(model, 200)
    size = sum(p.numel() for p in model.network.parameters())
    return {"right answers": (sort + general) / 2, "sort": sort, "general": general, "parameters": size, "pass seconds": seconds(model, task.test)}


def seconds(model, rows):
    """Of one forward pass, the fastest of three."""
    import time

    batch, taken = model.collate(rows), []
    with model.evaluating():
        for _ in range(3):
            started = time.process_time()
            model.score(batch)
            taken.append(time.process_time() - started)
    return min(taken)


@claim.arm("method", grid=GRID)
def pat(trial):
    mask_rate = TRAVEL / (trial["lr"] * trial.scaled(STEPS))
    return judged(trial, tuned(trial, "lab:lm-m", compress=[{"method": "pat", "keep": KEEP, "mask_rate": mask_rate}]))


@claim.arm("baseline", grid=GRID)
def lora(trial):
    """The whole width."""
    return judged(trial, tuned(trial, "lab:lm-m"))


@claim.arm("control", grid=GRID)
def prune_then_tune(trial):
    from luthier.core.models import load

    start = trial.once("cut", lambda: cut(trial, load("lab:lm-m")))
    return judged(trial, tuned(trial, start))


@claim.arm(grid={"lr": (3e-3,)})
def tune_then_prune(trial):
    return judged(trial, cut(trial, tuned(trial, "lab:lm-m")))
