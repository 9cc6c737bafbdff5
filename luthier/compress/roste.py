"""RoSTE: supervised tuning with quantised weights, activations and cache, rotated only where that lowers the error of rounding."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from luthier.adapt._shared import calibration_rows, unwrapped, validate
from luthier.catalog import register
from luthier.compress import Compressor
from luthier.core.collect import passes
from luthier.core.context import seed_of
from luthier.core.plugin import Group, Parts, Step
from luthier.core.quant import Grid, Rotation, fake_quant, pack_codes, rounding_error, unpack_codes
from luthier.core.residual import Residual, rotate_inputs, rotate_outputs
from luthier.core.simulate import Site, release, release_attention, rounded, simulate, simulate_attention
from luthier.core.surgery import edit_optimizer
from luthier.core.tensorfile import open_checkpoint, write_file
from luthier.errors import RecipeError

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family

__all__ = ["RoSTE", "deployed", "load_packed", "roste"]

Pair = tuple[float, float]
STREAM = "residual"


# the mathematics ----------------------------------------------------------------------------------------------------------
def roste(shared: Pair, sites: Mapping[str, tuple[Pair, Pair]], rotate: str = "adaptive") -> tuple[dict[str, bool], float]:
    """Which rotations to apply, and the error E that they leave.

    `shared[r]`: the error of what only the stream's rotation R_1 decides, for R_1 = I and R_1 = H. `sites[name][r][h]`: that of one
    rotation inside a block, h = 0 for I and 1 for H, given r. E is a sum over sites for either R_1, so the least of all 2^(sites + 1)
    choices is: the best h for every site, for both R_1, and the better R_1."""
    tried = []
    for r in (False, True):
        own = {name: bool(costs[r][1] < costs[r][0]) if rotate == "adaptive" else rotate == "all" for name, costs in sites.items()}
        tried.append(({STREAM: r, **own}, shared[r] + sum(sites[name][r][h] for name, h in own.items())))
    if rotate != "adaptive":
        return tried[rotate == "all"]
    return tried[1] if tried[1][1] < tried[0][1] else tried[0]


# the network --------------------------------------------------------------------------------------------------------------
class Rotated:
    """A network whose norms are folded, with the rotations of its sites: R_1 in the stream; in every block R_2 on values, R_3 on
    queries and keys, R_4 before the down projection. R_1 and R_2 lie in the weights; R_3 and R_4 run, and R_4's transpose is in the weight."""

    def __init__(self, model: Family, method: RoSTE, seed: int) -> None:
        self.residual, self.method = Residual(model, "roste"), method
        self.untied = self.residual.untie()
        self.residual.fold_norms()
        width, dim, r = self.residual.width, self.residual.heads.dim, self.residual
        self.seed, self.stream = seed, Rotation(width, seed_of(seed, STREAM))
        self.value = [Rotation(dim, seed_of(seed, "value", i)) for i in range(len(r.blocks))]
        self.key = [Rotation(dim, seed_of(seed, "key", i)) for i in range(len(r.blocks))]
        self.down = [Rotation(b.down.in_features, seed_of(seed, "down", i)) for i, b in enumerate(r.blocks)]
        self.chosen = dict.fromkeys([STREAM, *(f"{k}.{i}" for i in range(len(r.blocks)) for k in ("value", "key", "down"))], False)
        bits = {"weight_bits": method.weights, "input_bits": method.activations, "weight_clip": method.weight_clip, "input_clip": method.activation_clip}
        self.layers = {name: m for name, m in r.network.named_modules() if any(m is x for b in r.blocks for x in (*b.readers, *b.writers))}
        for layer in self.layers.values():
            simulate(layer, Site(**bits))  # type: ignore[arg-type]
        self.caches = [Site(input_bits=method.cache, input_clip=method.cache_clip) for _ in r.blocks]
        simulate_attention(r.network, {b.attention: site for b, site in zip(r.blocks, self.caches)})

    def mark(self, chosen: Mapping[str, bool]) -> None:
        """Run what runs online; weights are as they must be already."""
        self.chosen = {name: bool(chosen[name]) for name in self.chosen}
        for i, block in enumerate(self.residual.blocks):
            self.caches[i].rotation = self.key[i] if self.chosen[f"key.{i}"] else None
            block.down.site.rotation = self.down[i] if self.chosen[f"down.{i}"] else None  # type: ignore[union-attr]

    def turn(self, chosen: Mapping[str, bool]) -> list[nn.Parameter]:
        """Fold rotations in or out until those of `chosen` are there; the parameters that this changed."""
        old, touched = dict(self.chosen), []
        if old[STREAM] != chosen[STREAM]:
            self.residual.rotate(self.stream, back=old[STREAM])
            touched += [self.residual.embedding, self.residual.head, *self.layers.values()]
        for i, block in enumerate(self.residual.blocks):
            if old[f"value.{i}"] != chosen[f"value.{i}"]:
                rotate_outputs(block.value, self.value[i], old[f"value.{i}"])
                rotate_inputs(block.output, self.value[i], old[f"value.{i}"])
                touched += [block.value, block.output]
            if old[f"down.{i}"] != chosen[f"down.{i}"]:
                rotate_inputs(block.down, self.down[i], old[f"down.{i}"])
                touched.append(block.down)
        self.mark(chosen)
        return [p for module in touched for p in module.parameters(recurse=False)]

    def rounding(self, on: bool) -> None:
        for site in (*self.caches, *(m.site for m in self.layers.values())):
            site.on = on  # type: ignore[union-attr]

    # errors -------------------------------------------------------------------------------------------------------------
    def errors(self, model: Family, rows: list[Any]) -> tuple[Pair, dict[str, tuple[Pair, Pair]]]:
        """The surrogate E of the network without rotations, as `roste` takes it: of weights, and of activations a calibration row."""
        seen = _Seen(self)
        self.rounding(False)
        try:
            seen.run(model, rows)
        finally:
            self.rounding(True)
        shared, sites = [], {name: ([0.0, 0.0], [0.0, 0.0]) for name in self.chosen if name != STREAM}
        for r in (0, 1):
            shared.append(seen.of(STREAM, r) + sum(self._weight(layer, r) for b in self.residual.blocks for layer in b.readers if layer is not b.value))
            for i, block in enumerate(self.residual.blocks):
                for h in (0, 1):
                    own = self.value[i] if h else None
                    sites[f"value.{i}"][r][h] = self._weight(block.value, r, out=own) + self._weight(block.output, 0, own, out=self._stream(r)) + seen.of(f"value.{i}", h)
                    sites[f"down.{i}"][r][h] = self._weight(block.down, 0, self.down[i] if h else None, out=self._stream(r)) + seen.of(f"down.{i}", h)
                    sites[f"key.{i}"][r][h] = seen.of(f"key.{i}", h)
        return (shared[0], shared[1]), {k: ((a[0], a[1]), (b[0], b[1])) for k, (a, b) in sites.items()}

    def _stream(self, r: int) -> Rotation | None:
        return self.stream if r else None

    def _weight(self, layer: nn.Linear, r: int, into: Rotation | None = None, out: Rotation | None = None) -> float:
        """||Q_w - 1||^2 of a weight in the basis of these rotations."""
        if not self.method.weights:
            return 0.0
        w, into = layer.weight.detach().float(), self._stream(r) if r else into
        w = into(w) if into is not None else w
        return rounding_error(out(w.T).T if out is not None else w, self.method.weights, self.method.weight_clip)


class _Seen:
    """The errors of rounding activations, summed while calibration rows pass, without and with each site's rotation."""

    def __init__(self, net: Rotated) -> None:
        self.net, self.sums, self.rows, self.mask = net, {name: [0.0, 0.0] for name in net.chosen}, 0, None

    def of(self, name: str, h: int) -> float:
        return self.sums[name][h] / max(1, self.rows)

    def add(self, name: str, x: Tensor, rotation: Rotation, bits: int, clip: float, times: int = 1) -> None:
        if bits:
            x = x.detach().float()
            self.sums[name][0] += times * rounding_error(x, bits, clip)
            self.sums[name][1] += times * rounding_error(rotation(x), bits, clip)

    def run(self, model: Family, rows: list[Any]) -> None:
        net, method, handles = self.net, self.net.method, []

        def real(x: Tensor) -> Tensor:
            return x if self.mask is None or self.mask.shape != x.shape[:2] else x[self.mask]

        def listen(layer: nn.Linear, name: str, rotation: Rotation, times: int = 1) -> None:
            handles.append(layer.register_forward_pre_hook(lambda m, a: self.add(name, real(a[0]), rotation, method.activations, method.activation_clip, times)))

        for i, block in enumerate(net.residual.blocks):
            listen(block.query, STREAM, net.stream, 3)  # key and value read the same
            listen(block.first[0], STREAM, net.stream, len(block.first))
            listen(block.output, f"value.{i}", net.value[i])
            listen(block.down, f"down.{i}", net.down[i])

            def cache(key: Tensor, value: Tensor, i: int = i) -> None:
                for name, x, rotation in ((f"key.{i}", key, net.key[i]), (f"value.{i}", value, net.value[i])):
                    self.add(name, real(x.transpose(1, 2)), rotation, method.cache, method.cache_clip)

            net.caches[i].watch = cache
        try:
            with model.evaluating():
                for run, self.mask in passes(model, rows):  # type: ignore[assignment]
                    run()
        finally:
            for handle in handles:
                handle.remove()
            for site in net.caches:
                site.watch = None
        self.rows = len(rows)


# the method ---------------------------------------------------------------------------------------------------------------
@register("roste", paper=116)
@dataclass
class RoSTE(Compressor):
    """Tune a language model while its weights, activations and key-value cache are rounded to 4 bits, and rotate by random Hadamard
    matrices only where this makes the rounding better; better than rounding a tuned model, at the price of tuning all weights.

    y = Q_x(X R) Q_w(R^T W), without rounding independent of R. Q(X) = s (clamp(round(X / s) + z, 0, 2^b - 1) - z), s = c (max - min) /
    (2^b - 1), z = floor(-min / s), of each token's activations (of each token and head in the cache) and each output's weights; gradients pass
    straight through, master weights keep their precision. Each R is I or H diag(r) / sqrt(d) with random signs r: R_1 in the residual
    stream (norm gains are folded first), and by block R_2 (values), R_3 (queries and keys after the rotary embedding) and R_4 (before the
    down projection). They minimise E = sum_i ||Q_w - 1||^2 + (1/n) sum ||Q_x - 1||^2 over n calibration rows, then the objective trains.

    Wants `adapt: full` and a small rate (the paper: 3e-6 to 3e-5 for Pythia, 5e-6 to 5e-5 for Qwen 2.5, batch 128, one epoch, cosine). The
    result is a plain network whose weights are rounded, R_3 and R_4 taken out; `deployed(model)` puts the rounding of activations and
    cache back, and `load_packed` reads the integer codes that lie in the run's folder. Decided here: E of R_3 and the cache's part of R_2
    are the rounding errors of keys and values; writers' weights are counted under both R_1, so E is minimised exactly and not by
    comparing all-I with all-H; embeddings and head are not rounded and norm gains, once folded, rest at 1; clip factors 1 (weights),
    0.9 (activations) and 0.95 (cache) of the paper's three; a width that is no power of two takes a Hadamard matrix times a small
    orthogonal one. Serves decoders of the Llama kind."""

    weights: int = 4
    """Bits of a weight; 0 leaves them as they are."""
    activations: int = 4
    """Bits of a linear layer's inputs; 0 leaves them."""
    cache: int = 4
    """Bits of cached keys and values; 0 leaves them."""
    rotate: Literal["adaptive", "all", "none"] = "adaptive"
    """Where to rotate: where it lowers the error, everywhere, nowhere (plain straight-through tuning)."""
    weight_clip: float = 1.0
    """Clip factor of weights."""
    activation_clip: float = 0.9
    """Clip factor of activations."""
    cache_clip: float = 0.95
    """Clip factor of keys and values."""
    calibration: int = 128
    """Rows on which the error of activations is measured."""
    times: int = 1
    """How often the rotations are chosen: before training, and again after each of `times` equal parts of it."""
    file: str = "roste.safetensors"
    """Name of the packed file in the run's folder."""

    families = frozenset({"causal-lm"})
    parallel = frozenset({"single", "ddp"})
    toy = {"calibration": 4}

    def __post_init__(self) -> None:
        validate(self, ("weight_clip", "activation_clip", "cache_clip", "calibration", "times"))
        for name in ("weights", "activations", "cache"):
            if not isinstance(getattr(self, name), int) or not (getattr(self, name) == 0 or 2 <= getattr(self, name) <= 8):
                raise RecipeError(f"`{name}` of roste is {getattr(self, name)!r}; give 2 to 8 bits, or 0 for no rounding.")
        self.report: dict[str, Any] = {}
        self._net: Rotated | None = None
        self._part = 0

    def check(self, recipe: Any) -> str | None:
        adapt = getattr(recipe, "adapt", None) or []
        if any(c.method != "full" for c in adapt):
            return "'roste' rounds the weights that train, so it needs them all; use `adapt: full`."
        if self.times > 1 and any(c.options.get("freeze") for c in adapt):
            return "'roste' with `times` above 1 turns all weights while they train, so none can be frozen; leave out `freeze`, or use `times: 1`."
        if getattr(recipe, "merge", None):
            return "'roste' turns the network's basis, so its weights cannot be merged with others; merge in a stage before it."
        return None

    def attach(self, model: Family, ctx: Context | None = None) -> Parts:
        unwrapped(model, self.name)
        self._rows = calibration_rows(ctx, self.calibration, self.name)
        self._net = net = Rotated(model, self, ctx.seed if ctx is not None else 0)
        self._choose(model)
        gains = net.residual.gains
        groups = [Group("norm", gains, active=False)]
        if net.untied:
            name = next(n for n, p in net.residual.network.named_parameters() if p is net.residual.head.weight)
            groups.append(Group("head", {name: net.residual.head.weight}))
        return Parts(groups)

    def _choose(self, model: Family) -> list[nn.Parameter]:
        """Measure without rotations, choose, fold; what changed."""
        net = self._net
        assert net is not None
        before = dict(net.chosen)
        net.turn(dict.fromkeys(net.chosen, False))
        shared, sites = net.errors(model, self._rows)
        chosen, error = roste(shared, sites, self.rotate)
        others = {f"error_{name}": roste(shared, sites, name)[1] for name in ("none", "all")}
        net.turn(chosen)
        self.report |= {"rotated": sorted(n for n, yes in chosen.items() if yes), "error": error, **others}
        if before[STREAM] != chosen[STREAM]:
            return list(net.residual.network.parameters())
        moved = [net.residual.blocks[int(n.rpartition(".")[2])] for n in chosen if n != STREAM and chosen[n] != before[n]]
        return [p for b in moved for layer in (b.value, b.output, b.down) for p in layer.parameters()]

    def before_step(self, step: Step, ctx: Context) -> None:
        part = step.number * self.times // max(1, ctx.clock.steps)
        if part > self._part:
            self._part = part
            edit_optimizer(step.optimizer).reset(self._choose(step.model))
            ctx.log(**{"roste/error": self.report["error"], "roste/rotated": len(self.report["rotated"])})

    def state_dict(self) -> dict[str, Any]:
        return {"part": self._part, "chosen": dict(self._net.chosen), "report": dict(self.report)} if self._net is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The checkpoint's weights are in the basis that was chosen last."""
        self._part, self.report = int(state["part"]), dict(state["report"])
        if self._net is not None:
            self._net.mark(state["chosen"])

    # the result ---------------------------------------------------------------------------------------------------------
    def compress(self, model: Any, ctx: Context | None = None) -> Any:
        if isinstance(model, Mapping):
            return {n: self._rounded(torch.as_tensor(t)) for n, t in model.items()}
        if self._net is None or self._net.residual.network is not model.base_network:
            model = model.frozen_copy()
            self.attach(model, ctx)
        assert self._net is not None
        self._write(self._net, ctx)
        _plain(self._net)
        self._net = None
        return model

    def _rounded(self, tensor: Tensor) -> Tensor:
        """A matrix rounded as it is; vectors stay."""
        if tensor.ndim != 2 or not tensor.is_floating_point() or not self.weights:
            return tensor.clone()
        return fake_quant(tensor.detach().float(), self.weights, self.weight_clip).to(tensor.dtype)

    def _write(self, net: Rotated, ctx: Context | None) -> None:
        """Count what is stored, and write it where there is a folder: codes, scales and zero points, and all else as it is."""
        network = net.residual.network
        before = sum(p.numel() * p.element_size() for p in network.parameters())
        stored: dict[str, Tensor] = {}
        for name, layer in net.layers.items():
            if self.weights:
                grid = Grid.of(layer.weight.float(), self.weights, self.weight_clip)
                stored |= {f"{name}.codes": pack_codes(grid.codes(layer.weight.detach().float()), self.weights), f"{name}.scale": grid.scale, f"{name}.zero": grid.zero}
        codes = {f"{n}.weight" for n in net.layers} if self.weights else set()
        stored |= {n: t.detach().cpu().contiguous() for n, t in network.state_dict().items() if n not in codes}
        after = sum(t.numel() * t.element_size() for t in stored.values())
        self.report |= {"bytes_before": before, "bytes_after": after, "ratio": before / after}
        if ctx is not None and ctx.folder is not None:
            path = ctx.folder / self.file
            about = {"format": "roste", "bits": str(self.weights), "rotated": ",".join(self.report["rotated"]), "shapes": json.dumps({n: list(m.weight.shape) for n, m in net.layers.items()})}
            write_file(path, {n: t.cpu().contiguous() for n, t in stored.items()}, about)
            self.report |= {"file": str(path), "file_bytes": path.stat().st_size}
        network.config.roste = {
            "activations": self.activations, "cache": self.cache, "activation_clip": self.activation_clip, "cache_clip": self.cache_clip,
            "seed": net.seed, "rotated": [n for n, yes in net.chosen.items() if yes],
        }  # fmt: skip


@torch.no_grad()
def _plain(net: Rotated) -> None:
    """Plain layers with rounded weights, what ran online taken out."""
    for layer in net.layers.values():
        layer.weight.copy_(rounded(layer))
    for i, block in enumerate(net.residual.blocks):
        if net.chosen[f"down.{i}"]:
            rotate_inputs(block.down, net.down[i], back=True)
    for layer in net.layers.values():
        release(layer)
    release_attention(net.residual.network)


def deployed(model: Family) -> Family:
    """A model that `roste` made, as it runs on 4-bit hardware: inputs of linear layers and the cache are rounded again, in place."""
    settings = getattr(model.config, "roste", None)
    if not settings:
        raise RecipeError("This model was not made by 'roste': its configuration has no such entry.")
    residual = Residual(model, "roste")
    caches = {}
    for i, block in enumerate(residual.blocks):
        for layer in (*block.readers, *block.writers):
            simulate(layer, Site(input_bits=settings["activations"], input_clip=settings["activation_clip"]))
        sizes = {"key": residual.heads.dim, "down": block.down.in_features}
        key, down = (Rotation(n, seed_of(settings["seed"], k, i)) if f"{k}.{i}" in settings["rotated"] else None for k, n in sizes.items())
        if down is not None:
            rotate_inputs(block.down, down)
            block.down.site.rotation = down  # type: ignore[union-attr]
        caches[block.attention] = Site(input_bits=settings["cache"], input_clip=settings["cache_clip"], rotation=key)
    simulate_attention(residual.network, caches)  # type: ignore[arg-type]
    return model


def load_packed(path: Any) -> dict[str, Tensor]:
    """The tensors of a packed file, weights as the rounded values of the basis in which they were trained."""
    files = open_checkpoint(path)
    bits, shapes = int(files.metadata()["bits"]), json.loads(files.metadata()["shapes"])
    out = {}
    for name in files.where:
        layer, _, kind = name.rpartition(".")
        if kind == "codes":
            rows, columns = shapes[layer]
            codes = unpack_codes(files.read(name), bits, rows * columns).reshape(rows, columns)
            out[f"{layer}.weight"] = Grid(files.read(f"{layer}.scale"), files.read(f"{layer}.zero"), bits).values(codes.float())
        elif kind not in ("scale", "zero"):
            out[name] = files.read(name)
    return out
