"""Which layers' sharpness goes with errors under shift, over the models between a vision transformer and its narrow fine-tunes?"""

from luthier.claims import Claim
from luthier.lab import make
from luthier.lab.heads import accuracy, headed

ROWS, POINTS, KEEP = 300, (0.4, 0.7, 1.0), 0.3
TRAIN = {"tokens_per_micro_batch": 1 << 16}
SHIFTS: tuple[dict[str, str], ...] = ({}, {"views": "rotation"}, {"views": "blur"}, {"style": "dotted"}, {"style": "inverted"})

claim = Claim(
    paper=55,
    says="Over models on the paths from a base to its fine-tunes, the sharpness of the straggler layers goes with errors out of distribution more closely than that of the "
    "whole model.",
    published="CLIP: overall sharpness is no reliable sign of accuracy out of distribution, that of the straggler layers is; sparse updates there mend interpolations that fail "
    "(abstract; no number is carried)",
    metric="rank correlation",
    smallest=0.1,
    equal=("passes",),
    seeds=(0, 1, 2, 3),
    methods=("measure/interpolation", "merge/straggler-sparsify"),
    tasks=("scenes",),
    models=("vit",),
    departs="A vision transformer of 0.3 M parameters in the place of CLIP, with a head fitted to broad pictures in the place of text; eight fine-tunes of random rate and "
    "length on 300 outlined shapes; out of distribution are filled ones of unseen colours, also turned, blurred, dotted and inverted. The metric is the size of "
    "Kendall's tau between average-case adaptive sharpness and the error over 24 models, three on each path, as the abstract names no sign. A layer is a block, a "
    "straggler one of the fifth of layers with the highest barrier.",
    reason="On these paths a fine-tune trades the one kind of picture for the other: the lower its loss on outlined shapes, the more errors elsewhere (tau -0.57 to -0.91), and "
    "the sharpness of the whole goes with that loss. At equal loss little is left of either (-0.07 to -0.54 for the whole, both signs for the stragglers). A fifth of the "
    "layers is one or two of six blocks and what surrounds them, other ones for each path, so the sharpness of different layers of different sizes is compared; the "
    "paper's model has more layers, and text keeps its head in place.",
)


def pictures(trial):
    """Broad pictures for the head; outlined shapes to tune on and to measure on; others out of distribution."""

    def of(n, test, **knobs):
        return make("scenes", kind="label", label="shape", n=n, test=test, seed=trial.seed, **knobs)

    narrow = of(ROWS, 128, style="line")
    return of(600, 1).train, narrow.train, narrow.test, [row for knobs in SHIFTS for row in of(1, 100, **knobs).ood]


def sweep(trial):
    """The base; of every fine-tune its weights, its layers' barriers, and accuracy out of distribution at the points of its path."""
    import numpy as np

    from luthier.core.landscape import Landscape
    from luthier.core.source import TensorSource
    from luthier.measure.interpolation import layer_barriers

    broad, narrow, test, ood = pictures(trial)
    start = headed(broad)
    base, held = TensorSource.of(dict(start.network.state_dict())), start.collate(ood)
    view = Landscape(start, [start.collate(test)])
    rng, runs = np.random.default_rng([trial.seed, 55]), []
    for number in range(4 if trial.quick else 8):
        steps, lr = int(rng.choice([40, 80, 120])), float(10 ** rng.uniform(-4.3, -2.7))
        model = trial.tune(start, narrow, steps=steps, lr=lr, objective="classify", train={**TRAIN, "seed": 100 * trial.seed + number})
        tuned = TensorSource.of(dict(model.network.state_dict()))
        barriers = layer_barriers(base, tuned, lambda changed, tuned=tuned: view.loss({**dict(tuned), **dict(changed)}), points=3)
        runs.append((tuned, barriers, along(start, base, tuned, [], held)))
        trial.notes[f"run {number}"] = [steps, lr, view.value(dict(base)).accuracy, view.value(dict(tuned)).accuracy]  # what was learned of the narrow pictures
    return start, base, view, held, accuracy(start, dict(base), held), runs


def along(start, base, tuned, sparse, held):
    """Accuracy out of distribution at the points of a path whose update is sparse in some layers."""
    from luthier.core.landscape import layers
    from luthier.merge.straggler_sparsify import straggler_sparsify

    names = [name for layer, found in layers(base.distinct).items() if layer in sparse for name in found]
    return [accuracy(start, dict(straggler_sparsify(base, tuned, names, KEEP, a)), held) for a in POINTS]


def judged(trial, layers_of):
    """The sharpness of `layers_of(barriers)` against errors; and what a sparse update of these layers makes of the paths."""
    from scipy.stats import kendalltau

    start, base, view, held, zero, runs = trial.once("sweep", lambda: sweep(trial))
    sharp, errors, losses, gains, plain = [], [], [], [], []
    for tuned, barriers, path in runs:
        chosen = layers_of(barriers)
        found = [sharpness(view, base, tuned, a, chosen) for a in POINTS]
        sharp += [s for s, _ in found]
        losses += [loss for _, loss in found]
        errors += [1 - value for value in path]
        sparse = along(start, base, tuned, chosen, held)
        gains.append(max(sparse) - max(zero, path[-1]))
        plain.append(max(path) - max(zero, path[-1]))
    trial.spend(passes=len(sharp))
    by, given, level = (kendalltau(*pair).statistic for pair in ((sharp, errors), (losses, errors), (sharp, losses)))
    return {
        "rank correlation": abs(by), "with its sign": by, "of the loss itself": given,
        "at equal loss": (by - given * level) / max(1e-9, ((1 - given**2) * (1 - level**2)) ** 0.5),
        "gain of a sparse update there": sum(gains) / len(gains), "gain of plain mixing": sum(plain) / len(plain),
        "base": zero, "tuned": sum(1 - e for e in errors[2::3]) / len(runs),
        "failed runs mended": sum(g > 0 >= p for g, p in zip(gains, plain)) / max(1, sum(p <= 0 for p in plain)),
    }  # fmt: skip


def sharpness(view, base, tuned, a, chosen):
    """Average-case sharpness of some layers' matrices at one point of a path, and the loss there."""
    from luthier.core.landscape import average_sharpness, between, layers

    state = dict(between(base, tuned, a))
    names = [name for layer, found in layers(state).items() if layer in chosen for name in found]
    part = {n: state[n] for n in names if state[n].is_floating_point() and state[n].ndim > 1}
    return average_sharpness(lambda changed: view.loss({**state, **changed}), part, 5e-3, 8), view.loss(state)


@claim.arm("method")
def straggler_layers(trial):
    from luthier.measure.interpolation import stragglers

    return judged(trial, stragglers)


@claim.arm("baseline")
def all_layers(trial):
    return judged(trial, list)


@claim.arm("control")
def other_layers(trial):
    """All but the stragglers."""
    from luthier.measure.interpolation import stragglers

    return judged(trial, lambda barriers: [layer for layer in barriers if layer not in stragglers(barriers)])
