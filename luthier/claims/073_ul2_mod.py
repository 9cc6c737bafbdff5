"""The mixture of denoisers against one training goal: a fresh small model reads spelled words with their sounds."""

from luthier.claims import Claim
from luthier.lab import make

LINES, STEPS, LENGTH, TRANSFER = 4000, 400, 48, 300
GRID = {"lr": (1e-3, 3e-3, 1e-2)}
WORDS = {"sentinel": "<s{}>", "mode_token": "<{}>"}

claim = Claim(
    paper=73,
    says="A model trained on a mixture of denoisers is better over filling gaps, continuing text and learning a task from few examples than one trained to continue text.",
    published="UL2 20B: state of the art on 50 supervised tasks; better than T5- and GPT-like training on the mean of nine tasks at equal size (abstract and ablations, no single figure on the card)",
    metric="mean of three",
    smallest=0.02,
    equal=("steps", "rows"),
    seeds=(0, 1, 2),
    methods=("objective/mixture-of-denoisers", "objective/sft"),
    tasks=("sounds",),
    departs="Three layers of width 96, trained from nothing for 400 steps on spelled words with their phonemes. All three tasks are scored by the share of tokens that the model predicts "
    "rightly with the right ones before it: a hidden span, the last quarter of a line, and phonemes after 300 examples (with the mode token that the arm knows). The model that only continues text "
    "sees no more than what stands before a gap, which is all it can use. Decoders with a two-way prefix; rows weigh by target tokens, as in T5; spans are rolled, since most of so short lines have one or two of them and the last would always be their end.",
    reason="Filling gaps is not learned in 400 steps, whatever is mixed: a model that does nothing but regular span corruption finds 0.27 of the tokens of a hidden span, with "
    "both sides to look at, and the causal model finds 0.55 of them from the left alone. It is not that a denoiser supervises fewer tokens of a line: continuing alone, "
    "with a quarter of them as targets, comes near the causal model (0.54 against 0.63). So six of the seven denoisers take steps from what is learned and give nothing "
    "back. Mode tokens change little (0.38 both ways). The paper trains for some hundred thousand steps.",
)


def start(trial):
    import copy

    from luthier.core.models import wrap
    from luthier.lab.nets import fresh
    from luthier.lab.tokenizer import tokenizer

    words = copy.deepcopy(tokenizer())
    words.chat_template = None
    return wrap(fresh("lm-s", trial.seed), words)


def lines(trial):
    made = make("sounds", kind="lines", seed=trial.seed, n=4 * LINES, test=600, words_a_line=3)
    return [[{"text": row["text"]} for row in part] for part in (made.train, made.test)]


def right(model, sequences):
    """The share of supervised tokens that are the likeliest, sentinels and the end left out."""
    import torch

    known = model.tokenizer.convert_tokens_to_ids
    apart = torch.tensor([model.tokenizer.eos_token_id, *(known(f"<s{i}>") for i in range(10))])
    hits = total = 0
    with model.evaluating():
        for at in range(0, len(sequences), 64):
            scores = model.score(sequences[at : at + 64])
            counts = ~torch.isin(scores.target, apart)
            hits, total = hits + int((scores.hit & counts).sum()), total + int(counts.sum())
    return hits / total


def made_of(model, parts, mode, two_way):
    """Sequences of (inputs, targets), inputs behind the mode token where the arm has them."""
    import numpy as np

    from luthier.core.batch import Sequence

    head = [model.tokenizer.bos_token_id, *([model.tokenizer.convert_tokens_to_ids(f"<{mode}>")] if mode else [])]
    found = []
    for i, (inputs, targets) in enumerate(parts):
        ids = np.concatenate([head, inputs, targets])
        size = len(ids) - len(targets)
        found.append(Sequence(ids, np.arange(len(ids)) >= size, row=i, prefix=size if two_way else 0))
    return found


def probes(trial, model, gaps, modes, two_way):
    """(filling a gap, continuing) on unseen lines; without `gaps` the gap is read from the left only."""
    import numpy as np

    from luthier.core.chat import plain_ids
    from luthier.objective.mixture_of_denoisers import DENOISERS, Denoiser, mixture_of_denoisers, spans

    rng = np.random.default_rng(trial.seed)
    sentinels = [model.tokenizer.convert_tokens_to_ids(f"<s{i}>") for i in range(10)]
    fill, go_on = [], []
    for row in trial.once("lines", lambda: lines(trial))[1]:
        ids = plain_ids(model.tokenizer, row["text"])[:LENGTH]
        width = max(2, len(ids) // 8)
        at = int(rng.integers(1, len(ids) - width))
        hole = np.where((np.arange(len(ids)) >= at) & (np.arange(len(ids)) < at + width), 0, -1)
        fill.append(mixture_of_denoisers(ids, hole, sentinels) if gaps else (ids[:at], ids[at : at + width]))
        last: Denoiser = DENOISERS[2]
        go_on.append(mixture_of_denoisers(ids, spans(len(ids), last, rng), sentinels, mark=False))
    return right(model, made_of(model, fill, modes and "R", two_way)), right(model, made_of(model, go_on, modes and "S", two_way))


def transfer(trial, model, modes, two_way):
    """Phonemes of unseen words after a short tuning on few examples; each arm has the same."""
    import numpy as np
    import torch

    from luthier.core.chat import plain_ids

    task = make("sounds", seed=trial.seed + 50, n=TRANSFER, test=300)
    read = model.tokenizer

    def rows(part):
        pairs = [(plain_ids(read, r["prompt"]), np.append(plain_ids(read, r["completion"]), read.eos_token_id)) for r in part]
        return made_of(model, pairs, modes and "S", two_way)

    train, test = rows(task.train), rows(task.test)
    adam = torch.optim.AdamW(model.network.parameters(), lr=1e-3, weight_decay=0.0)
    rng = np.random.default_rng(trial.seed)
    model.network.requires_grad_(True)
    model.train()
    for _ in range(trial.scaled(60)):
        loss = -model.score([train[i] for i in rng.choice(len(train), 32, replace=False)]).logp.mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    model.eval()
    return right(model, test)


def trained(trial, objective, gaps=True, modes=False, two_way=True):
    rows = trial.once("lines", lambda: lines(trial))[0]
    model = trial.tune(start(trial), rows, steps=STEPS, batch=32, lr=trial["lr"], objective=objective, train={"tokens_per_micro_batch": 2048})
    fill, go_on = probes(trial, model, gaps, modes, two_way)
    learned = transfer(trial, model, modes, two_way)
    return {"mean of three": (fill + go_on + learned) / 3, "filling": fill, "continuing": go_on, "transfer": learned}


def denoisers(modes, shares=None):
    return {"method": "mixture-of-denoisers", "attention": "prefix", "mode_tokens": modes, "length": LENGTH, "shares": shares, "roll": True, **WORDS}


@claim.arm("method", grid=GRID)
def mixture_of_denoisers(trial):
    return trained(trial, denoisers(True), modes=True)


@claim.arm("baseline", grid=GRID)
def causal(trial):
    """Continue text, every token a target."""
    return trained(trial, "sft", gaps=False, two_way=False)


@claim.arm("control", grid=GRID)
def without_mode_tokens(trial):
    return trained(trial, denoisers(False))


@claim.arm(grid=GRID)
def prefix(trial):
    """Only the sequential denoiser."""
    return trained(trial, denoisers(False, {"S": 1.0}), gaps=False)


@claim.arm(grid=GRID)
def span_corruption(trial):
    """Only the regular denoisers."""
    return trained(trial, denoisers(False, {"R": 1.0}))
