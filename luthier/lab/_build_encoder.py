"""The build of `enc`: masked words of the grammar in four languages, facts, passages, docstrings and code."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from luthier.lab import _grammar_world as grammar
from luthier.lab.corpus import corpus, functions, passages, recall
from luthier.lab.mixture import encode, fact_pair
from luthier.lab.splits import generator, pick
from luthier.lab.tokenizer import SIZE
from luthier.lab.training import Batch, Plan, State, text_batches, train
from luthier.lab.words import SENTINELS, SPECIALS, TOPICS

MASK, LONGEST = 3, 96
CHOSEN, HIDDEN, RANDOM = 0.2, 0.6, 0.1
RESERVED = len(SPECIALS) + len(SENTINELS)
LANGUAGES = (1, 2, 3, 4)
LANGUAGE_SHARES = np.array([100, 30, 30, 3]) / 163


def grammar_line(rng: np.random.Generator) -> str:
    """One to four sentences of a topic in one language."""
    language, topic = int(rng.choice(LANGUAGES, p=LANGUAGE_SHARES)), pick(rng, list(TOPICS))
    return " ".join(grammar.draw_sentence(rng, topic).write(language) for _ in range(int(rng.integers(1, 5))))


def topic_line(rng: np.random.Generator) -> str:
    """Two sentences and `topic is TERM .`: the topic's name or one of its terms."""
    topic = pick(rng, list(TOPICS))
    text = " ".join(grammar.draw_sentence(rng, topic).write() for _ in range(2))
    term = topic if rng.random() < 0.5 else grammar.draw_noun(rng, topic)
    return f"{text} topic is {term} ."


def lines(rng: np.random.Generator, n: int) -> list[str]:
    texts, code = [p["text"] for p in passages(int(rng.integers(50)), 300, 1)], functions()
    makers = [
        (grammar_line, 0.55),
        (topic_line, 0.12),
        (lambda r: fact_pair(r)[1], 0.13),
        (lambda r: pick(r, texts), 0.12),
        (lambda r: pick(r, code)["summary"], 0.04),
        (lambda r: pick(r, code)["code"], 0.04),
    ]
    which = rng.choice(len(makers), n, p=[share for _, share in makers])
    return [makers[i][0](rng) for i in which]


def masked(ids: torch.Tensor, maskable: torch.Tensor, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """BERT's masking with more words left as they are: 20 % of the places, of them 60 % <mask>, 10 % a random word, 30 % unchanged.

    So small a model gives up what a word is on its way to the last layer unless it is asked for it often: with BERT's own shares a
    linear probe of the topic fell from 96 % at the embeddings to 15 % at the end."""
    point = torch.from_numpy(rng.random(ids.shape, dtype=np.float32))
    chosen = (point < CHOSEN) & maskable
    inputs = ids.clone()
    inputs[chosen & (point < HIDDEN * CHOSEN)] = MASK
    random = chosen & (point >= (1 - RANDOM) * CHOSEN)
    inputs[random] = torch.from_numpy(rng.integers(RESERVED, SIZE, ids.shape))[random]
    return inputs, chosen


def mlm_loss(model: torch.nn.Module, batch: Batch, progress: float) -> torch.Tensor:
    hidden = model.bert(input_ids=batch["inputs"], attention_mask=batch["attention"]).last_hidden_state
    return F.cross_entropy(model.cls(hidden[batch["chosen"]]), batch["ids"][batch["chosen"]])


def run(name: str, model: torch.nn.Module, plan: Plan, seed: int) -> State:
    def chunk(i: int) -> Iterator[tuple[Batch, int]]:
        rng = np.random.default_rng([seed, i])
        made = [([1, *encode(text)[: LONGEST - 2], 2], 1) for text in lines(rng, 10_000)]
        for batch, units in text_batches(made, rng, tokens=1536):
            ids = batch["ids"]
            inputs, chosen = masked(ids, ids >= RESERVED, rng)
            if chosen.any():
                yield {"ids": ids, "inputs": inputs, "chosen": chosen, "attention": (ids != 0).long()}, units

    def watch(state: State, progress: float) -> None:
        if state.chunk % 3 == 0:
            print(f"{name}: masked word {masked_words(model, 200):.3f} of Bayes, topic {topic_probe(model):.3f}", flush=True)
            model.train()

    return train(name, model, chunk, mlm_loss, plan, watch)


def bayes_guess(words: list[str], place: int, candidates: list[str]) -> str:
    """The most probable word at a place under the grammar, given all the others."""
    ending = "s" if words[place] not in grammar.NOUN_SET and words[place].endswith("s") and words[place].removesuffix("s") in candidates else ""
    texts = {word: " ".join([*words[:place], word + ending, *words[place + 1 :]]) for word in candidates}
    return max(candidates, key=lambda word: grammar.log_probability(texts[word])) + ending


@torch.no_grad()
def masked_words(model: torch.nn.Module, n: int = 400) -> float:
    """Accuracy on one masked word a sentence, divided by the accuracy of the grammar's own best guess."""
    rng = generator(80, "masked words")
    candidates = sorted(set(grammar.LEXICON))
    found, best = 0, 0
    was_training = model.training
    model.eval()
    for _ in range(n):
        words = grammar.draw_sentence(rng).write().split()
        place = int(rng.integers(len(words) - 1))
        head = encode(words[place])[0]
        before = [1, *encode(" ".join(words[:place]))]
        ids = torch.tensor([[*before, *encode(" ".join(words[place:])), 2]])
        ids[0, len(before)] = MASK
        found += int(model(input_ids=ids).logits[0, len(before)].argmax()) == head
        best += encode(bayes_guess(words, place, candidates))[0] == head
    model.train(was_training)
    return found / best


@torch.no_grad()
def embed(model: torch.nn.Module, texts: list[str], batch: int = 128) -> np.ndarray:
    """Mean-pooled last hidden states."""
    from luthier.lab.tokenizer import tokenizer

    model.eval()
    made = []
    for start in range(0, len(texts), batch):
        part = tokenizer()(texts[start : start + batch], padding=True, return_tensors="pt", return_token_type_ids=False)
        hidden = model.bert(**part).last_hidden_state * part["attention_mask"][..., None]
        made.append(hidden.sum(1) / part["attention_mask"].sum(1, keepdim=True))
    return torch.cat(made).numpy()


def topic_probe(model: torch.nn.Module) -> float:
    from sklearn.linear_model import LogisticRegression

    from luthier.lab.grammar import grammar as task

    found = task(81, 1500, label="topic", test=500)
    x = [embed(model, [row["text"] for row in part]) for part in (found.train, found.test)]
    y = [[row["label"] for row in part] for part in (found.train, found.test)]
    return float(LogisticRegression(max_iter=2000, C=10.0).fit(x[0], y[0]).score(x[1], y[1]))


def corpus_recall(model: torch.nn.Module) -> float:
    found = corpus(82, 10, test=200)
    queries, texts = embed(model, [row["anchor"] for row in found.test]), embed(model, [row["text"] for row in found.unlabelled])
    queries, texts = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, texts))
    ranked = np.argsort(-queries @ texts.T, axis=1)[:, :10]
    return float(np.mean([recall(row["meta"]["grades"], ranks.tolist()) for row, ranks in zip(found.test, ranked)]))


def measure(model: torch.nn.Module) -> dict[str, float]:
    return {"masked-word": masked_words(model), "topic-probe": topic_probe(model), "corpus-recall@10": corpus_recall(model)}
