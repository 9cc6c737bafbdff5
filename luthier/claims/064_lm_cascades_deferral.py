"""Which words does a small speller hand to a larger one? A rule learnt on quantiles of its token log-probabilities against their sum or mean."""

from luthier.claims import Claim
from luthier.lab import make

WORDS, HELD = 10_000, 1_000

claim = Claim(
    paper=64,
    says="A small rule learnt on quantiles of the small model's token log-probabilities defers better than the probability of its answer, summed or averaged over the tokens.",
    published="The learnt rule beats both on most of about 20 sets; the card gives a few per cent of relative area over the average and 10-20 % over random, and is unsure of both",
    metric="area under the deferral curve",
    smallest=0.002,
    equal=("rows",),
    seeds=(0, 1, 2, 3),
    methods=("decode/cascade",),
    tasks=("sounds",),
    models=("lm-m",),
    departs="Spelling to phonemes: a fresh model of one layer of width 48 and one of 1.1 M parameters tuned on the same 10,000 words; quality is 1 minus the phoneme error "
    "rate. The rule learns from 1,000 other words, the curve is drawn on 1,000 more. The baseline takes sum or mean, whichever is better on the words that the rule learns from.",
)


def small(trial, rows):
    import copy

    from luthier.core.models import wrap
    from luthier.lab.nets import fresh
    from luthier.lab.tokenizer import tokenizer

    network = fresh("lm-s", trial.seed, num_hidden_layers=1, hidden_size=48, num_attention_heads=4, intermediate_size=128, initializer_range=0.14)
    return trial.tune(wrap(network, copy.deepcopy(tokenizer())), rows, steps=600, lr=5e-3)


def answered(trial):
    """For the held and the test words: the small model's token log-probabilities, and the quality of both models' answers."""
    import torch

    from luthier.core.families import Decode
    from luthier.decode._shared import answered as sequence

    splits = make("sounds", n=WORDS + HELD, seed=trial.seed, test=1000)
    train, found = splits.train[:WORDS], {}
    models = small(trial, train), trial.tune("lab:lm-m", train, steps=300, lr=1e-3)
    for part, rows in (("held", splits.train[WORDS:]), ("test", splits.test)):
        prompts, quality = [models[0]._prompt_ids(row["prompt"]) for row in rows], []
        for model in models:
            answers = [several[0] for several in model.generate(prompts, Decode(max_new_tokens=16), batch=250)]
            quality.append([splits.verify(row, a.text).score for row, a in zip(rows, answers)])
            if model is models[0]:
                sequences = [sequence(p, a.ids) for p, a in zip(prompts, answers)]
        with torch.no_grad(), models[0].evaluating():
            scores = models[0].score(sequences)
            logp, owner = scores.logp.double().numpy(), scores.sequence.numpy()
        found[part] = ([logp[owner == i] for i in range(len(rows))], *quality)
    return found


def judged(trial, doubt):
    """`doubt(held, test)` from the held words' and the test words' (log-probabilities, small quality, large quality)."""
    import numpy as np

    from luthier.decode.cascade import area, deferral_curve

    parts = trial.once("answered", lambda: answered(trial))
    logps, first, second = parts["test"]
    value = np.asarray(doubt(parts["held"], parts["test"]), float)
    curve = deferral_curve(value, first, second, seed=trial.seed)
    exact = deferral_curve(value, np.equal(first, 1), np.equal(second, 1), seed=trial.seed)
    return {"area under the deferral curve": area(curve), "area, exact words": area(exact), "small": curve[0], "large": curve[-1], "at 30 %": curve[6],
            "correlation with length": abs(float(np.corrcoef(value, [len(p) for p in logps])[0, 1])) if np.ptp(value) else 0.0}  # fmt: skip


def best(parts, candidates):
    """Of the candidates' doubts the one with the largest area on these words."""
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


@claim.arm("control")
def best_quantile(trial):
    """One quantile, chosen on the held words: no learning."""
    return judged(trial, lambda held, test: best(held, [chow("chow-quantile", q / 10) for q in range(11)])(test[0]))


@claim.arm()
def rule_without_quantiles(trial):
    """The same rule on the sum, the mean and the length."""
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
    """The true gain of every word."""
    return judged(trial, lambda held, test: [b - a for a, b in zip(*test[1:])])
