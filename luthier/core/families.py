"""Families: what kind of model this is, behind the same verbs.

A family wraps a network (a transformers model, maybe inside a peft one) and its processor. Methods call verbs (`score`,
`generate`, `embed`, `classify` ...) and ask `verbs` what a family can do. Other modalities derive from `Family`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from luthier.core.batch import Batch, Sequence, TokenForest
from luthier.core.ranks import spread
from luthier.core.scores import TokenScores
from luthier.core.tree_attention import attach
from luthier.errors import ModelError

T = TypeVar("T")


@dataclass
class Decode:
    """How answers are drawn. temperature 0 is greedy."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[int, ...] = ()
    """Token ids that end an answer, besides the tokenizer's end of sequence."""
    processors: list[Any] = field(default_factory=list)
    """transformers LogitsProcessors."""


@dataclass
class Answer:
    """One generated answer."""

    ids: np.ndarray
    """The new tokens, the end token included if it was reached."""
    text: str
    finished: bool
    """An end token was produced (else the answer was cut at the limit)."""
    info: dict[str, Any] = field(default_factory=dict)


class Family:
    """A network with its processor. `kind` is what methods name in `families`."""

    kind: ClassVar[str]
    verbs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, network: nn.Module, processor: Any, source: str = "") -> None:
        self.network: Any = network
        self.processor, self.source = processor, source
        self.modules: dict[str, nn.Module] = {}
        """Trainable parts that belong to plug-ins (heads, projections), by name; filled from `Parts.modules`."""
        self.referring = False
        """Its adapters are switched off just now, to speak as the reference."""
        self.notices: list[str] = []
        """What the user should know about this model, found when it was loaded."""

    # verbs --------------------------------------------------------------------------------------------------------
    def score(self, batch: Batch | SequenceOf[Sequence]) -> TokenScores:
        """Teacher-forced scores of the supervised tokens."""
        raise self._cannot("score")

    def generate(self, prompts: SequenceOf[Any], decode: Decode | None = None, n: int = 1) -> list[list[Answer]]:
        """`n` answers to every prompt."""
        raise self._cannot("generate")

    def embed(self, items: Any, branch: str | None = None) -> Tensor:
        """One vector an item, not normalised."""
        raise self._cannot("embed")

    def classify(self, batch: Batch) -> Tensor:
        """[rows, classes] logits."""
        raise self._cannot("classify")

    def features(self, batch: Batch) -> Tensor:
        """[rows, d] what the classification head sees."""
        raise self._cannot("features")

    def cross(self, batch: Batch) -> Tensor:
        """One joint score a pair."""
        raise self._cannot("cross")

    def denoise(self, batch: Batch) -> Tensor:
        raise self._cannot("denoise")

    def _cannot(self, verb: str) -> ModelError:
        return ModelError(f"A model of the family '{self.kind}' cannot '{verb}'. It can: {', '.join(sorted(self.verbs))}.")

    # data -----------------------------------------------------------------------------------------------------------
    def collate(self, rows: SequenceOf[Mapping[str, Any]], ids: Any = None, train_on: str = "completion") -> Batch:
        """Rows to a batch, by their columns (see core/rows.py)."""
        raise NotImplementedError

    # weights ----------------------------------------------------------------------------------------------------------
    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    @property
    def base_network(self) -> Any:
        """The transformers model itself, without a peft shell."""
        network = self.network
        return network.get_base_model() if hasattr(network, "get_base_model") else network

    @property
    def config(self) -> Any:
        return getattr(self.base_network, "config", None)

    def all_modules(self) -> nn.ModuleDict:
        """The network and the plug-ins' modules, for train/eval, devices and checkpoints."""
        return nn.ModuleDict({"network": self.network, **{f"part_{k}": m for k, m in self.modules.items()}})

    def train(self, mode: bool = True) -> Family:
        self.network.train(mode)
        for module in self.modules.values():
            module.train(mode)
        return self

    def eval(self) -> Family:
        return self.train(False)

    @contextmanager
    def evaluating(self, grad: bool = False) -> Iterator[Family]:
        """Eval mode, without gradient unless asked; every module's mode is put back afterwards."""
        modes = [(m, m.training) for root in (self.network, *self.modules.values()) for m in root.modules()]
        self.eval()
        try:
            with torch.set_grad_enabled(grad):
                yield self
        finally:
            for module, mode in modes:
                module.training = mode

    def enter(self, forward: Callable[[], T]) -> T:
        """Run a pass that starts below the network's own forward, where sharded weights would not be gathered of themselves."""
        way = getattr(self.network, "enter", None)
        return forward() if way is None else way(forward)

    @property
    def shares(self) -> bool:
        """Whether tokens that several sequences begin with are computed once, as things are."""
        return False

    def dropout_active(self) -> bool:
        return any(m.training and m.p > 0 for m in self.network.modules() if isinstance(m, nn.Dropout))

    def frozen_copy(self) -> Family:
        """The same model in its own memory, in eval mode, without gradients."""
        twin = copy.copy(self)
        twin.network = copy.deepcopy(self.network).eval().requires_grad_(False)
        twin.modules = {k: copy.deepcopy(m).eval().requires_grad_(False) for k, m in self.modules.items()}
        return twin


class CausalLM(Family):
    """Decoder-only language models."""

    kind = "causal-lm"
    verbs = frozenset({"score", "generate", "embed", "options"})

    def __init__(self, network: nn.Module, processor: Any, source: str = "", can_share: bool = True) -> None:
        super().__init__(network, processor, source)
        self.can_share = can_share
        """Whether rows that share a prefix may share its tokens; decided by `core.models.probe` at load time."""

    @property
    def tokenizer(self) -> Any:
        return self.processor

    @property
    def shares(self) -> bool:
        return self.can_share and not self.is_prompted and not self.dropout_active()

    @property
    def decoder(self) -> Any:
        """The network below the language-model head."""
        return self.base_network.base_model

    @property
    def is_prompted(self) -> bool:
        """peft adds virtual tokens, so its own forward must run and rows cannot share."""
        if not hasattr(self.network, "get_base_model") or getattr(self.network, "_adapters_disabled", False):
            return False
        return any(getattr(self.network.peft_config[a], "is_prompt_learning", False) for a in self.network.active_adapters)

    @property
    def head(self) -> Any:
        from luthier.core.scores import Head

        config = self.config
        scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
        return Head(self.base_network.get_output_embeddings(), scale, getattr(config, "final_logit_softcapping", None))

    def forest(self, sequences: SequenceOf[Sequence]) -> TokenForest:
        width = int(getattr(self.config, "hidden_size", None) or 576)
        apart = self.config._attn_implementation == "sdpa" and getattr(self.config, "sliding_window", None) is None  # see tree_attention
        limit, dear = (2048, 10 * width) if apart else (512, 5 * width // 2)
        return TokenForest.pack(sequences, share=self.shares, limit=limit, pad=self.pad_id, dear=max(64, dear))

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id if self.tokenizer is not None else None
        return 0 if pad is None else int(pad)

    def score(self, batch: Batch | SequenceOf[Sequence]) -> TokenScores:
        sequences = batch.sequences if isinstance(batch, Batch) else list(batch)
        forest = self.forest(sequences)
        hidden = self.hidden(forest)
        source = forest.source.to(hidden.device)
        return TokenScores(
            hidden.flatten(0, 1)[source], self.head, forest.target.to(hidden.device), forest.sequence.to(hidden.device), len(sequences)
        )

    def hidden(self, forest: TokenForest) -> Tensor:
        """[bins, length, d] the last hidden state, as the head sees it."""
        ids = forest.ids.to(self.device)
        if forest.prefixes and (self.is_prompted or not self.can_share):
            raise ModelError("This model takes no attention mask of our own, so no part of a row can be read in both directions; use causal attention.")
        if self.is_prompted:
            return self._hidden_behind_prompt(ids, torch.from_numpy(forest.nodes >= 0).to(self.device))
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        if not forest.is_flat or forest.prefixes:
            inputs |= {"position_ids": forest.positions.to(self.device), "attention_mask": self._masks(forest)}
        return self.enter(lambda: self.decoder(**inputs).last_hidden_state)

    def _masks(self, forest: TokenForest) -> Any:
        """Additive masks, one a layer type where the architecture mixes them."""
        config, dtype = self.config, self.dtype
        window = getattr(config, "sliding_window", None)
        kinds = set(getattr(config, "layer_types", None) or [])
        full = attach(forest.additive(dtype).to(self.device), forest, int(getattr(config, "hidden_size", None) or 576))
        if kinds and self._takes_mask_per_kind():
            return {k: forest.additive(dtype, window).to(self.device) if "sliding" in k else full for k in kinds}
        return forest.additive(dtype, window).to(self.device) if window is not None else full

    def _takes_mask_per_kind(self) -> bool:
        import inspect

        forward = inspect.unwrap(type(self.decoder).forward)
        return "causal_mask_mapping" in inspect.getsource(forward)

    def _hidden_behind_prompt(self, ids: Tensor, real: Tensor) -> Tensor:
        """peft's prompt learning: run its forward with the head replaced by the identity, drop the virtual positions."""
        projection = self.base_network.get_output_embeddings()
        forward = projection.forward
        projection.forward = lambda h: h
        try:
            out = self.network(input_ids=ids, attention_mask=real.long(), use_cache=False).logits
        finally:
            projection.forward = forward
        return out[:, -ids.shape[1] :]

    def generate(self, prompts: SequenceOf[Any], decode: Decode | None = None, n: int = 1, batch: int = 32) -> list[list[Answer]]:
        """`prompts` are id sequences or texts. Prompts of like length run together, left padded."""
        decode = decode or Decode()
        ids = [self._prompt_ids(p) for p in prompts]
        if any(len(i) == 0 for i in ids):
            raise ModelError("A prompt has no tokens; nothing can follow it.")
        answers: list[list[Answer]] = [[] for _ in ids]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        step = max(1, batch // n)
        with self.evaluating():
            for start in range(0, len(order), step):
                part = order[start : start + step]
                for i, found in zip(part, self._generate([ids[i] for i in part], decode, n)):
                    answers[i] = found
        return answers

    def _prompt_ids(self, prompt: Any) -> np.ndarray:
        if isinstance(prompt, str):
            prompt = self.tokenizer(prompt)["input_ids"]
        return np.asarray(prompt, dtype=np.int64)

    def end_ids(self) -> list[int]:
        """Every token that ends an answer."""
        generation = getattr(self.base_network, "generation_config", None)
        found: list[int] = []
        for ends in (getattr(self.tokenizer, "eos_token_id", None), getattr(generation, "eos_token_id", None)):
            found += [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        return sorted(set(found))

    def _generate(self, prompts: list[np.ndarray], decode: Decode, n: int) -> list[list[Answer]]:
        width = max(len(p) for p in prompts)
        ids = torch.full((len(prompts), width), self.pad_id)
        real = torch.zeros_like(ids)
        for i, p in enumerate(prompts):
            ids[i, width - len(p) :] = torch.from_numpy(p)
            real[i, width - len(p) :] = 1
        ends = sorted({*self.end_ids(), *decode.stop})
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if decode.temperature > 0:
            sampling = {"do_sample": True, "temperature": decode.temperature, "top_p": decode.top_p, "top_k": decode.top_k}
        from transformers import GenerationConfig, LogitsProcessorList

        config = GenerationConfig(
            max_new_tokens=decode.max_new_tokens, num_return_sequences=n if decode.temperature > 0 else 1,
            pad_token_id=self.pad_id, eos_token_id=ends or None, **sampling,
            suppress_tokens=getattr(self.base_network.generation_config, "suppress_tokens", None),
        )  # fmt: skip
        # transformers fills what is left open from the model's own defaults (penalties, sampling), which nobody asked for here; only its banned tokens stay.
        base, kept = self.base_network, self.base_network.generation_config
        base.generation_config = config
        try:
            out = self.network.generate(
                input_ids=ids.to(self.device), attention_mask=real.to(self.device), generation_config=config,
                logits_processor=LogitsProcessorList(decode.processors),
            )  # fmt: skip
        finally:
            base.generation_config = kept
        # Prompt learning with embeddings returns the new tokens only; all else returns the prompt as well.
        new = out[:, width:] if out.shape[1] >= width and torch.equal(out[0, :width].cpu(), ids[0]) else out
        found = [self._answer(row, ends) for row in new.cpu().numpy()]
        if decode.temperature <= 0:
            return [[a] * n for a in found]
        return [found[i * n : (i + 1) * n] for i in range(len(prompts))]

    def _answer(self, ids: np.ndarray, ends: list[int]) -> Answer:
        stops = np.flatnonzero(np.isin(ids, ends))
        finished = bool(len(stops))
        ids = ids[: stops[0] + 1] if finished else ids
        return Answer(ids, self.tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=True).strip(), finished)

    def embed(self, items: Any, branch: str | None = None) -> Tensor:
        """Mean of the last hidden state over each sequence's tokens. `items`: a batch, sequences or texts."""
        return spread(self._sequences(items, branch), self._means)

    def _means(self, sequences: SequenceOf[Sequence]) -> Tensor:
        forest = self.forest(sequences)
        hidden = self.hidden(forest)
        flat = hidden.flatten(0, 1)
        length = forest.ids.shape[1]
        return torch.stack([flat[torch.from_numpy(path + b * length).to(flat.device)].float().mean(0) for b, path in forest.slots])

    def _sequences(self, items: Any, branch: str | None) -> list[Sequence]:
        if isinstance(items, Batch):
            items = items.sequences if branch is None else [s for s in items.sequences if s.branch == branch]
        made = []
        for item in items:
            if isinstance(item, Sequence):
                made.append(item)
            else:
                ids = self._prompt_ids(item)
                made.append(Sequence(ids, np.zeros(len(ids), bool)))
        return made

    def options(self, prompts: SequenceOf[Any], options: SequenceOf[SequenceOf[Any]], how: str = "sum") -> list[Tensor]:
        """log p of every candidate answer given its prompt, one pass a prompt: they share its tokens."""
        sequences, sizes = [], []
        for prompt, candidates in zip(prompts, options):
            head = self._prompt_ids(prompt)
            sizes.append(len(candidates))
            for candidate in candidates:
                tail = self._option_ids(candidate)
                mask = np.zeros(len(head) + len(tail), bool)
                mask[len(head) :] = True
                sequences.append(Sequence(np.concatenate([head, tail]), mask, row=len(sizes) - 1, branch="option"))
        with self.evaluating():
            scores = self.score(sequences).rows("mean" if how == "mean" else "sum")
        return list(scores.split(sizes))

    def _option_ids(self, candidate: Any) -> np.ndarray:
        if isinstance(candidate, str):
            candidate = self.tokenizer(candidate, add_special_tokens=False)["input_ids"]
        return np.asarray(candidate, dtype=np.int64)

    def collate(self, rows: SequenceOf[Mapping[str, Any]], ids: Any = None, train_on: str = "completion") -> Batch:
        from luthier.core.rows import encode

        sequences = [s for i, row in enumerate(rows) for s in encode(row, self.tokenizer, train_on=train_on, row=i)]
        return Batch(list(rows), np.arange(len(rows)) if ids is None else np.asarray(ids, np.int64), sequences)
