"""Local intrinsic dimension: a network that learns modular subtraction against one that learns its answers by heart."""

from luthier.claims import Claim

MODULUS, SHARE, STEPS, BATCH = 53, 0.7, 1000, 512

claim = Claim(
    paper=39,
    says="At the same training accuracy the local dimension of hidden states, measured without labels, is lower where a model generalises than where it memorises.",
    published="Qualitative: in x - y mod 97 the drop of the train set's local dimension comes with the rise of validation accuracy, only for shares that grok (0.3 to 0.5)",
    metric="local dimension",
    smallest=0.5,
    better="lower",
    span=(0.0, 96.0),
    equal=("rows", "steps"),
    seeds=(0, 1, 2),
    methods=("measure/local-intrinsic-dimension",),
    departs="One block of width 96, x - y mod 53, 70 % of the equations, weight decay 1; no delayed grokking, which needs more steps. The memorising arm has the same "
    "equations with shuffled answers. Mean of TwoNN in 64 neighbours of 1,000 final hidden states.",
    reason="In each of three seeds the model that generalises ends with the higher local dimension, if not by a certain margin. All arms begin at 7 and rise while they learn; none shows the late fall that "
    "the paper sees at grokking, which takes many more steps than run here. Between runs the number of equations matters as much: too few of them give the lowest "
    "dimension and no generalisation.",
)


def equations(trial, share, shuffled):
    """Token ids of `x - y = z` for train and test."""
    import numpy as np
    import torch

    rng = np.random.default_rng([trial.seed, 39])
    x, y = (v.ravel() for v in np.meshgrid(np.arange(MODULUS), np.arange(MODULUS)))
    z = rng.permutation((x - y) % MODULUS) if shuffled else (x - y) % MODULUS
    minus, equal = np.full_like(x, 100), np.full_like(x, 101)
    rows = torch.from_numpy(np.stack([x, minus, y, equal, z], 1)[rng.permutation(len(x))])
    cut = round(share * len(rows))
    return rows[:cut], rows[cut:]


def right(network, rows):
    """The share of equations whose answer is predicted."""
    import torch

    with torch.no_grad():
        return float((network(input_ids=rows[:, :4]).logits[:, -1].argmax(-1) == rows[:, 4]).float().mean())


def dimension(network, rows, tokens=slice(0, 4), points=1000):
    """The mean local dimension of the last hidden states of the train equations' tokens."""
    import numpy as np
    import torch

    from luthier.measure.local_intrinsic_dimension import local_intrinsic_dimension

    with torch.no_grad():
        states = network.model(input_ids=rows[:, :4]).last_hidden_state[:, tokens].flatten(0, 1).numpy()
    cloud = np.unique(states.round(5), axis=0)
    return float(local_intrinsic_dimension(cloud[np.random.default_rng(0).choice(len(cloud), points, replace=False)], 64).mean())


def trained(trial, share=SHARE, shuffled=False, lr=2e-3):
    import torch
    import torch.nn.functional as F

    from luthier.lab.nets import fresh

    train, test = equations(trial, share, shuffled)
    network = fresh("lm-s", trial.seed, num_hidden_layers=1, intermediate_size=384)
    first = dimension(network, train)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=1.0)
    torch.manual_seed(trial.seed)
    for step in range(trial.scaled(STEPS)):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 10)
        some = train[torch.randint(len(train), (BATCH,))]
        optimizer.zero_grad()
        F.cross_entropy(network(input_ids=some[:, :4], logits_to_keep=1).logits[:, -1], some[:, 4]).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    trial.spend(steps=trial.scaled(STEPS), rows=BATCH * trial.scaled(STEPS))
    network.eval()
    last = dimension(network, train)
    return {
        "local dimension": last, "at the start": first, "of the last token": dimension(network, train, slice(3, 4), 600),
        "train accuracy": right(network, train), "test accuracy": right(network, test),
    }  # fmt: skip


@claim.arm("method")
def generalising(trial):
    return trained(trial)


@claim.arm("baseline")
def memorising(trial):
    return trained(trial, shuffled=True)


@claim.arm("control")
def too_few_equations(trial):
    """True answers, but a quarter of the equations: it learns them by heart as well."""
    return trained(trial, share=0.25)
