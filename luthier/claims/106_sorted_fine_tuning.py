"""Sorted fine-tuning: three depths of one model taught at once, against a plain fine-tune whose inner depths get heads of their own afterwards."""

from luthier.claims import Claim
from luthier.lab import make

DEPTHS = (2, 4, 6)
ROWS, STEPS, BATCH = 1500, 200, 16
GRID = {"lr": (3e-4, 1e-3, 3e-3)}

claim = Claim(
    paper=106,
    says="A model whose exits were fine-tuned together answers better, over its depths, than a plain fine-tune with a head of its own for every depth.",
    published="LLaMA-2-13B, 8 depths: SoFT sub-models beat SFT and SFT with trained early-exit heads (ICT) at nearly all equal depths; at full depth -0.06 of PandaLM score against SFT",
    metric="accuracy over depths",
    smallest=0.02,
    equal=("rows", "steps"),
    seeds=(0, 1, 2, 3),
    methods=("objective/sorted-exits", "decode/early-exit", "objective/sft"),
    tasks=("traces",),
    models=("lm-m",),
    departs="A decoder of six layers and 1.1 M parameters that knows eight skills learns to do them when asked in other words; exits after 2, 4 and 6 blocks. The metric is the mean over the three "
    "of the share of right answers. The separate heads start from the model's own and learn from the frozen body's states beyond the equal budget, as in the paper (300 steps). "
    "Early exit at 0.9 is reported for both models with one head; drafting, and models cut before training, are left out.",
)


def phrased(trial):
    return trial.once("rows", lambda: make("traces", skills="base", phrasings="seen", n=ROWS, seed=trial.seed, test=200))


def tuned(trial, **objective):
    return trial.tune("lab:lm-m", phrased(trial).train, steps=STEPS, batch=BATCH, lr=trial["lr"], **objective)


def plain(trial):
    """One fine-tune of this rate for both arms that read it."""
    spent = {}

    def fit():
        model = tuned(trial)
        spent.update(trial.spent)
        return model, spent

    model, cost = trial.once(("plain", trial["lr"]), fit)
    trial.spend(**cost)
    return model


def cut(model, depth, head=None):
    """The first blocks of a model with its norm and its head, or another head."""
    import copy

    network = copy.deepcopy(model.network)
    network.model.layers = network.model.layers[:depth]
    network.config.num_hidden_layers = depth
    if head is not None:
        network.lm_head = head
    return network


def judged(trial, model, heads=None):
    task = phrased(trial)
    right = {depth: trial.right(cut(model, depth, (heads or {}).get(depth)), task.test, task.verify) for depth in DEPTHS}
    return {"accuracy over depths": sum(right.values()) / len(right), **{f"{depth} blocks": value for depth, value in right.items()}, "general": trial.general(model, 200)}


def exiting(trial, model):
    """Early exit: right answers, and the share of all blocks that they took."""
    from luthier.core.families import Decode
    from luthier.decode.early_exit import EarlyExit

    task = phrased(trial)
    rows = task.test[: trial.scaled(60)]
    wrapped = EarlyExit(exits=list(DEPTHS), threshold=0.9).wrap(model)
    answers = [found[0] for found in wrapped.generate([row["prompt"] for row in rows], Decode(max_new_tokens=24))]
    right = sum(task.verify(row, answer.text).score >= 1 for row, answer in zip(rows, answers)) / len(rows)
    depths = [depth for answer in answers for depth in answer.info["depths"]]
    return {"early exit": right, "share of blocks": sum(depths) / len(depths) / DEPTHS[-1]}


def own_heads(trial, model):
    """A head for each inner depth, learned from the frozen body's states."""
    import copy

    import torch
    import torch.nn.functional as F

    from luthier.core.exits import states_at

    states, targets = {depth: [] for depth in DEPTHS[:-1]}, []
    with model.evaluating():
        for at in range(0, ROWS, 100):
            forest = model.forest(model.collate(phrased(trial).train[at : at + 100]).sequences)
            for depth, found in states_at(model, forest, DEPTHS[:-1]).items():
                states[depth].append(found.flatten(0, 1)[forest.source])
            targets.append(forest.target)
    target, heads = torch.cat(targets), {}
    for depth, found in states.items():
        features, head = torch.cat(found), copy.deepcopy(model.network.lm_head)
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        optimizer, generator = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.0), torch.Generator().manual_seed(trial.seed)
        for _ in range(trial.scaled(300)):
            some = torch.randint(len(target), (512,), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(head(features[some]), target[some]).backward()
            optimizer.step()
        heads[depth] = head
    return heads


@claim.arm("method", grid=GRID)
def sorted_exits(trial):
    model = tuned(trial, objective={"method": "sorted-exits", "exits": list(DEPTHS)})
    return {**judged(trial, model), **exiting(trial, model)}


@claim.arm("baseline", grid=GRID)
def plain_with_own_heads(trial):
    model = plain(trial)
    return judged(trial, model, own_heads(trial, model))


@claim.arm("control", grid=GRID)
def plain_with_one_head(trial):
    model = plain(trial)
    return {**judged(trial, model), **exiting(trial, model)}
