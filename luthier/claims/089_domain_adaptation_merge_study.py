"""The domain-adaptation study: a tree of training strategies from base and instruct weights, every node with and without a merge with the instruct model."""

from luthier.claims import Claim
from luthier.lab import make

PATHS = [["cpt"], ["cpt", "sft"], ["cpt", "sft", "dpo"], ["cpt", "sft", "orpo"]]
BATCH, SUBJECTS = 16, 12

claim = Claim(
    paper=89,
    says="Merging a domain expert with the general instruct model by SLERP gives a model that is better at the domain and in general together than any model of the tree.",
    published="At 7-8B (Llama-3.1, Mistral) merges exceed the average of their parents and have capabilities that neither parent has; at 1.7B (SmolLM) they do not (abstract)",
    metric="combined",
    smallest=0.02,
    equal=("tries",),
    seeds=(0, 1, 2, 3),
    methods=("search/stage-tree", "merge/slerp", "measure/synergy", "objective/dpo", "objective/orpo"),
    tasks=("facts", "traces"),
    models=("lm-s", "chat"),
    departs="Decoders of 0.4 M parameters, far below the sizes at which the study sees synergy, and one size only. The domain: twelve unknown people, as statements, then as questions mixed by halves "
    "with instructions, then as pairs of right and wrong answers; the general test: instructions in unseen words. The metric is the harmonic mean of right answers in both; the study "
    "judges domain questions alone, on which a general model of this size knows nothing. Each arm has eight models to choose from, by other test rows; no rate of a stage was searched.",
    reason="Half of an expert's way is not half of its knowledge: facts of twelve people that 0.4 M parameters have by heart are gone halfway to the instruct model, by a plain "
    "mean (0.07 of the questions are left) and more so by SLERP (0.03), whose shares leave whole sublayers to either parent, while the unmerged expert keeps 0.42. The "
    "study itself finds no synergy in its smallest models, which are 4,000 times larger than these.",
)


def asked(rows):
    """Rows as one turn of the instruct model's template."""
    from luthier.lab._build_chat import turn

    return [{**row, "prompt": turn(row["prompt"])} for row in rows]


def material(trial):
    """What the stages learn from; rows to choose with, rows to judge with: questions in unseen templates, instructions in unseen phrasings."""
    knobs = {"world": "people", "entities": SUBJECTS, "seed": trial.seed}
    questions, chat = make("facts", n=400, test=300, **knobs), make("traces", skills="base", phrasings="seen", n=400, seed=trial.seed, test=300)
    learned = {
        "cpt": make("facts", stage="cpt", n=800, **knobs).train,
        "sft": asked([*questions.train, *chat.train]),
        "preference": asked(make("facts", stage="preference", n=400, **knobs).train),
    }
    tests = {"domain": (asked(questions.test), questions.verify), "general": (asked(chat.ood), chat.verify)}
    cuts = {"choose": slice(0, 100), "judge": slice(100, 300)}
    return learned, {use: {kind: (rows[part], verify) for kind, (rows, verify) in tests.items()} for use, part in cuts.items()}


def untuned(name):
    """A shipped model that reads prompts as they are: the rows hold the template's words."""
    import copy

    from luthier.core.models import load

    model = load(name)
    model.processor = copy.deepcopy(model.processor)
    model.processor.chat_template = None
    return model


def stage(trial, model, name):
    learned, _ = trial.once("material", lambda: material(trial))
    rows = {"cpt": learned["cpt"], "sft": learned["sft"]}.get(name, learned["preference"])
    recipe = {
        "cpt": {"steps": 250, "lr": 3e-3},
        "sft": {"steps": 250, "lr": 1e-3},
        "dpo": {"steps": 40, "lr": 1e-4, "objective": {"method": "dpo", "beta": 0.05}},
        "orpo": {"steps": 40, "lr": 3e-4, "objective": {"method": "orpo", "beta": 0.1}},
    }[name]
    return trial.tune(model, rows, batch=BATCH, **recipe)


def scores(trial, model, use):
    _, tests = trial.once("material", lambda: material(trial))
    found = {kind: trial.right(model, rows, verify) for kind, (rows, verify) in tests[use].items()}
    total = found["domain"] + found["general"]
    return {"combined": 2 * found["domain"] * found["general"] / total if total else 0.0, **found}


def tree(trial):
    """All nodes, plain, merged by SLERP and averaged, best first by the rows to choose with; and how to make a node."""
    from luthier.search.stage_tree import StageTree

    starts = {"base": untuned("lab:lm-s"), "instruct": untuned("lab:chat")}
    known = {}

    def node(start, path):
        key = (start, *path)
        if key not in known:
            known[key] = stage(trial, node(start, path[:-1]) if path[:-1] else starts[start], path[-1])
        return known[key]

    def model(point):
        expert = node(point["model"], point["stages"])
        return expert if point["merge"] is None else merged(starts["instruct"], expert, point["merge"])

    space = {"model": ["base", "instruct"], "stages": PATHS, "merge": [None, "slerp", "average"]}
    points = StageTree(score={"combined": 1.0}).search(space, lambda point: scores(trial, model(point), "choose"))
    return points, model, starts["instruct"]


def merged(general, expert, how):
    """The study's SLERP, whose share goes up and down over depth, or the plain average."""
    from luthier.core.models import load_state
    from luthier.merge.slerp import Slerp
    from luthier.merge.uniform_soup import uniform_soup

    anchors = [{"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]}, {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]}, {"value": 0.5}]
    states = [dict(m.network.state_dict()) for m in (general, expert)]
    twin = general.frozen_copy()
    load_state(twin, Slerp(t=anchors).merge(states[0], [states[1]]) if how == "slerp" else uniform_soup(states))
    return twin


def best(trial, how):
    """The best of eight models of one kind, judged; what each switch is worth, and whether the merge beats both of its parents."""
    from luthier.measure.synergy import synergy

    points, model, instruct = trial.once("tree", lambda: tree(trial))
    kind = [p for p in points if p["merge"] == how]
    point, tested = kind[0], trial.once("material", lambda: material(trial))[1]["judge"]
    trial.spend(tries=len(kind))
    trial.notes.update({"node": f"{point['model']} {' '.join(point['stages'])}", **{f"worth of {e['choice']}": round(e["effect"], 4) for e in points[0]["effects"]}})
    chosen, found = model(point), {}
    parents = [] if how is None else [instruct, model({**point, "merge": None})]
    for name, (rows, verify) in tested.items() if parents else ():
        told = synergy(marks(trial, chosen, rows, verify), [marks(trial, parent, rows, verify) for parent in parents])
        found |= {f"{name} over the parents' mean": told["weak"], f"{name} over the better parent": told["strict"]}
    return {**scores(trial, chosen, "judge"), **found}


def marks(trial, model, rows, verify):
    return [float(verify(row, answer).score >= 1) for row, answer in zip(rows, trial.answers(model, rows))]


@claim.arm("method")
def merged_by_slerp(trial):
    return best(trial, "slerp")


@claim.arm("baseline")
def unmerged(trial):
    return best(trial, None)


@claim.arm("control")
def averaged(trial):
    """The plain mean of the weights."""
    return best(trial, "average")


@claim.arm(exempt=True)
def instruct_alone(trial):
    return scores(trial, untuned("lab:chat"), "judge")
