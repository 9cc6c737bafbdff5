"""Which questions does a half-trained model hand to a larger one? A rule learnt on quantiles of its token log-probabilities against their sum or mean."""

from luthier.claims import Claim
from luthier.lab import make

claim = Claim(
    paper=64,
    says="A small rule learnt on quantiles of the small model's token log-probabilities defers better than the probability of its answer, summed or averaged over the tokens.",
    published="The learnt rule beats both on most of about 20 sets; the card gives a few per cent of relative area over the average and 10-20 % over random, and is unsure of both",
    metric="area under the deferral curve",
    smallest=0.005,
    equal=("rows",),
    seeds=(0, 1, 2, 3, 4),
    methods=("decode/cascade",),
    tasks=("traces",),
    models=("lm-m", "lm-s@half"),
    departs="The half-trained model of 0.4 M parameters and the finished one of 1.1 M, on 800 questions for base skills and 400 with longer lists and chains, where both fail "
    "often; answers have 1 to 16 tokens. The rule learns from about 1,200 others of the same kinds. The baseline takes sum or mean, whichever is better on those. The paper "
    "cascades FLAN-T5 on 20 language tasks.",
)


def questions(seed):
    splits = make("traces", skills="base", seed=seed, n=1, test=800)
    return splits.test + splits.ood[:400], splits.verify


def answered(trial):
    """For the held and the test questions: the small model's token log-probabilities, and whether each model's answer is right."""
    import torch

    from luthier.core.families import Decode
    from luthier.core.models import load
    from luthier.decode._shared import answered as sequence

    test, verify = questions(trial.seed)
    asked = {row["prompt"] for row in test}
    held, found = [row for row in questions(1000 + trial.seed)[0] if row["prompt"] not in asked], {}
    models = [load("lab:lm-s@half"), load("lab:lm-m")]
    for part, rows in (("held", held), ("test", test)):
        prompts, quality = [models[0].tokenizer(row["prompt"])["input_ids"] for row in rows], []
        for model in models:
            answers = [several[0] for several in model.generate(prompts, Decode(max_new_tokens=24), batch=200)]
            quality.append([float(verify(row, a.text).parsed["final_right"]) for row, a in zip(rows, answers)])
            if model is models[0]:
                sequences = [sequence(p, a.ids) for p, a in zip(prompts, answers)]
        with torch.no_grad(), models[0].evaluating():
            scores = models[0].score(sequences)
            logp, owner = scores.logp.double().numpy(), scores.sequence.numpy()
        found[part] = ([logp[owner == i] for i in range(len(rows))], *quality)
    return found


def judged(trial, doubt):
    """`doubt(held, test)` from the held and the test questions' (log-probabilities, small quality, large quality)."""
    import numpy as np

    from luthier.decode.cascade import area, deferral_curve

    parts = trial.once("answered", lambda: answered(trial))
    logps, first, second = parts["test"]
    value = np.asarray(doubt(parts["held"], parts["test"]), float)
    curve = deferral_curve(value, first, second, seed=trial.seed)
    return {"area under the deferral curve": area(curve), "small": curve[0], "large": curve[-1], "at 30 %": curve[6],
            "correlation with length": abs(float(np.corrcoef(value, [len(p) for p in logps])[0, 1])) if np.ptp(value) else 0.0}  # fmt: skip


def best(parts, candidates):
    """Of the candidates' doubts the one with the largest area on these questions."""
    from luthier.decode.cascade import area, deferral_curve

    return max(candidates, key=lambda score: area(deferral_curve(score(parts[0]), *parts[1:])))


def chow(*score):
    from luthier.decode.cascade import cascade

    return lambda logps: cascade(logps, *score)


@claim.arm("method")
def rule_on_quantiles(trial, columns=slice(None)):
    from luthier.decode.cascade import PostHocRule, quantile_features

    def doubt(held, test):
        rule = PostHocRule("mlp", seed=trial.seed).fit(quantile_features(held[0])[:, columns], *held[1:])
        return rule(quantile_features(test[0])[:, columns])

    return judged(trial, doubt)


@claim.arm("baseline")
def sum_or_mean(trial):
    return judged(trial, lambda held, test: best(held, [chow("chow-sum"), chow("chow-average")])(test[0]))


@claim.arm()
def best_quantile(trial):
    """One quantile, chosen on the held questions: no learning."""
    return judged(trial, lambda held, test: best(held, [chow("chow-quantile", q / 10) for q in range(11)])(test[0]))


@claim.arm("control")
def rule_without_quantiles(trial):
    """The same rule on the sum, the mean and the length: is it the quantiles, or the learning?"""
    return rule_on_quantiles(trial, slice(-3, None))


@claim.arm()
def chow_sum(trial):
    return judged(trial, lambda held, test: chow("chow-sum")(test[0]))


@claim.arm()
def chow_average(trial):
    return judged(trial, lambda held, test: chow("chow-average")(test[0]))


@claim.arm()
def by_chance(trial):
    return judged(trial, lambda held, test: [0.0] * len(test[0]))


@claim.arm()
def oracle(trial):
    """The true gain of every question."""
    return judged(trial, lambda held, test: [b - a for a, b in zip(*test[1:])])
