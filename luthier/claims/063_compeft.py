"""ComPEFT: adapters for three tasks as signs of their largest entries and one number, against the adapters themselves."""

from luthier.claims import Claim
from luthier.lab import make

DENSITIES, ALPHAS = (0.05, 0.1, 0.2, 0.3, 0.5), (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)

claim = Claim(
    paper=63,
    says="An adapter kept as the signs of its largest entries and one magnitude, 8 times smaller or more, answers as well as the adapter (within two points).",
    published="8 to 50 times smaller for T5, T0 and LLaMA of 200 M to 65 B; LLaMA's MMLU 4.16 % above QLoRA with up to 26 times less storage; larger models compress better",
    metric="macro score",
    smallest=0.02,
    at_least=-0.02,
    equal=("rows",),
    seeds=(0, 1, 2, 3),
    methods=("compress/compeft", "adapt/lora"),
    tasks=("traces",),
    models=("lm-s",),
    departs="LoRA of rank 8 on a model of 0.4 M parameters, where the paper expects compression to cost most; sorting, running maxima and chains of five. "
    "Density and magnitude are chosen by likelihood on 100 held-out rows. Sizes are Golomb-Rice coded, and compared with 16 bits an entry.",
    reason="As released, the adapter is shrunk as it is, so half of what is ternarised is the random start of its down projections; what is measured from that start loses far less. "
    "The rest is size: sorting needs fine weights in a model of 0.4 M parameters, while chains of five hardly lose. The paper finds the same trend over model sizes.",
)


def adapters(trial):
    """Every task's tuned model, the same where its training began, validation rows and the task."""
    import numpy as np

    found = {}
    for skill, operands in (("sort", ""), ("runmax", ""), ("chain", "5")):
        task = make("traces", skills=skill, operands=operands, n=900, seed=trial.seed, test=300)
        rows = [task.train[i] for i in np.random.default_rng(trial.seed).permutation(len(task.train))]
        adapt = {"method": "lora", "rank": 8, "alpha": 16}
        model = trial.tune("lab:lm-s", rows[100:], steps=100, lr=3e-3, adapt=adapt)
        begun = trial.tune("lab:lm-s", rows[100:], steps=1, lr=1e-9, adapt=adapt)  # the same seed, so the same start
        found[skill] = (model, begun, rows[:100], task)
    return found


def likelihood(model, rows):
    """The mean log-probability of the answers' tokens."""
    from luthier.core.rows import encode

    with model.evaluating():
        return float(model.score([encode(row, model.processor, train_on="completion", row=i)[-1] for i, row in enumerate(rows)]).logp.mean())


def judged(trial, shrink, grid, from_start=False):
    """The macro score of the three tasks with every adapter shrunk at its best point of the grid, and what is stored of them.

    What is shrunk is the adapter itself, as released, or its difference to where it began."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    scores, stored, entries = {}, 0.0, 0
    for name, (model, begun, held, task) in trial.once("adapters", lambda: adapters(trial)).items():
        start = {n: t.detach().clone() * from_start for n, t in get_peft_model_state_dict(begun.network).items()}
        update = {n: t.detach() - start[n] for n, t in get_peft_model_state_dict(model.network).items()}
        twin, tried = model.frozen_copy(), []
        for density, alpha in grid:
            done, bits = shrink(update, density, alpha)
            set_peft_model_state_dict(twin.network, {n: start[n] + t for n, t in done.items()})
            tried.append((likelihood(twin, held), density, alpha, bits, done))
        value, density, alpha, bits, done = max(tried, key=lambda t: t[0])
        set_peft_model_state_dict(twin.network, {n: start[n] + t for n, t in done.items()})
        scores[name] = sum(task.verify(row, answer).score for row, answer in zip(task.test, trial.answers(twin, task.test))) / len(task.test)
        trial.notes[name] = {"density": density, "alpha": alpha, "validation": value}
        stored, entries = stored + bits, entries + sum(t.numel() for t in update.values())
    return {"macro score": sum(scores.values()) / 3, **scores, "times smaller": 16 * entries / stored, "kilobytes": stored / 8000}


def whole(update, density, alpha):
    return update, 16 * sum(t.numel() for t in update.values())


def ternary(update, density, alpha, mode="ternary"):
    from luthier.compress.compeft import compeft, encode

    done = compeft(update, density, alpha, mode)
    return done, encode(done).bits


def kept_values(update, density, alpha):
    """The largest entries as they are: their places as coded for the signs, and 16 bits each."""
    from luthier.compress.compeft import compeft

    done = compeft(update, density, mode="prune")
    return done, ternary(update, density, 1.0)[1] + 16 * sum(int(t.count_nonzero()) for t in done.values())


def random_signs(update, density, alpha):
    import torch

    done, bits = ternary(update, density, alpha)
    rng = torch.Generator().manual_seed(63)
    return {n: t * (2.0 * torch.randint(2, t.shape, generator=rng) - 1) for n, t in done.items()}, bits


@claim.arm("method")
def compeft(trial):
    return judged(trial, ternary, [(k, a) for k in DENSITIES for a in ALPHAS])


@claim.arm("baseline")
def original(trial):
    return judged(trial, whole, [(1.0, 1.0)])


@claim.arm("control")
def signs_at_random(trial):
    """The same places and magnitudes: do the signs carry the update?"""
    return judged(trial, random_signs, [(k, a) for k in DENSITIES for a in ALPHAS])


@claim.arm()
def mean_magnitude(trial):
    """STC: the kept entries' mean magnitude for the multiple of the deviation."""
    return judged(trial, lambda *point: ternary(*point, mode="stc"), [(k, 1.0) for k in DENSITIES])


@claim.arm()
def pruned(trial):
    return judged(trial, kept_values, [(k, 1.0) for k in DENSITIES])


@claim.arm()
def from_the_start(trial):
    """The difference to the adapter's start, which its seed gives again; the release takes the adapter as it is, random start and all."""
    return judged(trial, ternary, [(k, a) for k in DENSITIES for a in ALPHAS], from_start=True)
