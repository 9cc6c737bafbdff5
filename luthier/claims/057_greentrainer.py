"""GreenTrainer at half of full tuning's operations, against full tuning and against cheaper ways to spend as little, on lists to sort."""

from luthier.claims import Claim
from luthier.lab import make

ROWS, STEPS, BATCH, SHARE = 800, 150, 32, 0.5
SPENT = 0.56
"""What the method spends of full tuning's operations, three choices of about three steps each included; so the arms without a choice may too."""
GRID = {"lr": (1e-3, 3e-3, 1e-2)}

claim = Claim(
    paper=57,
    says="Trained with half of the operations, on tensors chosen by what they bring, a model is no worse by more than two points than one of which all tensors are trained.",
    published="OPT-2.7B, BLOOMZ-3B and FLAN-T5-3B on SciTLDR and DialogSum: up to 64 % of full fine-tuning's operations saved without a noticeable loss, and up to 4 % better "
    "than LoRA where both save as much (abstract)",
    metric="right answers",
    smallest=0.02,
    at_least=-0.02,
    equal=("rows", "steps"),
    seeds=(0, 1, 2, 3),
    methods=("optimize/greentrainer", "adapt/name-pattern", "adapt/lora"),
    tasks=("traces",),
    models=("lm-m",),
    departs="A decoder of 1.1 M parameters learns to sort from 800 lists in six epochs; the selection is made anew after every second, as an epoch of 25 steps is little "
    "against the three that a choice costs. Operations are counted while each run runs, the selection's own included, and told beside the result; all arms have equal "
    "steps. The last tensors and the random ones are fixed for a run and may cost what the method does with its choices; the random ones fill that budget by the same "
    "programme. LoRA adapts all layers, so it spends more. The embedding is the head as well, as in OPT: to train it takes the whole backward pass.",
    reason="It spends what it says (199 of 361 giga operations, counted while it trained) and keeps more of what the model knew (0.56 against 0.32), but it learns less than the "
    "last or random tensors do for the same operations (0.32 against 0.63 and 0.57). Its measure is one trial step of Adam: at rates of a hundred times the paper's, which "
    "so small a model needs, that step overshoots for many tensors, their predicted gain is negative, and they are left out even where there is budget (170 of 199 spent "
    "at the highest rate). The paper fine-tunes models that a small change suffices for; here a skill is new.",
)


def lists(trial):
    return trial.once("lists", lambda: make("traces", skills="sort", n=ROWS, seed=trial.seed, test=300))


def judged(trial, **recipe):
    """Tune, counting every operation; how many lists are sorted."""
    from luthier.core.meters import Flops

    task = lists(trial)
    with Flops() as flops:
        model = trial.tune("lab:lm-m", task.train, steps=STEPS, batch=BATCH, **recipe)
    trial.spend(giga_operations=flops.total / 1e9)
    return {"right answers": trial.right(model, task.test, task.verify), "general": trial.general(model, 100), "giga operations": flops.total / 1e9}


def affordable(trial, choose):
    """The names of tensors that `choose(costs, budget)` picks by their measured costs on one batch."""
    from luthier.core.meters import backward_costs
    from luthier.core.models import load
    from luthier.optimize.greentrainer import backward_budget

    model = load("lab:lm-m")
    with backward_costs(dict(model.network.named_parameters())) as measured:
        (-model.score(model.collate(lists(trial).train[:BATCH])).logp.mean()).backward()
    costs = measured()
    names = [costs.names[k] for k in choose(costs, backward_budget(costs, SPENT))]
    trial.notes["tensors"] = len(names)
    return {"method": "name-pattern", "patterns": names}


def chosen(trial, share):
    return judged(trial, optimize={"method": "greentrainer", "lr": trial["lr"], "share": share, "every": trial.scaled(50)})


@claim.arm("method", grid=GRID)
def greentrainer(trial):
    return chosen(trial, SHARE)


@claim.arm("baseline", grid=GRID)
def full(trial):
    return judged(trial, lr=trial["lr"])


@claim.arm("control", grid=GRID)
def last_tensors(trial):
    """As many of the tensors nearest the output as the same operations allow."""
    from luthier.optimize.greentrainer import cost

    def last(costs, budget):
        return range(max(n for n in range(len(costs.names) + 1) if cost(range(n), costs.dw, costs.dy) <= budget))

    return judged(trial, adapt=affordable(trial, last), lr=trial["lr"])


@claim.arm(grid=GRID)
def random_tensors(trial):
    """The same programme with importances drawn by chance."""
    import numpy as np

    from luthier.optimize.greentrainer import greentrainer

    def drawn(costs, budget):
        return greentrainer(np.random.default_rng([trial.seed, 57]).random(len(costs.names)), costs.dw, costs.dy, budget)

    return judged(trial, adapt=affordable(trial, drawn), lr=trial["lr"])


@claim.arm(grid=GRID)
def greentrainer_at_seven_tenths(trial):
    """About what LoRA spends."""
    return chosen(trial, 0.7)


@claim.arm(grid=GRID)
def lora(trial):
    return judged(trial, adapt={"method": "lora", "rank": 8, "alpha": 16}, lr=trial["lr"])
