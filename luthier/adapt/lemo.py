"""LeMo: in long contexts, leave out of each layer the blocks of tokens that tell little."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from luthier.adapt._shared import LoraLike, calibration_rows
from luthier.catalog import register
from luthier.core.collect import passes
from luthier.core.modelmap import ModelMap
from luthier.errors import ModelError, RecipeError

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@torch.no_grad()
def block_scores(query: Tensor, key: Tensor, block: int, real: Tensor | None = None, visible: Tensor | None = None) -> Tensor:
    """A [rows, n, n]: the largest sum over heads of relu(Q K^T) in each pair of blocks, causal, the lower triangle mirrored.

    query, key [rows, heads, length, d]; `real` [rows, length]; `visible` [rows or 1, length, length] where more than causality hides.
    One stripe of queries at a time, so length x length is never held."""
    length = query.shape[2]
    n = -(-length // block)
    out = query.new_zeros(len(query), n, n, dtype=torch.float32)
    place = torch.arange(length, device=query.device)
    for i in range(n):
        rows, stop = slice(i * block, min(length, (i + 1) * block)), min(length, (i + 1) * block)
        part = torch.relu(query[:, :, rows] @ key[:, :, :stop].transpose(2, 3)).float().sum(1)
        seen = place[rows, None] >= place[None, :stop]
        if visible is not None:
            seen = seen & visible[:, rows, :stop]
        if real is not None:
            seen = seen & real[:, rows, None] & real[:, None, :stop]
        part = nn.functional.pad(part * seen, (0, (i + 1) * block - stop))
        out[:, i, : i + 1] = part.unflatten(2, (i + 1, block)).amax((1, 3))
    return out + out.tril(-1).transpose(1, 2)


def lemo(scores: Tensor, length: int, block: int, ratio: float = 0.5, threshold: float | None = None) -> Tensor | None:
    """The kept tokens [rows, k], in their order, from the scores of blocks [rows, n]; None where all are kept.

    The floor(ratio n) highest blocks of each row, one at least; or those with at least `threshold` times the row's highest score, as many in each row
    as the row with the most has. A last block that is not full always stays, so that all rows keep as many tokens."""
    n = scores.shape[1]
    ragged = n * block - length
    number = max(1, int(ratio * n + 1e-9))
    if threshold is not None:
        number = int((scores >= threshold * scores.amax(1, keepdim=True)).sum(1).max())
    if ragged:
        scores = scores.clone()
        scores[:, -1] = torch.inf
    if number >= n:
        return None
    kept = scores.topk(number, 1).indices.sort(1).values
    tokens = (kept[..., None] * block + torch.arange(block, device=scores.device)).flatten(1)
    return tokens[:, : number * block - ragged]


class Predictor(nn.Module):
    """Guesses A from hidden states: A^ = sum over heads of q^ k^T, where q^ and k^ are ReLU nets without bias on a head's share of a block,
    b d_h -> `hidden` -> b d_h -> d_h, the same two for all heads."""

    def __init__(self, heads: int, width: int, block: int, hidden: int = 128, rng: torch.Generator | None = None) -> None:
        super().__init__()
        self.heads, self.block, share = heads, block, width // heads
        sizes = [(block * share, hidden), (hidden, block * share), (block * share, share)]
        self.nets = nn.ParameterList(nn.Parameter(torch.randn(i, o, generator=rng) * (2 / i) ** 0.5) for _ in range(2) for i, o in sizes)

    def blocks(self, x: Tensor) -> Tensor:
        """[rows, length, d] -> [rows, heads, n, b d_h]; what is missing of the last block is 0."""
        x = nn.functional.pad(x, (0, 0, 0, -x.shape[1] % self.block))
        return x.unflatten(2, (self.heads, -1)).unflatten(1, (-1, self.block)).permute(0, 3, 1, 2, 4).flatten(3)

    def side(self, x: Tensor, net: int) -> Tensor:
        first, second, third = list(self.nets)[3 * net : 3 * net + 3]
        return torch.relu(torch.relu(x @ first) @ second) @ third

    def forward(self, x: Tensor) -> Tensor:
        split = self.blocks(x.to(self.nets[0].dtype))
        found = (self.side(split, 0) @ self.side(split, 1).transpose(2, 3)).sum(1).tril()
        return found + found.tril(-1).transpose(1, 2)

    @torch.no_grad()
    def shrink(self, samples: list[Tensor], rare: float) -> None:
        """Drop units of both hidden layers that are above 0 in no more than `rare` of the heads' blocks; one of each stays."""
        for net in (0, 3):
            first = [torch.relu(self.blocks(x) @ self.nets[net]) for x in samples]
            second = [torch.relu(x @ self.nets[net + 1]) for x in first]
            for at, found in ((net, first), (net + 1, second)):
                often = torch.cat([(x > 0).float().flatten(0, 2) for x in found]).mean(0)
                kept = often.topk(max(1, int((often > rare).sum()))).indices.sort().values
                self.nets[at], self.nets[at + 1] = nn.Parameter(self.nets[at][:, kept]), nn.Parameter(self.nets[at + 1][kept])


@dataclass
class Shared:
    """What the layers of one network have in common."""
    block: int
    ratio: float
    threshold: float | None
    mlp: bool
    scores: str
    pad: int
    on: bool = True
    real: Tensor | None = None
    """Which tokens of the pass are no padding."""

    def see(self, _decoder: Any, args: Any, kwargs: Any) -> None:
        """Padding is on the right: what follows the last token that is none."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        self.real = None if ids is None else (ids != self.pad).int().flip(1).cummax(1).values.flip(1).bool()


class Router:
    """Lets chosen tokens through one layer's attention and feed-forward net, each with its norm; the others pass by on the residual.

    The norms first see all tokens without graph, which is what tokens are chosen by; then the chosen ones with graph. All happens in
    hooks below the layer, which checkpointing runs again, and in bound methods, so that a copy of the network has routers of its own."""

    def __init__(self, block: Any, shared: Shared, predictor: Predictor | None = None) -> None:
        self.block, self.shared, self.predictor = block, shared, predictor
        self.entered: Tensor | None = None
        """What entered the norm, until its module is reached."""
        self.kept: Tensor | None = None
        self.length, self.looking = 0, False
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.register_forward_pre_hook(self.before_norm)
        block.self_attn.register_forward_pre_hook(self.before_attention, with_kwargs=True)
        block.self_attn.register_forward_hook(self.after_attention)
        block.mlp.register_forward_pre_hook(self.before_ffn)
        block.mlp.register_forward_hook(self.after_ffn)

    def before_norm(self, norm: Any, args: Any) -> Any:
        if self.looking:
            return None
        self.entered = self.kept = None
        routed = self.shared.mlp or norm is self.block.input_layernorm
        if not (routed and self.shared.on and self.block.training and torch.is_grad_enabled() and args[0].shape[1] > self.shared.block):
            return None
        self.entered, self.length = args[0], args[0].shape[1]
        return (args[0].detach(), *args[1:])

    def before_attention(self, _attention: Any, args: Any, kwargs: Any) -> Any:
        """The kept tokens keep their own positions; they are in order, so what is causal stays so."""
        entered, self.entered = self.entered, None
        if entered is None:
            return None
        x, rest = (args[0], args[1:]) if args else (kwargs["hidden_states"], ())
        kept = self.kept = None if kwargs.get("past_key_values") is not None else self._keep(self.scores(x, kwargs))
        new = {**kwargs, "hidden_states": self._normed(self.block.input_layernorm, entered)}
        if kept is None:
            return rest, new
        new["position_embeddings"] = tuple(take(t, kept) for t in kwargs["position_embeddings"])
        if isinstance(kwargs.get("position_ids"), Tensor):
            new["position_ids"] = kwargs["position_ids"].expand(len(kept), -1).gather(1, kept)
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 4:
            rows = torch.arange(len(kept), device=kept.device)[:, None, None]
            new["attention_mask"] = mask.expand(len(kept), -1, -1, -1)[rows, 0, kept[:, :, None], kept[:, None, :]][:, None]
        return rest, new

    def after_attention(self, _attention: Any, _args: Any, out: Any) -> Any:
        kept, self.kept = self.kept, None
        return None if kept is None else (self._back(out[0], kept), *out[1:])

    def before_ffn(self, _mlp: Any, args: Any) -> Any:
        """The blocks in which the net's units are most active."""
        entered, self.entered = self.entered, None
        if entered is None:
            return None
        self.kept = self._keep(self.activity(args[0]))
        return (self._normed(self.block.post_attention_layernorm, entered), *args[1:])

    def after_ffn(self, _mlp: Any, _args: Any, out: Tensor) -> Any:
        kept, self.kept = self.kept, None
        return None if kept is None else self._back(out, kept)

    def _normed(self, norm: Any, x: Tensor) -> Tensor:
        self.looking = True
        try:
            return norm(x if self.kept is None else take(x, self.kept))
        finally:
            self.looking = False

    def _back(self, out: Tensor, kept: Tensor) -> Tensor:
        """0 where a token was left out: the residual connection leaves it as it was."""
        full = out.new_zeros(len(out), self.length, out.shape[-1])
        return full.scatter(1, kept[..., None].expand(-1, -1, out.shape[-1]), out)

    def _keep(self, scores: Tensor) -> Tensor | None:
        s, real = self.shared, self.shared.real
        if real is not None and real.shape == (len(scores), self.length):
            padded = nn.functional.pad(real, (0, scores.shape[1] * s.block - self.length))
            scores = scores.masked_fill(~padded.unflatten(1, (-1, s.block)).any(2), -torch.inf)
        return lemo(scores, self.length, s.block, s.ratio, s.threshold)

    @torch.no_grad()
    def scores(self, x: Tensor, kwargs: Any) -> Tensor:
        """One score a block of normed states: how much attention it gives and takes, measured or guessed (or a control)."""
        blocks = -(-x.shape[1] // self.shared.block)
        if self.shared.scores == "recent":
            return torch.arange(1.0, blocks + 1, device=x.device).expand(len(x), -1)
        if self.shared.scores == "random":
            return torch.rand(len(x), blocks, device=x.device)
        pairs = self.pairs(x, kwargs) if self.predictor is None else self.predictor(x).clamp(min=0)
        return pairs.sum(1)

    def pairs(self, x: Tensor, kwargs: Any) -> Tensor:
        """A of normed states."""
        query, key = query_key(self.block.self_attn, x, *kwargs["position_embeddings"])
        mask, real = kwargs.get("attention_mask"), self.shared.real
        visible = None if not isinstance(mask, Tensor) or mask.ndim != 4 else (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2)[:, 0]
        return block_scores(query, key, self.shared.block, real if real is not None and real.shape == x.shape[:2] else None, visible)

    @torch.no_grad()
    def activity(self, x: Tensor) -> Tensor:
        """The sum of |act(gate) * up| over a block's tokens, a stretch at a time."""
        mlp, block = self.block.mlp, self.shared.block
        tokens = torch.cat([(mlp.act_fn(mlp.gate_proj(p)) * mlp.up_proj(p)).abs().float().sum(-1) for p in x.split(1024, 1)], 1)
        if self.shared.real is not None and self.shared.real.shape == tokens.shape:
            tokens = tokens * self.shared.real
        return nn.functional.pad(tokens, (0, -tokens.shape[1] % block)).unflatten(1, (-1, block)).sum(2)


def take(x: Tensor, kept: Tensor) -> Tensor:
    """Some tokens [rows, k] of [rows or 1, length, d]. By index: `gather` would keep all of x for its backward pass."""
    return x.expand(len(kept), -1, -1)[torch.arange(len(kept), device=kept.device)[:, None], kept]


def query_key(attention: Any, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, heads, length, d_h] as the layer itself makes them, rotated; keys repeated for the query heads that share them."""
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb  # type: ignore[attr-defined]
    query, key = (p(x).unflatten(-1, (-1, attention.head_dim)) for p in (attention.q_proj, attention.k_proj))
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    query, key = rotate(query.transpose(1, 2), key.transpose(1, 2), cos, sin)
    return query, key.repeat_interleave(query.shape[1] // key.shape[1], 1)


@register("lemo", paper=81, wraps="peft.LoraConfig")
@dataclass
class LeMo(LoraLike):
    """LoRA for long contexts in less memory: in each layer only the blocks of tokens that tell most are computed, the others pass by on
    the residual connection, so their activations are never stored.

    A sequence is cut into blocks of `block_size` tokens. A = maxpool(sum_heads relu(Q K^T)) over pairs of blocks, causal and mirrored; a
    block's score is its column's sum. Small predictors guess A from the layer's input; they are trained before the run on the
    frozen model and calibration rows (`calibration`, else training rows), by squared error, then shrunk and frozen. The `ratio` of blocks with the highest
    scores (or those above `threshold` times the highest) goes through norm and attention, gathered, with their own positions;
    the feed-forward net likewise keeps the blocks in which |act(gate) up| is largest. The first layers and the last are dense (the
    release: 15 of 32, and the last): in the last a label's token would lose its loss.

    Only training passes are routed: answers, evaluations and the exported LoRA are dense, since a column's sum looks at later
    tokens. Logits and loss are made in segments for every method here (`core.scores`), so s x V logits never exist. For Llama-like
    layers (Llama, Mistral, Qwen 2 and 3). Decided here: the feed-forward activity is computed, without graph, where the paper's predictor for it is not
    described; one ratio for all layers in place of the offline threshold search; a predictor's unit is dropped
    if it is 0 in 80 % of the blocks (the release's first limit); LoRA rank 8. `scores: oracle` measures A (dear), `random` and `recent` are controls. `report` holds each
    predictor's recall of the needed blocks on rows it did not see, and its size."""

    rank: int = 8
    """Rank of the update."""
    alpha: float = 16.0
    """The update is scaled by alpha / rank."""
    ratio: float = 0.5
    """Share of the blocks that a layer keeps."""
    threshold: float | None = None
    """Keep the blocks with at least this share of the highest score, in place of a ratio."""
    block_size: int = 64
    """Tokens in a block."""
    first: int | None = None
    """How many layers stay dense at the beginning; default: 15 of 32."""
    mlp: bool = True
    """Whether the feed-forward nets leave tokens out, too."""
    scores: Literal["predictor", "oracle", "random", "recent"] = "predictor"
    """How blocks are judged."""
    hidden: int = 128
    """Width of the predictors before they are shrunk."""
    predictor_steps: int = 400
    """Steps of training for each predictor."""
    samples: int = 64
    """Rows they are trained on; every fourth is held out."""

    positive = ("rank", "alpha", "block_size", "hidden", "predictor_steps", "samples")
    families = frozenset({"causal-lm"})
    parallel = frozenset({"single", "ddp"})
    toy: ClassVar[dict[str, Any]] = {"block_size": 2, "first": 0, "predictor_steps": 3, "samples": 4, "hidden": 8}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.ratio <= 1:
            raise RecipeError(f"'ratio' is {self.ratio}; it must be above 0 and at most 1 (1: dense).")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise RecipeError(f"'threshold' is {self.threshold}; it must be above 0 and at most 1, or left out.")
        if self.first is not None and self.first < 0:
            raise RecipeError(f"'first' is {self.first}; it must be 0 or above.")
        self.report: dict[str, Any] = {}

    def after(self, model: Family, ctx: Context | None) -> None:
        blocks = [block for _, block in ModelMap(model.network).blocks]
        _check(blocks, model)
        first = 15 * len(blocks) // 32 if self.first is None else self.first
        chosen = list(range(first, len(blocks) - 1))
        if not chosen:
            raise RecipeError(f"'first' is {first} and the last layer is always dense, so none of the {len(blocks)} layers would leave tokens out; lower it.")
        self._shared = Shared(self.block_size, self.ratio, self.threshold, self.mlp, self.scores, model.pad_id)  # type: ignore[attr-defined]
        model.decoder.register_forward_pre_hook(self._shared.see, with_kwargs=True)  # type: ignore[attr-defined]
        self.routers = {i: Router(blocks[i], self._shared) for i in chosen}
        if self.scores == "predictor":
            self._learn(model, ctx)

    def export(self, model: Family, directory: Path) -> None:
        super().export(model, directory)
        self._shared.on = False  # what a later stage trains on this network is not routed

    def _learn(self, model: Family, ctx: Context | None) -> None:
        """Train one predictor a layer on what the frozen model does."""
        seen: dict[int, list[tuple[Tensor, Tensor]]] = {i: [] for i in self.routers}

        def watch(i: int, router: Router) -> Any:
            def hook(_attention: Any, args: Any, kwargs: Any) -> None:
                x = args[0] if args else kwargs["hidden_states"]
                if x.shape[1] > self.block_size:
                    seen[i].append((x.float(), router.pairs(x, kwargs)))

            return hook

        handles = [r.block.self_attn.register_forward_pre_hook(watch(i, r), with_kwargs=True) for i, r in self.routers.items()]
        try:
            with model.evaluating():
                for run, _ in passes(model, calibration_rows(ctx, self.samples, self.name), 1):
                    run()
        finally:
            for handle in handles:
                handle.remove()
        if not all(seen.values()):
            raise RecipeError(f"No calibration row is longer than one block of {self.block_size} tokens, so there is nothing to leave out; lower 'block_size', or use 'lora'.")
        rng = ctx.rng("lemo") if ctx is not None else torch.Generator().manual_seed(0)
        heads, width = ModelMap(model.network).heads.count, int(model.config.hidden_size)
        for i, router in self.routers.items():
            held = seen[i][::4]
            used = [pair for at, pair in enumerate(seen[i]) if at % 4] or held
            router.predictor = fit_predictor(Predictor(heads, width, self.block_size, self.hidden, rng).to(model.device), used, self.predictor_steps, rng)
            self.report[str(i)] = {"recall": recall(router.predictor, held, self.ratio), "hidden": int(router.predictor.nets[0].shape[1])}
        found = [r["recall"] for r in self.report.values()]
        if ctx is not None:
            ctx.notice(f"LeMo's predictors find {sum(found) / len(found):.0%} of the blocks that matter most, on rows they were not trained on.")

    def state_dict(self) -> dict[str, Any]:
        nets = {str(i): [p.detach() for p in r.predictor.nets] for i, r in self.routers.items() if r.predictor is not None}
        return {"report": self.report, "nets": nets}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.report = dict(state["report"])
        for i, nets in state["nets"].items():
            predictor = self.routers[int(i)].predictor
            assert predictor is not None
            predictor.nets = nn.ParameterList(nn.Parameter(p.to(predictor.nets[0]), requires_grad=False) for p in nets)


def fit_predictor(predictor: Predictor, seen: list[tuple[Tensor, Tensor]], steps: int, rng: torch.Generator | None = None, lr: float = 1e-3) -> Predictor:
    """Regress on A, in units of its mean, one sequence a step; then shrink and freeze."""
    scale = max(1e-12, float(torch.stack([a.mean() for _, a in seen]).mean()))
    optimizer = torch.optim.Adam(predictor.parameters(), lr=lr)
    with torch.enable_grad():
        for _ in range(steps):
            x, wanted = seen[int(torch.randint(len(seen), (), generator=rng))]
            loss = (predictor(x) - wanted / scale).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    predictor.shrink([x for x, _ in seen], 0.2)
    return predictor.requires_grad_(False)


@torch.no_grad()
def recall(predictor: Predictor, seen: list[tuple[Tensor, Tensor]], ratio: float) -> float:
    """The share of the blocks with the highest true scores that the guessed scores keep as well."""
    shares = []
    for x, wanted in seen:
        number = max(1, int(ratio * wanted.shape[1] + 1e-9))
        true, guess = (set(a.clamp(min=0).sum(1)[0].topk(number).indices.tolist()) for a in (wanted, predictor(x)))
        shares.append(len(true & guess) / number)
    return sum(shares) / max(1, len(shares))


def _check(blocks: list[Any], model: Family) -> None:
    needed = ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.act_fn")
    inside = [dict(b.named_modules()) for b in blocks]
    if any(n not in names for names in inside for n in needed) or any("pre_feedforward_layernorm" in names for names in inside):
        raise ModelError(f"LeMo knows the layers of Llama-like models; those of a {type(model.base_network).__name__} are built otherwise. Use 'lora' with gradient checkpointing.")
