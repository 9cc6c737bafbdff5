"""UL2: Unifying Language Learning Paradigms (paper 73)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from luthier.catalog import register
from luthier.core.batch import Sequence
from luthier.core.chat import edges
from luthier.core.vocabulary import add_tokens
from luthier.errors import ModelError, RecipeError
from luthier.objective import Supervised

if TYPE_CHECKING:
    from luthier.core.batch import Batch
    from luthier.core.context import Context
    from luthier.core.families import Family


class Denoiser(NamedTuple):
    """Mean span length, share of the tokens that is hidden, and whether it is one span at the end."""

    mode: str
    span: float
    rate: float
    at_end: bool = False


DENOISERS = (
    Denoiser("R", 3, 0.15), Denoiser("R", 8, 0.15), Denoiser("S", 0, 0.25, at_end=True),
    Denoiser("X", 3, 0.5), Denoiser("X", 8, 0.5), Denoiser("X", 64, 0.15), Denoiser("X", 64, 0.5),
)  # fmt: skip
MODES = ("R", "S", "X")


def spans(length: int, denoiser: Denoiser, rng: np.random.Generator) -> np.ndarray:
    """[length] the number of the span that hides each token, -1 where it is kept.

    N = round(length * rate) tokens are hidden in n = round(N / mean span) spans, both at least 1 and such that at least as many tokens are
    kept as there are spans. Hidden and kept tokens are each cut into n random positive parts (T5's random segmentation, every cut
    equally likely), which alternate beginning with a kept one. One span at the end for the sequential denoiser."""
    hidden, number = _sizes(length, denoiser)
    gaps, holes = (_segments(total, number, rng) for total in (length - hidden, hidden))
    parts = np.stack([gaps, holes], 1).reshape(-1)
    marks = np.stack([np.full(number, -1), np.arange(number)], 1).reshape(-1)
    return np.repeat(marks, parts)


def _sizes(length: int, denoiser: Denoiser) -> tuple[int, int]:
    """How many tokens are hidden, in how many spans; halves go to the even number, as T5's do."""
    hidden = min(max(1, round(length * denoiser.rate)), length - 1)
    if denoiser.at_end:
        return hidden, 1
    return hidden, min(max(1, round(hidden / denoiser.span)), hidden, length - hidden)


def _segments(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """A random composition of `total` into positive parts, all compositions equally likely."""
    cuts = np.sort(rng.permutation(total - 1)[: parts - 1]) + 1
    return np.diff(cuts, prepend=0, append=total)


def rolled(span: np.ndarray, by: int) -> np.ndarray:
    """The same holes, moved on by so many tokens and round the end, numbered anew from the left; one that lies across the end is two."""
    hidden = np.roll(span >= 0, by)
    starts = hidden & ~np.concatenate([[False], hidden[:-1]])
    return np.where(hidden, np.cumsum(starts) - 1, -1)


def mixture_of_denoisers(ids: Any, span: np.ndarray, sentinels: SequenceOf[int], mark: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, targets): in the inputs every span is one sentinel, the targets are each sentinel followed by its span.

    `span` is what `spans` gives. Without `mark` (the sequential denoiser) there are no sentinels: the targets continue the inputs."""
    ids = np.asarray(ids, dtype=np.int64)
    if not mark:
        return ids[span < 0], ids[span >= 0]
    first = np.concatenate([[True], span[1:] != span[:-1]]) & (span >= 0)
    sign = np.asarray(sentinels, dtype=np.int64)[span]
    inputs = np.where(first, sign, ids)[(span < 0) | first]
    targets = np.insert(ids, np.flatnonzero(first), sign[first])[np.insert(span, np.flatnonzero(first), 0) >= 0]
    return inputs, targets


def expanded(inputs: np.ndarray, targets: np.ndarray, sentinels: SequenceOf[int]) -> np.ndarray:
    """The sequence that `inputs` and `targets` were made of: every sentinel replaced by what follows it in the targets."""
    marks = {int(s) for s in sentinels}
    if not any(int(i) in marks for i in inputs):
        return np.concatenate([inputs, targets])
    filled: dict[int, list[int]] = {}
    held: list[int] = []
    for token in map(int, targets):
        if token in marks:
            held = filled.setdefault(token, [])
        else:
            held.append(token)
    return np.array([t for i in map(int, inputs) for t in (filled.get(i, []) if i in marks else [i])], dtype=np.int64)


@register("mixture-of-denoisers", paper=73)
@dataclass
class MixtureOfDenoisers(Supervised):
    """Train on a mixture of span corruption, extreme corruption and prefix continuation, each named by a mode token that is chosen again at use.

    Continued training on plain text (`text` rows) gives a causal model infilling and better representations (UL2R: about 0.1 % of the
    pre-training tokens). Every visit of a row draws one of seven denoisers (mode: mean span mu, rate r):

        R (3, 0.15) (8, 0.15)      S one span of a quarter of the row, at its end      X (3, 0.5) (8, 0.5) (64, 0.15) (64, 0.5)

    evenly, or the modes by `shares` and evenly within a mode (UL2R: {S: 0.5, R: 0.25, X: 0.25}). round(L r) tokens in round(L r / mu) spans are
    hidden; the model reads [mode] inputs with a sentinel for every span and learns <X_0> span_0 <X_1> span_1 ... <end>. The loss is a mean over
    target tokens, as in T5, so that X weighs more than R. It only prepares the batch, so it composes with any supervised loss in the list.

    Afterwards begin prompts with the mode token that fits the task ([S] to continue, [R] to understand, [X] for long answers; choose on
    validation rows): the tokenizer knows the tokens. In a model that never trained with them they silently hurt.

    Decided here: the sequential denoiser writes no sentinel, as T5's prefix language modelling does, so that "[S] prompt" is continued at once; a
    fresh denoiser at every visit instead of once per row; `attention: causal` by default, since every tool generates causally from a
    saved decoder (`prefix` is the paper's decoder: inputs see each other in both directions, in training and wherever rows are scored as
    such). New tokens start at random like ordinary words; under a frozen embedding they stay there, so LoRA learns them less well."""

    shares: dict[str, float] | None = None
    """Probability of each mode R, S, X; default: all seven denoisers alike, which is R 2/7, S 1/7, X 4/7."""
    mode_tokens: bool = True
    """Begin the inputs with the token of the denoiser's mode."""
    attention: Literal["causal", "prefix"] = "causal"
    """causal: as the model is used; prefix: the inputs see each other in both directions."""
    length: int | None = None
    """Longer rows are cut to a random window of so many tokens; default: 512, or what fits the model's positions."""
    roll: bool = False
    """Move the spans of each visit on by a random number of tokens. Without it, as in T5, the last span is always the end of the row, and where
    one span is enough (rows of less than about 50 tokens) the model never learns to fill a gap before other words."""
    sentinel: str = "<extra_id_{}>"
    """The sentinel tokens; {} is the number of the span."""
    mode_token: str = "[{}]"
    """The mode tokens; {} is R, S or X."""
    _sentinels: list[int] = field(default_factory=list, init=False, repr=False)
    _modes: dict[str, int] = field(default_factory=dict, init=False, repr=False)

    columns = (frozenset({"text"}),)  # type: ignore[assignment]
    toy = {"length": 16}

    def __post_init__(self) -> None:
        wrong = [m for m in self.shares or {} if m not in MODES]
        if wrong:
            raise RecipeError(f"shares names the mode '{wrong[0]}'; the modes are R, S and X.")
        if self.shares is not None and (min(self.shares.values(), default=-1) < 0 or sum(self.shares.values()) <= 0):
            raise RecipeError(f"shares is {self.shares}; give each mode a probability of at least 0, and one of them more.")
        if self.attention not in ("causal", "prefix"):
            raise RecipeError(f"attention is '{self.attention}'; it must be 'causal' or 'prefix'.")
        if self.length is not None and self.length < 2:
            raise RecipeError(f"length is {self.length}; a row needs 2 tokens to hide one and keep one.")
        for name in ("sentinel", "mode_token"):
            if "{}" not in getattr(self, name):
                raise RecipeError(f"{name} is '{getattr(self, name)}'; it must contain {{}}, where the number or the mode stands.")

    def probabilities(self) -> np.ndarray:
        """The probability of each of `DENOISERS`."""
        if self.shares is None:
            return np.full(len(DENOISERS), 1 / len(DENOISERS))
        number = {m: sum(d.mode == m for d in DENOISERS) for m in MODES}
        p = np.array([self.shares.get(d.mode, 0.0) / number[d.mode] for d in DENOISERS])
        return p / p.sum()

    def attach(self, model: Family, ctx: Context | None = None) -> None:
        """Add sentinels, as many as the longest row needs, and mode tokens, to the model and to references that share its tokenizer."""
        limit = self.limit(model)
        used = [d for d, p in zip(DENOISERS, self.probabilities()) if p > 0 and not d.at_end]
        needed = max((_sizes(n, d)[1] + self.roll for d in used for n in range(2, limit + 1)), default=0)
        words = [self.sentinel.format(i) for i in range(needed)] + [self.mode_token.format(m) for m in MODES if self.mode_tokens]
        before = set(model.processor.get_vocab()) - set(words)
        found = add_tokens(model, words)
        self._sentinels, self._modes = found[:needed], dict(zip(MODES, found[needed:]))
        generation = getattr(model.base_network, "generation_config", None)
        if generation is not None and self._modes:  # they are read, never written
            generation.suppress_tokens = sorted({*(generation.suppress_tokens or []), *self._modes.values()})
        for name, held in list(ctx.models.items()) if ctx is not None else []:
            known = partial(_extended, words, before)
            ctx.models[name] = known(held) if hasattr(held, "network") else partial(_loaded, held, known)  # type: ignore[union-attr]

    def limit(self, model: Family) -> int:
        """The longest window: what `length` says, or 512 tokens or fewer that fit the model's positions with sentinels and mode token."""
        config = model.config
        room = next((int(n) for a in ("max_position_embeddings", "n_positions") if isinstance(n := getattr(config, a, None), int)), None)
        wanted = self.length or 512
        if room is None:
            return wanted
        used = [d for d, p in zip(DENOISERS, self.probabilities()) if p > 0]
        fits = max((n for n in range(2, wanted + 1) if n + max(2 * (_sizes(n, d)[1] + self.roll) for d in used) + 4 <= room), default=0)
        if fits < 2 or (self.length is not None and fits < self.length):
            raise RecipeError(f"length {wanted} with sentinels is more than the model's {room} positions; set length to {max(2, fits)}.")
        return fits

    def prepare(self, batch: Batch, ctx: Context | None) -> Batch:
        """Every sequence of the batch denoised anew. Rows of fewer than two tokens stay as they are."""
        if ctx is None or ctx.current is None:
            raise ModelError("mixture-of-denoisers needs the model's tokenizer; pass a context with the model, after attach(model, ctx).")
        if not self._sentinels and not self._modes:
            self.attach(ctx.current, ctx)
        rng, limit, tokenizer = ctx.numpy("mixture-of-denoisers"), self.limit(ctx.current), ctx.current.processor
        lead, ends = edges(tokenizer)[0], ctx.current.end_ids() if hasattr(ctx.current, "end_ids") else []
        p = self.probabilities()
        made = []
        for s in batch.sequences:
            denoiser = DENOISERS[int(rng.choice(len(DENOISERS), p=p))]
            made.append(self._denoised(s, denoiser, lead, ends, limit, rng))
        return replace(batch, sequences=made, touched=True)

    def _denoised(self, s: Sequence, denoiser: Denoiser, lead: np.ndarray, ends: SequenceOf[int], limit: int, rng: np.random.Generator) -> Sequence:
        body = s.ids
        head = lead if len(lead) and np.array_equal(body[: len(lead)], lead) else lead[:0]
        tail = body[-1:] if len(body) and int(body[-1]) in ends else body[:0]
        body = body[len(head) : len(body) - len(tail)]
        if len(body) > limit:
            at = int(rng.integers(0, len(body) - limit + 1))
            body = body[at : at + limit]
        if len(body) < 2:
            return s
        hidden = spans(len(body), denoiser, rng)
        if self.roll and not denoiser.at_end:
            hidden = rolled(hidden, int(rng.integers(len(body))))
        inputs, targets = mixture_of_denoisers(body, hidden, self._sentinels or [0], mark=not denoiser.at_end)
        mode = [self._modes[denoiser.mode]] if self._modes else []
        source = np.concatenate([head, np.array(mode, np.int64), inputs])
        ids = np.concatenate([source, targets, tail])
        two_way = len(source) if self.attention == "prefix" else 0
        return Sequence(ids, np.arange(len(ids)) >= len(source), row=s.row, branch=s.branch, prefix=two_way, data={"mode": denoiser.mode})

    def state_dict(self) -> dict[str, Any]:
        return {"sentinels": list(self._sentinels), "modes": dict(self._modes)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sentinels, self._modes = [int(i) for i in state["sentinels"]], {k: int(v) for k, v in state["modes"].items()}


def _loaded(loader: Callable[[], Family], known: Callable[[Family], Family]) -> Family:
    return known(loader())


def _extended(words: SequenceOf[str], before: set[str], frozen: Family) -> Family:
    """A frozen model of the same tokenizer learns the tokens as well; any other one stays as it is."""
    vocabulary: Mapping[str, int] = frozen.processor.get_vocab() if hasattr(frozen.processor, "get_vocab") else {}
    if set(vocabulary) - set(words) == before:
        add_tokens(frozen, words)
    return frozen
