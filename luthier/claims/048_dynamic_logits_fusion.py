"""Dynamic logits fusion against proxy tuning: what a small model learned of three tasks, lent to a larger one that learned none of them."""

from luthier.claims import Claim
from luthier.lab import make

TASKS = {
    "instructions": ("traces", {"skills": "base", "phrasings": "seen"}),
    "fact questions": ("facts", {"world": "real", "entities": 80, "forms": "question"}),
    "running max": ("traces", {"skills": "runmax"}),
}
ROWS, STEPS = 800, 120

claim = Claim(
    paper=48,
    says="Choosing the weight of a small expert's logit shift anew at every token, so that the large model moves as far as the small one did, gives more right answers than the "
    "fixed weight 1.",
    published="From a 7B expert to a 13B model 96.4 % of the gap to full fine-tuning of the 13B is closed on single tasks and 86.3 % on several (abstract)",
    metric="right answers",
    smallest=0.02,
    equal=("rows", "steps"),
    seeds=(0, 1, 2, 3),
    methods=("decode/logits-fusion",),
    tasks=("traces", "facts"),
    models=("lm-m", "lm-s"),
    departs="A model of 0.4 M parameters is the expert and one of 1.1 M the large model; both know the same base skills and facts, so the large one has little to add. An "
    "expert each for base skills asked for in other words, for questions about known facts, and for a new skill, stopped early so that they are not yet certain.",
)


def task(trial, name):
    return trial.once(("task", name), lambda: make(TASKS[name][0], **TASKS[name][1], n=ROWS, seed=trial.seed, test=200))


def tuned(trial, model, name):
    """The shipped model after a short tuning for one of the tasks; what it costs is nobody's, as all arms lean on it."""
    return trial.once((model, name), lambda: trial.tune(f"lab:{model}", task(trial, name).train, steps=STEPS, lr=1e-3))


def shipped(trial, model):
    from luthier.core.models import load

    return trial.once(model, lambda: load(f"lab:{model}"))


def said(model, rows):
    """Greedy answers of any model, a fused one too."""
    from luthier.core.families import Decode

    return model.generate([row["prompt"] for row in rows], Decode(max_new_tokens=24), batch=128)


def judged(trial, model_for):
    from luthier.lab.general import general_probe, verify_general

    found, weights, general, probe = {}, [], [], general_probe()[::4]
    for name in TASKS:
        model, rows = model_for(name), task(trial, name).test
        answers = [several[0] for several in said(model, rows)]
        found[name] = sum(task(trial, name).verify(row, a.text).score >= 1 for row, a in zip(rows, answers)) / len(rows)
        weights += [w for a in answers for w in a.info.get("alpha", [])]
        general.append(sum(verify_general(row, a[0].text) for row, a in zip(probe, said(model, probe))) / len(probe))
    more = {"mean weight": float(sum(map(sum, weights)) / len(weights))} if weights else {}
    return {"right answers": sum(found.values()) / len(found), **found, "general": sum(general) / len(general), **more}


def fused(trial, alpha, several=False):
    from luthier.decode.logits_fusion import LogitsFusion

    def model_for(name):
        experts = [tuned(trial, "lm-s", other) for other in (TASKS if several else [name])]
        names = [f"expert {i}" for i in range(len(experts))]
        models = {"model": shipped(trial, "lm-m"), "small": shipped(trial, "lm-s"), **dict(zip(names, experts))}
        return LogitsFusion(alpha=alpha, experts=names).wrap(models)

    return judged(trial, model_for)


@claim.arm("method")
def dynamic(trial):
    return fused(trial, "dynamic")


@claim.arm("baseline")
def proxy_tuning(trial):
    """The whole shift at every token."""
    return fused(trial, 1.0)


@claim.arm("control")
def small_expert_alone(trial):
    return judged(trial, lambda name: tuned(trial, "lm-s", name))


@claim.arm()
def half_the_shift(trial):
    return fused(trial, 0.5)


@claim.arm()
def one_and_a_half(trial):
    return fused(trial, 1.5)


@claim.arm()
def three_experts_at_once(trial):
    """Dynamic, with no word about which task a question belongs to."""
    return fused(trial, "dynamic", several=True)


@claim.arm(exempt=True)
def large_untouched(trial):
    return judged(trial, lambda name: shipped(trial, "lm-m"))


@claim.arm(exempt=True)
def large_tuned(trial):
    """The gap's other end."""
    return judged(trial, lambda name: tuned(trial, "lm-m", name))
