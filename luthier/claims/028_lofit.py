"""LoFiT: one learned offset on each of three attention heads turns one skill into another that the model also has."""

from luthier.claims import Claim
from luthier.lab import make

SWITCHES = (("copy", "succ"), ("succ", "copy"))
HEADS, STEPS = 3, 200

claim = Claim(
    paper=28,
    says="Offsets learned on the few heads that a first step finds change what a model answers more than offsets learned on as many heads drawn at random.",
    published="With 3 % of the heads better than inference-time intervention and on a par with LoRA at 20 to 200 times fewer parameters; heads found for the task beat those of "
    "other tasks (abstract)",
    metric="right digits",
    smallest=0.02,
    equal=("rows", "steps"),
    seeds=(0, 1, 2, 3),
    methods=("adapt/lofit", "adapt/lora"),
    tasks=("traces",),
    models=("lm-m",),
    departs="200 questions that ask for a copy and are answered with successors, and the reverse, in place of truthfulness and multi-hop questions; 3 of 48 heads of 16 "
    "numbers on a model of 1.1 M parameters. The share of right digits is judged, as whole answers turn right all at once. Half of the 200 steps of 16 rows find heads; the "
    "random heads, another draw for each of the two switches, train throughout. Three heads were settled on with the method's own results on seed 100 in view.",
)
GRID = {"lr": (3e-2, 1e-1, 3e-1)}
"""Above the paper's 1e-2: 48 numbers have to move far in 100 steps."""


def switched(trial, source, target):
    """Rows whose question is asked for `source` and answered for `target`; and the same questions with their usual answers."""
    task = make("traces", skills=target, n=200, seed=trial.seed, test=200)
    for row in [*task.train, *task.test]:
        row["prompt"] = f"{source} {row['meta']['body']} ="
    return task


def judged(trial, change):
    """The share of right digits, the mean over the switches, after `change(rows, source)` gave a model."""
    found, whole, kept = {}, [], []
    for source, target in SWITCHES:
        task = trial.once((source, target), lambda source=source, target=target: switched(trial, source, target))
        model = change(task.train, source)
        answers = [(row["completion"].split(), answer.split()) for row, answer in zip(task.test, trial.answers(model, task.test))]
        found[f"{source} to {target}"] = sum(sum(map(str.__eq__, gold, said)) / len(gold) for gold, said in answers) / len(answers)
        whole.append(sum(gold == said for gold, said in answers) / len(answers))
        kept.append(trial.general(model, 200))
    return {"right digits": sum(found.values()) / len(found), **found, "right answers": sum(whole) / len(whole), "general": sum(kept) / len(kept)}


def tuned(trial, **adapt):
    def change(rows, source):
        draw = 10 * trial.seed + [s for s, _ in SWITCHES].index(source)
        return trial.tune("lab:lm-m", rows, steps=STEPS, batch=16, lr=trial["lr"], adapt=adapt, train={"seed": draw})

    return judged(trial, change)


@claim.arm("method", grid={"lr": GRID["lr"], "l1": (5e-4, 5e-3)})
def lofit(trial):
    return tuned(trial, method="lofit", number=HEADS, l1=trial["l1"])


@claim.arm("baseline", grid=GRID)
def random_heads(trial):
    return tuned(trial, method="lofit", number=HEADS, selection="random")


@claim.arm("control", grid=GRID)
def all_heads(trial):
    """Offsets everywhere, sixteen times as many: is choosing worth it?"""
    return tuned(trial, method="lofit", selection="all")


@claim.arm(grid={"lr": (1e-3, 3e-3, 1e-2)})
def lora(trial):
    """Rank 1 on the same projections, 32 times as many numbers."""
    return tuned(trial, method="lora", rank=1, alpha=1, targets=["o_proj"])


@claim.arm(exempt=True)
def difference_of_means(trial):
    """Inference-time intervention: no training. Heads whose outputs tell the new answers from the old ones best, shifted along the difference of the means."""
    import numpy as np

    def change(rows, source):
        usual = [{**row, "completion": " ".join(answer(source, row["meta"]["body"]))} for row in rows]
        model, new, old = trial.once("base", base), outputs(rows), outputs(usual)
        half = len(rows) // 2
        direction = (new[:half] - old[:half]).mean(0)
        direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
        along_new, along_old = ((x[half:] * direction).sum(-1) for x in (new, old))
        middle = (along_new.mean(0) + along_old.mean(0)) / 2
        told = ((along_new > middle).mean(0) + (along_old < middle).mean(0)) / 2
        best = np.dstack(np.unravel_index(np.argsort(-told, axis=None)[:HEADS], told.shape))[0].tolist()
        spread = np.concatenate([along_new, along_old]).std(0)
        tried = []
        for strength in (1, 3, 10, 30):
            shifted = shift(model, best, strength * spread[..., None] * direction)
            tried.append((trial.right(shifted, rows, make("traces", n=1).verify), strength, shifted))
        return max(tried, key=lambda t: t[:2])[2]

    def outputs(rows):
        return head_outputs(trial.once("base", base), rows)

    return judged(trial, change)


def base():
    from luthier.core.models import load

    return load("lab:lm-m")


def answer(skill, body):
    from luthier.lab._trace_skills import SKILLS

    return SKILLS[skill].solve(body)[1].split()


def head_outputs(model, rows):
    """[rows, layers, heads, dim]: the mean over the answer's tokens of what every head gives."""
    import torch

    heads, seen = model.network.config.num_attention_heads, []
    layers = [block.self_attn.o_proj for block in model.network.model.layers]
    handles = [layer.register_forward_pre_hook(lambda module, args: seen.append(args[0])) for layer in layers]
    found = []
    with torch.no_grad():
        for row in rows:
            ids = model.tokenizer(f"{row['prompt']} {row['completion']}")["input_ids"]
            start = len(model.tokenizer(row["prompt"])["input_ids"])
            seen.clear()
            model.network(input_ids=torch.tensor([ids]))
            found.append(torch.stack([x[0, start:].mean(0).unflatten(-1, (heads, -1)) for x in seen]))
    for handle in handles:
        handle.remove()
    return torch.stack(found).double().numpy()


def shift(model, places, offsets):
    """The model with offsets [layers, heads, dim] on the named heads, as biases of the output projections."""
    import copy

    import torch

    network = copy.deepcopy(model.network)
    for layer, head in places:
        projection, dim = network.model.layers[layer].self_attn.o_proj, offsets.shape[-1]
        moved = projection.weight[:, head * dim : (head + 1) * dim] @ torch.tensor(offsets[layer, head], dtype=torch.float32)
        projection.bias = torch.nn.Parameter(moved + (0 if projection.bias is None else projection.bias), requires_grad=False)
    return network
