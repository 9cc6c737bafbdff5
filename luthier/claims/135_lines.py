"""LiNeS: updates scaled by depth against updates scaled evenly, for what a fine-tune forgets and for merging five fine-tunes."""

from luthier.claims import Claim
from luthier.lab import make
from luthier.lab.heads import accuracy, body, headed, shapes_left

TASKS = {
    "digit": ("digits", {}), "scene's size": ("scenes", {"label": "size"}), "parity": ("digits", {"label": "parity"}),
    "scene's count": ("scenes", {"label": "count", "objects": "1-4"}), "negative digit": ("digits", {"domain": "invert"}),
}  # fmt: skip
ALPHAS, BETAS = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0), (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
TRAIN = {"tokens_per_micro_batch": 1 << 16}

claim = Claim(
    paper=135,
    says="Scaling an update down towards the shallow blocks keeps more of a fine-tune's target and of other tasks together than scaling it evenly does.",
    published="Less forgetting, better out-of-distribution accuracy, better merging of 8, 14 and 20 vision tasks, soups and RLHF policies (abstract; no figures verified)",
    metric="trade-off",
    smallest=0.01,
    span=(0.0, 1.5),
    seeds=(0, 1, 2, 3),
    methods=("merge/lines", "merge/task-arithmetic"),
    tasks=("digits", "scenes"),
    models=("vit",),
    departs="A vision transformer of 0.3 M parameters in six blocks; five small tasks under frozen linear heads. The trade-off is (2 x target + others) / 3, "
    "the target as a share of the fine-tune's accuracy and the others of the base's; it also chooses the "
    "strength, on other rows and with other tasks than those reported. Merging is told as `merged`.",
    reason="At equal strength both ways trade one for the other: scaling by depth keeps more of the target (0.98 against 0.95), scaling evenly keeps more of the other tasks "
    "(0.86 against 0.80), and the best trade-offs are alike. The order of depths does matter: turned round, it is worse than not scaling by depth. In six blocks of a "
    "model that saw shapes only, shallow blocks hold less that is general than in the paper's models.",
)





def fine_tunes(trial):
    """The base's body, and every task's model, validation and test pictures, accuracy of the base and its own on both."""
    found = []
    for kind, knobs in TASKS.values():
        task = make(kind, seed=trial.seed, **({"rgb": True} if kind == "digits" else {"kind": "label", "n": 1000, "test": 400}), **knobs)
        start = headed(task.train[:100])
        model = trial.tune(start, task.train[:700], steps=60, lr=1e-3, objective="classify", adapt={"method": "full", "freeze": ["classifier"]}, train=TRAIN)
        parts = [model.collate(task.train[700 : 700 + trial.scaled(150)]), model.collate(task.test)]
        found.append((model, parts, [accuracy(model, body(start), part) for part in parts], [accuracy(model, body(model), part) for part in parts]))
    return body(start), found


def judged(trial, alone, together):
    """`alone` and `together` turn a strength of the grid into the shallow end's factor and what the deep end's has above it."""
    from luthier.merge.lines import Lines

    base, tasks = trial.once("fine-tunes", lambda: fine_tunes(trial))
    bodies = [body(model) for model, *_ in tasks]

    def scaled(bodies, factors):
        return dict(Lines(*factors).merge(base, bodies))

    def share(task, weights, part, own):
        model, parts, before, after = task
        return accuracy(model, weights, parts[part]) / (after if own else before)[part]

    def kept(target, weights, part):
        """Target and others; with validation pictures the next two tasks, with test pictures the two after them."""
        others = [tasks[(target + step) % 5] for step in ((1, 2), (3, 4))[part]]
        return share(tasks[target], weights, part, True), sum(share(t, weights, part, False) for t in others) / 2

    def tradeoff(target, weights, part):
        mine, others = kept(target, weights, part)
        return (2 * mine + others) / 3

    chosen = [max(ALPHAS, key=lambda a: tradeoff(i, scaled([bodies[i]], alone(a)), 0)) for i in range(5)]
    results = [scaled([bodies[i]], alone(a)) for i, a in enumerate(chosen)]
    strength = max(BETAS, key=lambda b: sum(share(t, scaled(bodies, together(b)), 0, True) for t in tasks))
    trial.notes.update(alone=chosen, together=strength)
    merged, pairs = scaled(bodies, together(strength)), [kept(i, weights, 1) for i, weights in enumerate(results)]
    return {
        "trade-off": sum(2 * t + o for t, o in pairs) / 15, "target": sum(t for t, _ in pairs) / 5, "others": sum(o for _, o in pairs) / 5,
        "general": sum(map(shapes_left, results)) / 5, "merged": sum(share(t, merged, 1, True) for t in tasks) / 5,
    }  # fmt: skip


@claim.arm("method")
def lines(trial):
    return judged(trial, lambda a: (a, 1 - a), lambda b: (1 / 5, b))


@claim.arm("baseline")
def evenly(trial):
    """One factor for all: WiSE-FT, and task arithmetic."""
    return judged(trial, lambda a: (a, 0.0), lambda b: (b, 0.0))


@claim.arm("control")
def turned_round(trial):
    """The deep end scaled down, with the same freedom."""
    return judged(trial, lambda a: (1.0, a - 1), lambda b: (1 / 5 + b, -b))


@claim.arm()
def not_scaled(trial):
    """The fine-tunes as they are, and their average."""
    return judged(trial, lambda a: (1.0, 0.0), lambda b: (1 / 5, 0.0))
