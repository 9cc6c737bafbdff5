"""The floating-point operations that a piece of work cannot do without: its bound is their number over the machine's matmul rate.

Two operations for each multiply-add of a linear layer, of attention's two products and of the head; norms, activations and the softmax
are not counted, nor is what is computed twice. A token that several rows share is counted once a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """The sizes of a transformer's products."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    inner: int
    gated: bool = True
    """Three linear layers in the feed-forward part, not two."""
    vocabulary: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """From a transformers config.json of a Llama-like decoder or of a BERT."""
        heads, width = config["num_attention_heads"], config["hidden_size"]
        return cls(config["num_hidden_layers"], width, heads, config.get("num_key_value_heads") or heads, config.get("head_dim") or width // heads,
                   config["intermediate_size"], config["model_type"] != "bert", config["vocab_size"])  # fmt: skip

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of the linear layers of one block: those of attention, then those of the feed-forward part."""
        query, key = self.heads * self.head_width, self.kv_heads * self.head_width
        forward = [(self.inner, self.width)] * (2 if self.gated else 1) + [(self.width, self.inner)]
        return [(query, self.width), (key, self.width), (key, self.width), (self.width, query), *forward]

    @property
    def body(self) -> int:
        """Weights of all linear layers but the head."""
        return self.layers * sum(a * b for a, b in self.linears)

    def adapter(self, rank: int) -> int:
        """Weights of LoRA on all of them."""
        return self.layers * sum(rank * (a + b) for a, b in self.linears)


@dataclass(frozen=True)
class Load:
    """What a network has to read: distinct tokens, pairs of a token and one that it sees, and places whose next token is scored."""

    tokens: int = 0
    pairs: int = 0
    scored: int = 0

    def __add__(self, other: Load) -> Load:
        return Load(self.tokens + other.tokens, self.pairs + other.pairs, self.scored + other.scored)


def causal(rows: Iterable[Sequence[int]], prompts: Iterable[int]) -> Load:
    """Rows that are read from left to right, their common beginnings once; scored is all that follows each row's `prompt` tokens."""
    tree: dict[Any, Any] = {}
    tokens = pairs = scored = 0
    for row, prompt in zip(rows, prompts):
        node = tree
        for depth, token in enumerate(row[:-1]):  # nothing follows the last token, so it need not be read
            if token not in node:
                node[token] = {}
                tokens, pairs = tokens + 1, pairs + depth + 1
            node = node[token]
        scored += len(row) - prompt
    return Load(tokens, pairs, scored)


def bidirectional(lengths: Iterable[int]) -> Load:
    """Texts whose every token sees every other."""
    known = list(lengths)
    return Load(sum(known), sum(n * n for n in known))


def forward(shape: Shape, load: Load, rank: int = 0) -> float:
    """One pass without gradient."""
    linear = shape.body + (shape.adapter(rank) if rank else 0)
    return 2.0 * load.tokens * linear + _attention(shape, load) + _head(shape, load)


def adapter_step(shape: Shape, load: Load, rank: int) -> float:
    """Forward and backward with everything frozen but LoRA: a frozen layer hands the gradient back, the adapter's take theirs as well.

    Nothing trains before the first block, so its three layers that read the embeddings hand nothing back."""
    linear = 4.0 * shape.body + 6.0 * shape.adapter(rank) - 2.0 * sum((out + rank) * into for out, into in shape.linears[:3])
    return load.tokens * linear + 3 * _attention(shape, load) + 2 * _head(shape, load)


def full_step(shape: Shape, load: Load) -> float:
    """Forward and backward with every weight trained."""
    return 3 * forward(shape, load)


def _attention(shape: Shape, load: Load) -> float:
    """Scores and weighted sums; backward each of the two products has two."""
    return 2.0 * 2 * load.pairs * shape.layers * shape.heads * shape.head_width


def _head(shape: Shape, load: Load) -> float:
    return 2.0 * load.scored * shape.width * shape.vocabulary
