"""RoSTE against straight-through tuning without rotations: sorting is learnt at 4 bits by a model with large channels in half of its blocks."""

from luthier.claims import Claim
from luthier.lab import make

STEPS, BATCH, LARGE, CHANNELS = 100, 16, 16.0, 2

claim = Claim(
    paper=116,
    says="Rotating only where that lowers the error of rounding makes a model that is tuned at 4 bits (weights, activations and cache) better than tuning it at 4 bits "
    "without rotations.",
    published="W4A4KV4, Pythia-6.9B on TL;DR, mean ROUGE: 16-bit SFT 24.72, RTN 5.14, QuaRot 7.46, straight-through 20.65, RoSTE 23.66; Qwen2.5-7B 25.87, -, -, 22.12, 25.10; "
    "Pythia-1B without / all / chosen rotations: 22.37 / 13.09 / 23.07",
    metric="right answers",
    smallest=0.03,
    equal=("rows", "steps"),
    seeds=(0, 1, 2, 3),
    methods=("compress/roste",),
    tasks=("traces",),
    models=("lm-m",),
    departs="Six layers of width 128 and 100 steps of 16 rows. So small a model has no outliers, so they are planted without changing what it computes: the stream is turned "
    "to its principal axes, and in every second block two channels of the down projection's input and two rotary pairs of every head's keys and values are made 16 times "
    "larger, what reads them as much smaller. Answers are scored with weights, activations and cache rounded, as the model would run.",
    reason="Tuning learns around the planted channels: without rotations the model is as good after 100 steps as with them, chosen for the error of rounding that they save, or "
    "everywhere. What the paper says of tuning at 4 bits against rounding afterwards is seen (0.58 and 0.59 against 0.51; 0.73 in full precision). The paper's models have "
    "outliers that training made and goes on making.",
)
GRID = {"lr": (3e-4, 1e-3, 3e-3)}


def task(trial):
    return trial.once("task", lambda: make("traces", skills="sort", n=1600, seed=trial.seed, test=300))


def planted(trial):
    """The shipped model in another basis, the same function: what most of the stream's energy is in lies in few channels, and half of the blocks have large channels."""
    import torch

    from luthier.core.models import load
    from luthier.core.residual import Residual, rotate_inputs, rotate_outputs

    model = load("lab:lm-m")
    residual = Residual(model, "roste")
    residual.untie()
    residual.fold_norms()
    axes = principal_axes(model, residual, task(trial).train[:64])
    residual.rotate(lambda x: x @ axes)
    dim = residual.heads.dim
    channel = torch.arange(CHANNELS)
    heads = torch.zeros(dim)
    heads[channel] = heads[channel + dim // 2] = 1  # a rotary pair turns together, so it is scaled together
    inner = torch.zeros(residual.blocks[0].down.in_features)
    inner[channel] = 1
    for block in residual.blocks[::2]:
        scale_heads, scale_inner = (LARGE ** mask for mask in (heads.repeat(residual.heads.count), inner))
        for giver, reader, scale in ((block.first[1], block.down, scale_inner), (block.value, block.output, scale_heads)):
            rotate_outputs(giver, lambda x, scale=scale: x * scale)
            rotate_inputs(reader, lambda x, scale=scale: x / scale)
        rotate_outputs(block.key, lambda x, scale=scale_heads: x * scale)
        rotate_outputs(block.query, lambda x, scale=scale_heads: x / scale)
    return model


def principal_axes(model, residual, rows):
    """[d, d] orthogonal: the eigenvectors of what the readers of the stream see."""
    import torch

    seen = []
    handles = [block.query.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1))) for block in residual.blocks]
    with torch.no_grad(), model.evaluating():
        model.score(model.collate(rows))
    for handle in handles:
        handle.remove()
    x = torch.cat(seen).double()
    return torch.linalg.eigh(x.T @ x)[1].flip(1).float()


def judged(trial, model):
    splits = task(trial)
    return {"right answers": trial.right(model, splits.test, splits.verify), "general": trial.general(model, 100)}


def tuned(trial, **recipe):
    start = trial.once("planted", lambda: planted(trial))
    return trial.tune(start, task(trial).train, steps=STEPS, batch=BATCH, lr=trial["lr"], adapt="full", **recipe)


def at_four_bits(trial, rotate):
    from luthier.compress.roste import deployed

    return judged(trial, deployed(tuned(trial, compress={"method": "roste", "rotate": rotate})))


@claim.arm("method", grid=GRID)
def roste(trial):
    return at_four_bits(trial, "adaptive")


@claim.arm("baseline", grid=GRID)
def no_rotation(trial):
    return at_four_bits(trial, "none")


@claim.arm("control", grid=GRID)
def all_rotated(trial):
    """Is there anything in choosing?"""
    return at_four_bits(trial, "all")


@claim.arm(grid=GRID)
def rounded_afterwards(trial):
    """Tuned in full precision, then rotated everywhere and rounded, as QuaRot does."""
    from luthier.compress.roste import RoSTE, deployed
    from luthier.core.context import Context
    from luthier.core.rows import Rows

    model = tuned(trial)
    return judged(trial, deployed(RoSTE(rotate="all").compress(model, Context(model, trial.seed, {"train": Rows.of(task(trial).train)}))))


@claim.arm(grid=GRID, exempt=True)
def full_precision(trial):
    """What there is to keep."""
    return judged(trial, tuned(trial))
