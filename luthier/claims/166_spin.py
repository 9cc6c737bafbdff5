"""SPIN against more supervised tuning: a small model of a grammar's sentences, stopped early, plays against itself."""

from luthier.claims import Claim
from luthier.lab import make

ROUNDS, STEPS = 3, 60

claim = Claim(
    paper=166,
    says="After supervised tuning, playing against its own previous version on the same rows makes a model's answers better than more supervised tuning does.",
    published="zephyr-7b-sft-full: MT-Bench 5.94 -> 6.78 and leaderboard mean 58.14 -> 63.16 after four rounds (the card is unsure of these digits); more SFT does not help",
    metric="grammatical",
    smallest=0.02,
    equal=("steps", "rows"),
    seeds=(0, 1, 2),
    methods=("synthesize/self-play", "objective/dpo", "objective/sft"),
    tasks=("grammar",),
    departs="Two layers of width 64, trained on 1,500 sentences of a known grammar (one prompt a topic) and stopped early; the metric is the share of sentences sampled at "
    "temperature 1 that the grammar can derive. Three rounds of 60 steps; beta (0.1, 1) and rate come from a grid, "
    "which reaches lower than that of supervised tuning, as in the paper. A sharper model scores higher, so read NLL and distinct too.",
    reason="The start was stopped early, so more supervised steps still add 10 points to it; the paper's start had learned all it could from its rows. SPIN leaves the sentences "
    "as grammatical as they were (-0.01) with either beta. Played exactly, over tables of probabilities, the same game does contract towards the data, as the theory says; "
    "a test shows it.",
)
PLAY = {"lr": (3e-5, 1e-4, 3e-4), "beta": (0.1, 1.0)}


def sentences(trial):
    """Train and test sentences; the prompt names the topic."""
    splits = make("grammar", label="sentences", seed=trial.seed, n=1500, test=300)
    return [[{**row, "prompt": f"{row['meta']['topic']} ="} for row in part] for part in (splits.train, splits.test)]


def start(trial):
    """The supervised model that every arm goes on from."""
    import copy

    from luthier.core.models import wrap
    from luthier.lab.nets import fresh
    from luthier.lab.tokenizer import tokenizer

    words = copy.deepcopy(tokenizer())
    words.chat_template = None
    network = fresh("lm-s", trial.seed, num_hidden_layers=2, hidden_size=64, intermediate_size=128, initializer_range=0.12)
    return trial.tune(wrap(network, words), trial.once("sentences", lambda: sentences(trial))[0], steps=300, lr=3e-3, objective="sft")


def judged(trial, model):
    import math

    import torch

    from luthier.core.families import Decode
    from luthier.lab._grammar_world import log_probability

    test = trial.once("sentences", lambda: sentences(trial))[1]
    torch.manual_seed(trial.seed)
    prompts = [model.tokenizer(row["prompt"])["input_ids"] for row in test]
    said = [a.text.strip() for several in model.generate(prompts, Decode(max_new_tokens=24, temperature=1.0), 2) for a in several]
    with torch.no_grad():
        nll = -float(model.score(model.collate(test)).rows("sum").mean())
    return {"grammatical": sum(math.isfinite(log_probability(text)) for text in said) / len(said), "nll": nll, "distinct": len(set(said)) / len(said)}


def tuned(trial, steps, **recipe):
    model, rows = trial.once("start", lambda: start(trial)), trial.once("sentences", lambda: sentences(trial))[0]
    return judged(trial, trial.tune(model, rows, steps=steps, lr=trial["lr"], **recipe))


def play(trial, rounds, steps, kept):
    """Rounds of sampling from the round's own start and telling the samples from the given sentences."""
    stage = {
        "name": "play",
        "synthesize": {"method": "self-play", "temperature": 1.0, "keep_rounds": kept, "max_new_tokens": 24},
        "objective": {"method": "dpo", "beta": trial["beta"], "link": "sigmoid"},
    }
    return tuned(trial, steps, stages=[{"loop": {"times": rounds, "start": "previous", "stages": [stage]}}])


@claim.arm("method", grid=PLAY)
def spin(trial):
    return play(trial, ROUNDS, STEPS, 2)


@claim.arm("baseline", grid={"lr": (1e-4, 3e-4, 1e-3)})
def more_supervised_tuning(trial):
    return tuned(trial, ROUNDS * STEPS, objective="sft")


@claim.arm("control", grid=PLAY)
def opponent_never_renewed(trial):
    """As many steps against samples of the start alone."""
    return play(trial, 1, ROUNDS * STEPS, 1)


@claim.arm(exempt=True)
def untouched(trial):
    return judged(trial, trial.once("start", lambda: start(trial)))
