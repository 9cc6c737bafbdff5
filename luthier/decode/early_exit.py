"""Early exit: answer with the first layers where they are sure, or let them draft for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from luthier.catalog import register
from luthier.core.exits import Segments, exit_depths
from luthier.decode import Decoder
from luthier.decode._shared import Answer, Decode, Wrapped, main_model
from luthier.decode.sample import sample
from luthier.errors import ModelError, RecipeError

if TYPE_CHECKING:
    from luthier.core.batch import TokenForest
    from luthier.core.context import Context
    from luthier.core.families import CausalLM, Family


def early_exit(logits: SequenceOf[Tensor], threshold: float) -> int:
    """The first exit whose largest probability exceeds the threshold; the last where none does. `logits`: each exit's [vocabulary]."""
    sure = (i for i, one in enumerate(logits) if float(one.float().softmax(-1).max()) > threshold)
    return next(sure, len(logits) - 1)


def accepted(draft: SequenceOf[int], drafted: Tensor, verified: Tensor, rng: torch.Generator | None = None) -> tuple[int, int]:
    """How many of the drafted tokens stand, and the token that follows them.

    `drafted` [g, V]: the distributions q that the draft was drawn from; `verified` [g + 1, V]: the full model's p at the same places
    and one more. Token x stands with probability min(1, p(x) / q(x)); the first that falls is replaced by a draw from (p - q)+,
    and if all stand one more is drawn from p: every token is then distributed as the full model's own. One-hot p and q are greedy."""
    for i, token in enumerate(draft):
        ratio = float(verified[i, token] / drafted[i, token].clamp(min=1e-30))
        if ratio < 1 and float(torch.rand((), generator=rng)) >= ratio:
            rest = (verified[i] - drafted[i]).clamp(min=0)
            return i, _draw(rest if float(rest.sum()) > 0 else verified[i], rng)
    return len(draft), _draw(verified[len(draft)], rng)


def _draw(p: Tensor, rng: torch.Generator | None) -> int:
    return int(torch.multinomial(p.float().cpu(), 1, generator=rng))


class Depths:
    """One text in the making: keys and values of every block, and the tokens that have not passed the deeper blocks yet.

    A token that exits at depth n leaves no keys above n. Its state is kept, and when a later token goes deeper, all that wait pass
    with it in one batch: keys and values are exactly those of a model that never exits."""

    def __init__(self, segments: Segments) -> None:
        from transformers import DynamicCache

        self.segments, self.cache = segments, DynamicCache()
        self.pieces = len(segments.pieces)
        self.waiting: list[list[Tensor]] = [[] for _ in range(self.pieces)]
        self.passed = [0] * self.pieces
        """How many tokens each piece has processed."""
        self.layers = 0
        """Blocks times tokens that were computed."""

    def read(self, ids: list[int]) -> None:
        """Tokens that follow."""
        self.waiting[0].append(torch.tensor([ids], device=self.segments.model.device))

    def through(self, piece: int) -> Tensor:
        """Let all that wait in front of a piece pass it; the states [m, d] as the head reads them."""
        entering = torch.cat(self.waiting[piece], 1)
        state, read = self.segments.run(piece, entering, self.cache, self.passed[piece])
        self.waiting[piece] = []
        self.passed[piece] += entering.shape[1]
        self.layers += entering.shape[1] * len(self.segments.pieces[piece])
        if piece + 1 < self.pieces:
            self.waiting[piece + 1].append(state)
        return read[0]

    def forget(self, length: int) -> None:
        """Only the first `length` tokens were right. Nothing may wait."""
        layers: list[Any] = list(self.cache.layers)
        for layer in layers:
            excess = layer.get_seq_length() - length
            if excess > 0:
                layer.crop(-excess)
        self.passed = [length] * self.pieces


class Exiting(Wrapped):
    """Generates with as many blocks as it takes."""

    def __init__(self, family: CausalLM, settings: EarlyExit) -> None:
        super().__init__(family)
        self.settings = settings
        depths = exit_depths(family, settings.exits)
        if settings.mode == "fixed":
            depths = [settings.depth or depths[0]]
        if settings.mode == "speculative":
            depths = sorted({depths[0], depths[-1]})
        exit_depths(family, depths, "depth")
        self.depths = depths
        self.segments = Segments(family, [0, *depths])
        Segments(family, sorted({0, *depths, len(self.segments.whole)})).check()

    def hidden(self, forest: TokenForest) -> Tensor:
        """A fixed depth holds for scores and options too."""
        if self.settings.mode != "fixed":
            return super().hidden(forest)
        with self.segments.only(0):
            return super().hidden(forest)

    def generate(self, prompts: SequenceOf[Any], decode: Decode | None = None, n: int = 1, batch: int = 32) -> list[list[Answer]]:
        """One text at a time, as each goes to depths of its own."""
        decode = decode or Decode()
        ids = [self._prompt_ids(p) for p in prompts]
        if any(len(i) == 0 for i in ids):
            raise ModelError("A prompt has no tokens; nothing can follow it.")
        rng = torch.Generator().manual_seed(int(torch.randint(2**62, (1,))))
        with self.evaluating():
            different = [[self._one(i, decode, rng) for _ in range(n if decode.temperature > 0 else 1)] for i in ids]
        return different if decode.temperature > 0 else [found * n for found in different]

    def _one(self, prompt: np.ndarray, decode: Decode, rng: torch.Generator) -> Answer:
        ends = sorted({*self.end_ids(), *decode.stop})
        text, made = Depths(self.segments), prompt.tolist()
        text.read(made)
        new: list[int] = []
        info: dict[str, Any] = {"depths": [], "drafted": 0, "accepted": 0}
        step = self._draft if self.settings.mode == "speculative" and len(self.depths) > 1 else self._next
        while len(new) < decode.max_new_tokens and not (new and new[-1] in ends):
            found = step(text, [*made, *new], lambda state, so_far: self._distribution(state, so_far, decode), rng, info)
            for token in found[: decode.max_new_tokens - len(new)]:
                new.append(token)
                if token in ends:
                    break
        answer = self._answer(np.asarray(new, dtype=np.int64), ends)
        answer.info |= {**info, "depths": info["depths"][: len(answer.ids)], "layers": text.layers}
        return answer

    def _distribution(self, state: Tensor, so_far: list[int], decode: Decode) -> tuple[Tensor, Tensor]:
        """What the head says of one state: the distribution that is drawn from, and the plain one."""
        logits = self.head(state[None])
        plain = logits[0].softmax(-1)
        if decode.processors:
            ids = torch.tensor([so_far], device=logits.device)
            for processor in decode.processors:
                logits = processor(ids, logits)
        for token in getattr(getattr(self.base_network, "generation_config", None), "suppress_tokens", None) or []:
            logits[:, token] = -torch.inf
        return sample(logits[0], decode.temperature, decode.top_p, decode.top_k).cpu(), plain

    def _next(self, text: Depths, so_far: list[int], head: Callable[..., Any], rng: torch.Generator, info: dict[str, Any]) -> list[int]:
        """One token, from the first exit that is sure."""
        piece = 0
        p, plain = head(text.through(0)[-1], so_far)
        while piece < len(self.depths) - 1 and float(plain.max()) <= self.settings.threshold:
            piece += 1
            p, plain = head(text.through(piece)[-1], so_far)
        info["depths"].append(self.depths[piece])
        token = _draw(p, rng)
        text.read([token])
        return [token]

    def _draft(self, text: Depths, so_far: list[int], head: Callable[..., Any], rng: torch.Generator, info: dict[str, Any]) -> list[int]:
        """The first piece drafts, the second reads the whole draft at once."""
        draft: list[int] = []
        drafted = []
        for _ in range(self.settings.draft):
            q, _ = head(text.through(0)[-1], [*so_far, *draft])
            drafted.append(q)
            draft.append(_draw(q, rng))
            text.read([draft[-1]])
        text.through(0)
        states = text.through(1)[-len(draft) - 1 :]
        verified = torch.stack([head(state, [*so_far, *draft[:i]])[0] for i, state in enumerate(states)])
        right, token = accepted(draft, torch.stack(drafted), verified, rng)
        text.forget(len(so_far) + right)
        text.read([token])
        info["drafted"] += len(draft)
        info["accepted"] += right
        info["depths"] += [self.depths[0]] * right + [self.depths[-1]]
        return [*draft[:right], token]


@register("early-exit", paper=106)
@dataclass
class EarlyExit(Decoder):
    """Spend fewer layers on easy tokens. For models trained with `objective: sorted-exits`, whose first layers can answer.

    dynamic: for every token go through the exits in order and stop at the first whose largest probability exceeds `threshold`; what the
    token would have left in the deeper layers' caches is computed later, when a token goes there, for all that wait at once, so that
    the caches are those of the full model (at threshold 1 all of it is the full model). speculative: the first exit drafts `draft`
    tokens, the full model reads them in one pass, sharing the keys and values of the first layers, and keeps those that it would have
    said itself; greedy answers are exactly the full model's, sampled ones are distributed as its own. fixed: the first `depth` layers
    alone, for scores and options as well.

    An answer's `info` tells the depth of every token, `layers` (blocks x tokens computed) and drafted and accepted tokens. One text at a
    time. Decided here: threshold 0.9 and drafts of 4 tokens (the paper tunes the first per task); a draft that stands whole brings one
    token more. Needs a decoder that runs in parts, which is tried when it is wrapped."""

    mode: Literal["dynamic", "speculative", "fixed"] = "dynamic"
    """How depth is chosen."""
    exits: list[int] = field(default_factory=list)
    """Numbers of blocks after which the model can answer; default: 30 % to 100 % in tenths, as in training. Speculative: the first drafts."""
    threshold: float = 0.9
    """dynamic: exit above this probability."""
    draft: int = 4
    """speculative: tokens drafted at a time."""
    depth: int | None = None
    """fixed: the number of blocks; default: the first exit."""

    families = frozenset({"causal-lm"})
    toy: ClassVar[dict[str, Any]] = {"exits": [1]}

    def __post_init__(self) -> None:
        if self.mode not in ("dynamic", "speculative", "fixed"):
            raise RecipeError(f"'mode' is {self.mode!r}; it must be 'dynamic', 'speculative' or 'fixed'.")
        if not self.threshold > 0:
            raise RecipeError(f"'threshold' is {self.threshold}; it is a probability above 0 (1: never exit).")
        if self.draft < 1 or (self.depth is not None and self.depth < 1) or any(n < 1 for n in self.exits):
            raise RecipeError(f"'draft', 'depth' and 'exits' count from 1; they are {self.draft}, {self.depth} and {self.exits}.")

    def wrap(self, models: Mapping[str, Family] | Family, ctx: Context | None = None) -> Family:
        family = main_model(models, "early-exit")
        if family.is_prompted:
            raise ModelError("'early-exit' runs the blocks one piece at a time, where prompt vectors have no place; tune with LoRA or all weights instead.")
        return Exiting(family, self)
