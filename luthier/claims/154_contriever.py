"""Contriever against BM25: a small encoder that has seen nothing but crops of 4,000 short passages looks for the answers to questions."""

from luthier.claims import Claim
from luthier.lab import make

PASSAGES, STEPS, BATCH = 4000, 300, 64

claim = Claim(
    paper=154,
    says="A retriever trained without labels, on pairs of random crops of a passage, finds more of the relevant passages than BM25 does.",
    published="BEIR, unsupervised: better Recall@100 than BM25 on 11 of 15 datasets (abstract)",
    metric="recall@10",
    smallest=0.02,
    equal=("rows", "steps"),
    seeds=(0, 1, 2),
    methods=("objective/contriever", "objective/info-nce"),
    tasks=("corpus",),
    departs="A fresh encoder of 0.6 M parameters (the paper starts from BERT) sees 300 batches of 64 passages of 20 tokens, of the very collection that is searched. "
    "Questions are templates and share names with their passages, which suits BM25. Embeddings are normalised, a queue of 1,024, momentum for a short run; recall at 10 of 4,000 "
    "passages, as BM25 finds all at 100.",
    reason="An encoder that starts from nothing and reads 300 batches learns to search (0.43 against 0.35 untrained, 0.55 with in-batch negatives), but not to match names, which "
    "is all that BM25 needs here: questions share their rare words with the passage. The paper starts from BERT and reads half a million batches of 2,048. In-batch "
    "negatives win at this size, where momentum keys of a fast-changing encoder lag behind it.",
)
GRID = {"lr": (3e-4, 1e-3, 3e-3)}
"""Higher than the library's usual one: everything starts fresh."""


def collection(trial):
    """The passages' texts, and the questions with the grade of every passage."""
    splits = make("corpus", seed=trial.seed, n=1, size=PASSAGES, test=300)
    return [row["text"] for row in splits.unlabelled], splits.test, splits.ood


def encoder(trial):
    import copy

    from luthier.core.models import wrap
    from luthier.lab.nets import fresh
    from luthier.lab.tokenizer import tokenizer

    network = fresh("enc", trial.seed, num_hidden_layers=2, hidden_size=128, intermediate_size=256, initializer_range=0.02)
    return wrap(network, copy.deepcopy(tokenizer()))


def judged(trial, scores):
    """How many of the fully relevant passages stand among the first ten; `scores` gives [questions, passages]."""
    from luthier.lab.corpus import ndcg, recall

    texts, *parts = trial.once("collection", lambda: collection(trial))
    found = {}
    for kind, rows in zip(("", ", other wording"), parts):
        ranked = (-scores([row["anchor"] for row in rows], texts)).argsort(1, kind="stable").tolist()
        for name, value in (("recall@10", lambda g, r: recall(g, r, 10)), ("recall@100", lambda g, r: recall(g, r, 100)), ("nDCG@10", ndcg)):
            found[name + kind] = sum(value(row["meta"]["grades"], order) for row, order in zip(rows, ranked)) / len(rows)
    return found


def dense(trial, model):
    """Judge an encoder by its cosines."""
    import torch
    import torch.nn.functional as F

    @torch.no_grad()
    def cosines(questions, texts):
        with model.evaluating():
            asked, known = (F.normalize(model.embed(some).float(), dim=-1) for some in (questions, texts))
        return (asked @ known.T).numpy()

    return judged(trial, cosines)


def tuned(trial, rows=None, **objective):
    rows = rows or [{"text": text} for text in trial.once("collection", lambda: collection(trial))[0]]
    return dense(trial, trial.tune(encoder(trial), rows, steps=STEPS, batch=BATCH, lr=trial["lr"], objective=objective))


@claim.arm("method", grid=GRID)
def contriever(trial):
    return tuned(trial, method="contriever", queue=1024, normalise=True)


@claim.arm("baseline", exempt=True)
def bm25(trial):
    """Words weighed by rarity, repetition and the passage's length (k1 1.2, b 0.75)."""
    import numpy as np
    from sklearn.feature_extraction.text import CountVectorizer

    def scores(questions, texts):
        words = CountVectorizer(token_pattern=r"\S+")
        counts = words.fit_transform(texts).toarray().astype(np.float32)
        length, holds = counts.sum(1, keepdims=True), (counts > 0).sum(0)
        rarity = np.log(1 + (len(texts) - holds + 0.5) / (holds + 0.5))
        weights = rarity * counts * 2.2 / (counts + 1.2 * (0.25 + 0.75 * length / length.mean()))
        return words.transform(questions).toarray().astype(np.float32) @ weights.T

    return judged(trial, scores)


@claim.arm("control", exempt=True)
def untrained(trial):
    """The encoder as it starts: a bag of random vectors finds shared words as well."""
    return dense(trial, encoder(trial))


@claim.arm(grid=GRID)
def in_batch(trial):
    """Crops against the other crops of the batch; no queue, no momentum."""
    return tuned(trial, method="contriever", variant="in-batch", normalise=True)


@claim.arm(grid=GRID)
def inverse_cloze(trial):
    """A span as the question and the rest of its passage (one time in ten all of it) as the answer; negatives of the batch."""
    import numpy as np

    rng, rows = np.random.default_rng([154, trial.seed]), []
    for text in trial.once("collection", lambda: collection(trial))[0] * (1 + STEPS * BATCH // PASSAGES):
        words = text.split()
        size = max(1, int(rng.uniform(0.05, 0.5) * len(words)))
        at = int(rng.integers(len(words) - size + 1))
        rest = words if rng.random() < 0.1 else words[:at] + words[at + size :]
        rows.append({"anchor": " ".join(words[at : at + size]), "positive": " ".join(rest)})
    return tuned(trial, rows, method="info-nce", temperature=0.05)
