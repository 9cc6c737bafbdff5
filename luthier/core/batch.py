"""Batches: token sequences and their forests, and tensors of other modalities.

A `Sequence` is one way through a row (its prompt and completion; one of its candidate answers). A `Batch` holds the sequences of
several rows. `TokenForest` lays sequences out so that those which begin alike share those tokens: a packed sequence with an
ancestor mask that makes it exactly equal to separate rows. Where that would save nothing every sequence lies in a bin of its own,
right padded, and a causal model needs no mask at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luthier.core.alike import common_beginning, fewest, ids_key, neighbours


@dataclass
class Sequence:
    """Token ids with what is supervised. `targets` may differ from `ids` (corrupted inputs, true labels)."""

    ids: np.ndarray
    """int64 input ids."""
    mask: np.ndarray
    """bool: this token is to be predicted from the tokens before it."""
    targets: np.ndarray | None = None
    """int64 labels; None: the ids themselves."""
    weight: np.ndarray | None = None
    """float32 per token; None: ones."""
    row: int = 0
    """Index of the row in its batch."""
    branch: str = "completion"
    """Which of the row's sequences: completion, prompt, chosen, rejected, option, rollout, anchor, positive, negative ..."""
    prefix: int = 0
    """So many tokens at the beginning see each other in both directions (a prefix language model); 0: every token sees what is before it."""
    data: dict[str, Any] = field(default_factory=dict)
    """More about it: scalars, or arrays with one value a supervised token (behaviour log-probs, advantages, entropies)."""

    def __post_init__(self) -> None:
        self.ids = np.asarray(self.ids, dtype=np.int64)
        self.mask = np.asarray(self.mask, dtype=bool)
        if self.ids.shape != self.mask.shape:
            raise ValueError(f"A sequence of {len(self.ids)} ids has a mask of {len(self.mask)}.")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def labels(self) -> np.ndarray:
        return self.ids if self.targets is None else self.targets

    @property
    def supervised(self) -> np.ndarray:
        """Positions that are predicted. The first token has nothing before it."""
        positions = np.flatnonzero(self.mask)
        return positions[positions > 0]


@dataclass
class Batch:
    """Some rows, ready for a model. Hooks replace it or edit copies; row ids and weights travel with it."""

    rows: list[Mapping[str, Any]]
    ids: np.ndarray
    """int64 row ids in the data set."""
    sequences: list[Sequence] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Other inputs and labels; the first dimension runs over the rows."""
    weights: Tensor | None = None
    """float32 per row; None: ones."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What a hook leaves for another; not split, passed on as it is."""
    touched: bool = False
    """A hook changed what the model sees, so cached scores of these rows do not apply."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def row_weights(self) -> Tensor:
        return torch.ones(len(self.rows)) if self.weights is None else self.weights.float()

    def of_branch(self, *branches: str) -> Batch:
        """The same rows with only the sequences of these branches."""
        return replace(self, sequences=[s for s in self.sequences if s.branch in branches])

    def take(self, indices: SequenceOf[int]) -> Batch:
        """Some of the rows, in the given order, renumbered."""
        index = [int(i) for i in indices]
        place = {old: new for new, old in enumerate(index)}
        kept = sorted((replace(s, row=place[s.row]) for s in self.sequences if s.row in place), key=lambda s: s.row)
        chosen = torch.as_tensor(index, dtype=torch.long)
        return replace(
            self,
            rows=[self.rows[i] for i in index],
            ids=self.ids[index],
            sequences=kept,
            tensors={k: v[chosen.to(v.device)] for k, v in self.tensors.items()},
            weights=None if self.weights is None else self.weights[chosen],
        )

    def with_weights(self, weights: Any) -> Batch:
        """Multiply the row weights; rows of weight 0 leave."""
        w = self.row_weights * torch.as_tensor(weights, dtype=torch.float32)
        kept = torch.nonzero(w != 0).flatten().tolist()
        return replace(self, weights=w).take(kept)

    def counts(self) -> dict[str, float]:
        """The denominators of the standard terms: supervised tokens and rows, each times its weights."""
        w = self.row_weights.numpy()
        tokens = sum(
            float(w[s.row]) * (len(s.supervised) if s.weight is None else float(s.weight[s.supervised].sum())) for s in self.sequences
        )
        return {"token": tokens, "row": float(w.sum())}

    def token_weights(self) -> Tensor:
        """One weight for every supervised token, in the order of TokenScores: row weight times token weight."""
        w = self.row_weights.numpy()
        parts = [
            np.full(len(p), w[s.row], np.float32) if s.weight is None else s.weight[p].astype(np.float32) * w[s.row]
            for s in self.sequences
            for p in (s.supervised,)
        ]
        return torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(0)

    def gather(self, key: str) -> Tensor:
        """A `data` entry of all sequences in the order of TokenScores (per-token arrays), or one value a sequence (scalars)."""
        values = [s.data[key] for s in self.sequences]
        if values and np.ndim(values[0]) > 0:
            return torch.from_numpy(np.concatenate([np.asarray(v, np.float32) for v in values]))
        return torch.tensor([float(v) for v in values])

    def split(self, tokens: int | None, together: Callable[[Batch], list[list[int]]] | None = None, share: bool = False) -> list[Batch]:
        """Micro-batches of at most about `tokens` tokens (padding included), about equally full, rows of like length together.

        The order is a pure function of the batch. `together` lists groups of rows that may not be separated. `share`: the model lays
        sequences out in a forest, so what they have in common counts once, and groups that begin alike come one after the other."""
        groups = together(self) if together else [[i] for i in range(len(self))]
        if tokens is None or len(groups) <= 1:
            return [self]
        width = np.zeros(len(self), dtype=np.int64)
        number = np.zeros(len(self), dtype=np.int64)
        for s in self.sequences:
            width[s.row] = max(width[s.row], len(s))
            number[s.row] += 1
        for value in self.tensors.values():
            number = np.maximum(number, 1)
            width = np.maximum(width, int(np.prod(value.shape[1:])) if value.ndim > 2 else 1)
        widest = [max(width[i] for i in group) for group in groups]
        order = sorted(range(len(groups)), key=lambda g: (widest[g], g))
        own = [(0, 0)] * len(order)
        if share and self.sequences and not self.tensors and not any(s.prefix for s in self.sequences):
            order, own = neighbours(groups, self.sequences, widest)
        micro = fewest(groups, order, own, width, number, tokens)
        return [self.take(sorted(m)) for m in micro]


@dataclass
class TokenForest:
    """Sequences laid out in bins. Row order of `source`/`target` is sequence by sequence, token by token."""

    ids: Tensor
    """[bins, length] input ids, right padded."""
    positions: Tensor
    """[bins, length] position of each token in its own sequence."""
    nodes: np.ndarray
    """[bins, length] node of each token, -1 for padding."""
    ancestors: list[np.ndarray]
    """For each bin a bool matrix: [node, node] is an ancestor of it or itself."""
    slots: list[tuple[int, np.ndarray]]
    """For each sequence its bin and the packed position of each of its tokens."""
    source: Tensor
    """[n] flat position whose output predicts each supervised token."""
    target: Tensor
    sequence: Tensor
    """[n] which sequence each supervised token belongs to."""
    shared: int
    """Tokens that were not computed twice."""
    prefixes: list[int] = field(default_factory=list)
    """For each bin, how many tokens at its beginning see each other in both directions; empty: none anywhere."""

    @property
    def is_flat(self) -> bool:
        """Every sequence has a bin of its own: plain right-padded rows."""
        return len(self.slots) == len(self.ancestors)

    @classmethod
    def pack(
        cls, sequences: SequenceOf[Sequence], share: bool = True, limit: int = 512, pad: int = 0, min_gain: float = 0.1, dear: int = 1500
    ) -> TokenForest:
        """Lay sequences out in bins of at most `limit` tokens, those with a common beginning together, if that saves `min_gain` of the work.

        A token that also sees what comes after it cannot be shared, so sequences with a two-way prefix lie apart.
        `dear` is the bin length at which attention costs as much as all the rest."""
        if not sequences:
            raise ValueError("A forest of no sequences.")
        prefixes = [s.prefix for s in sequences] if any(s.prefix for s in sequences) else []
        bins = _group(sequences, limit, min_gain, dear) if share and not prefixes else [[i] for i in range(len(sequences))]
        built = [_grow([sequences[i].ids for i in members]) for members in bins]
        length = max(len(b.ids) for b in built)
        ids = np.full((len(built), length), pad, dtype=np.int64)
        positions = np.zeros_like(ids)
        nodes = np.full_like(ids, -1)
        slots: list[tuple[int, np.ndarray]] = [(0, np.zeros(0, np.int64))] * len(sequences)
        for b, (members, tree) in enumerate(zip(bins, built)):
            n = len(tree.ids)
            ids[b, :n], positions[b, :n], nodes[b, :n] = tree.ids, tree.positions, tree.nodes
            for place, i in enumerate(members):
                slots[i] = (b, tree.paths[place])
        source, target, owner = _targets(sequences, slots, length)
        total = sum(len(s) for s in sequences)
        return cls(
            torch.from_numpy(ids), torch.from_numpy(positions), nodes, [t.ancestors for t in built], slots,
            source, target, owner, total - sum(len(t.ids) for t in built), prefixes,
        )  # fmt: skip

    def rows(self) -> list[np.ndarray]:
        """Every sequence's ids back."""
        return [self.ids[b].numpy()[path] for b, path in self.slots]

    def allowed(self, window: int | None = None) -> Tensor:
        """[bins, 1, length, length] bool: which key each query may see. Padding sees itself only."""
        b, n = self.nodes.shape
        out = np.zeros((b, n, n), dtype=bool)
        position = self.positions.numpy()
        for i, family in enumerate(self.ancestors):
            node = self.nodes[i]
            real = node >= 0
            k = int(real.sum())
            seen = family[np.ix_(node[:k], node[:k])] & (position[i, None, :k] <= position[i, :k, None])
            if self.prefixes:
                seen[: self.prefixes[i], : self.prefixes[i]] = True
            if window is not None:
                seen &= np.abs(position[i, :k, None] - position[i, None, :k]) < window
            out[i, :k, :k] = seen
        out[:, np.arange(n), np.arange(n)] = True
        return torch.from_numpy(out)[:, None]

    def additive(self, dtype: torch.dtype, window: int | None = None) -> Tensor:
        """The mask as numbers to add to attention scores (a boolean mask is silently wrong under eager attention)."""
        return torch.zeros(1, dtype=dtype).masked_fill(~self.allowed(window), torch.finfo(dtype).min)

    def last(self) -> Tensor:
        """[sequences] flat position of each sequence's last token."""
        return torch.tensor([b * self.ids.shape[1] + int(path[-1]) for b, path in self.slots])


@dataclass
class _Tree:
    ids: np.ndarray
    positions: np.ndarray
    nodes: np.ndarray
    ancestors: np.ndarray
    paths: list[np.ndarray]


def _group(sequences: SequenceOf[Sequence], limit: int, min_gain: float, dear: int) -> list[list[int]]:
    """Bins of sequences: neighbours in lexicographic order share most, and bins about equally full pad least.

    Of several bin sizes that layout is taken which costs least, padding and attention included; if none saves `min_gain` of what
    separate rows cost, the rows stay separate."""
    order = sorted(range(len(sequences)), key=lambda i: (ids_key(sequences[i]), i))
    length = [len(sequences[i]) for i in order]
    common = [0, *(common_beginning(sequences[a].ids, sequences[b].ids) for a, b in pairwise(order))]
    total, longest = sum(length) - sum(common), max(length)

    def cost(bins: int, longest_bin: int) -> float:
        return bins * longest_bin * (1 + longest_bin / dear)

    best, layout = (1 - min_gain) * cost(len(order), longest), [[p] for p in range(len(order))]
    fewest = max(1, total // max(limit, longest))
    sizes = {max(longest, int(slack * total / (fewest + more))) for more in (0, 1, 2, 3, 5, 8, 13) for slack in (1.0, 1.1, 1.25)}
    for capacity in sorted(c for c in sizes if c <= max(limit, longest)):
        bins, fullest = _fill(length, common, capacity)
        if cost(len(bins), fullest) < best:
            best, layout = cost(len(bins), fullest), bins
    return [sorted(b) for b in sorted(([order[p] for p in members] for members in layout), key=min)]


def _fill(length: list[int], common: list[int], capacity: int) -> tuple[list[list[int]], int]:
    """Sequences (in lexicographic order) in bins of at most `capacity` tokens, and the tokens of the fullest.

    Runs of neighbours that share are cut where a bin would overflow; the pieces then go, the largest first, where there is room."""
    pieces: list[tuple[int, list[int]]] = []
    for place, (n, alike) in enumerate(zip(length, common)):
        if alike and pieces[-1][0] + n - alike <= capacity:
            pieces[-1] = (pieces[-1][0] + n - alike, [*pieces[-1][1], place])
        else:
            pieces.append((n, [place]))
    bins: list[tuple[int, list[int]]] = []
    for size, members in sorted(pieces, key=lambda p: (-p[0], p[1])):
        room = next((i for i, (used, _) in enumerate(bins) if used + size <= capacity), None)
        if room is None:
            bins.append((size, members))
        else:
            bins[room] = (bins[room][0] + size, bins[room][1] + members)
    return [members for _, members in bins], max(size for size, _ in bins)


def _grow(rows: list[np.ndarray]) -> _Tree:
    """The prefix tree of some id sequences, its nodes laid out so that a parent comes before its children."""
    if len(rows) == 1:
        n = len(rows[0])
        return _Tree(rows[0], np.arange(n), np.zeros(n, np.int64), np.ones((1, 1), bool), [np.arange(n)])
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    nodes: list[np.ndarray] = []
    parents: list[int] = []
    paths: list[list[np.ndarray]] = [[] for _ in rows]
    offset = 0
    stack: list[tuple[list[int], int, int]] = [(list(range(len(rows))), 0, -1)]
    while stack:
        members, depth, parent = stack.pop()
        first = rows[members[0]]
        stop = min(common_beginning(first, rows[m]) for m in members)
        if stop > depth:
            node = len(parents)
            parents.append(parent)
            ids.append(first[depth:stop])
            positions.append(np.arange(depth, stop))
            nodes.append(np.full(stop - depth, node))
            for m in members:
                paths[m].append(np.arange(offset, offset + stop - depth))
            offset += stop - depth
            parent = node
        children: dict[int, list[int]] = {}
        for m in members:
            if len(rows[m]) > stop:
                children.setdefault(int(rows[m][stop]), []).append(m)
        stack.extend((group, stop, parent) for group in reversed(children.values()))
    ancestors = np.zeros((len(parents), len(parents)), bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            ancestors[node] = ancestors[parent]
        ancestors[node, node] = True
    return _Tree(
        np.concatenate(ids), np.concatenate(positions), np.concatenate(nodes), ancestors, [np.concatenate(p) for p in paths]
    )


def _targets(sequences: SequenceOf[Sequence], slots: list[tuple[int, np.ndarray]], length: int) -> tuple[Tensor, Tensor, Tensor]:
    source, target, owner = [], [], []
    for i, (s, (b, path)) in enumerate(zip(sequences, slots)):
        positions = s.supervised
        source.append(b * length + path[positions - 1])
        target.append(s.labels[positions])
        owner.append(np.full(len(positions), i))
    return tuple(torch.from_numpy(np.concatenate(x).astype(np.int64)) for x in (source, target, owner))  # type: ignore[return-value]
