"""UDS against random rows: the best 8 of 32 candidates by forward pass alone, in a pool that is mostly one easy skill."""

from luthier.catalog import register
from luthier.claims import Claim
from luthier.lab import make
from luthier.select import Selector

NEW = ("sort", "sortd", "runmax")
SKILLS = ("copy", *NEW)
STEPS, BATCH, CANDIDATES = 300, 8, 4

claim = Claim(
    paper=13,
    says="Choosing each batch's rows by utility and diversity of their logits teaches more than as many random rows.",
    published="MMLU, ScienceQA, GSM8K, HumanEval with 7-8B models under several budgets: better than random, max-loss, GradNorm and all rows (the summary; no cell is carried)",
    metric="macro exact match",
    reason="On seed 100 the utility term prefers new skills at first (correlation with the loss +0.58), but after 100 steps it prefers what is known (-0.89): the nuclear norm of "
    "confident logits is the larger one. Choosing by loss alone, the control, does best here.",
    smallest=0.02,
    equal=("rows", "steps"),
    seeds=(0, 1, 2, 3, 4),
    methods=("select/uds", "objective/sft"),
    tasks=("traces",),
    models=("lm-s",),
    departs="A 0.43M model and list questions of one length, 60 % of them copying, which the model can do, and 5 % random words; all weights are tuned, 8 of 32 candidates a step, "
    "and utility and diversity are put on one scale (alpha 1) because the paper's alpha belongs to 7B models.",
)
GRID = {"lr": (1e-4, 3e-4, 1e-3)}


@register("claim-max-loss")
class MaxLoss(Selector):
    """The candidates with the largest loss."""

    oversample = float(CANDIDATES)

    def pick(self, batch, row_scores, ctx=None):
        loss = row_scores["loss"]
        chosen = loss.argsort(descending=True)[: len(batch) // CANDIDATES]
        return loss.new_zeros(len(batch)).index_fill(0, chosen, 1.0)


def pool(trial):
    """Rows of four digits in and four out, so that no score can be had by length: the candidates of two epochs; and test questions, as many of every skill."""
    n, rest = STEPS * BATCH * CANDIDATES // 2, ",".join(SKILLS[1:])
    knobs = {"operands": "4", "seed": trial.seed}
    easy, hard = make("traces", skills="copy", n=round(0.6 * n), test=50, **knobs), make("traces", skills=rest, n=n - round(0.6 * n), test=300, **knobs)
    words = make("traces", skills="copy", n=n // 8, test=1, garbage=1.0, seed=trial.seed).train
    words = [w for w in words if len(w["prompt"].split()) >= 6 and len(w["completion"].split()) >= 4][: n // 20]
    garbage = [{"prompt": " ".join(w["prompt"].split()[:6]), "completion": " ".join(w["completion"].split()[:4]), "meta": w["meta"]} for w in words]
    return [*easy.train, *hard.train[: len(hard.train) - len(garbage)], *garbage], easy.test + hard.test, hard.verify


def judged(trial, **recipe):
    rows, test, verify = trial.once("pool", lambda: pool(trial))
    model = trial.tune("lab:lm-s", rows, steps=STEPS, lr=trial["lr"], objective="sft", data={"train_on": "all"}, **{"batch": BATCH, **recipe})
    right = {skill: [] for skill in SKILLS}
    for row, answer in zip(test, trial.answers(model, test)):
        right[row["meta"]["skill"]].append(verify(row, answer).score >= 1)
    share = {skill: sum(v) / len(v) for skill, v in right.items()}
    return {"macro exact match": sum(share.values()) / len(share), "new skills": sum(share[s] for s in NEW) / len(NEW), "copy": share["copy"], "general": trial.general(model, 100)}


@claim.arm("method", grid=GRID)
def uds(trial):
    return judged(trial, select={"method": "uds", "candidates": CANDIDATES, "alpha": 1.0, "scale": "zscore"})


@claim.arm("baseline", grid=GRID)
def random(trial):
    """As many rows, as they come."""
    return judged(trial)


@claim.arm("control", grid=GRID)
def max_loss(trial):
    return judged(trial, select={"method": "claim-max-loss"})


@claim.arm(grid=GRID)
def utility_only(trial):
    return judged(trial, select={"method": "uds", "candidates": CANDIDATES, "alpha": 0.0, "scale": "zscore"})
