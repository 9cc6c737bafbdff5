"""What adapters share: the shell around peft's tuners, calibration rows, and the export of weights that changed their base."""

from __future__ import annotations

import copy
import math
import typing
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from luthier.adapt import Adapter
from luthier.core.collect import linear_layers
from luthier.core.plugin import Group, Parts
from luthier.errors import ModelError, RecipeError, nearest

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family

ALL_LINEAR = "all-linear"


# rows -------------------------------------------------------------------------------------------------------------------
def calibration_rows(ctx: Context | None, number: int, name: str) -> list[Mapping[str, Any]]:
    """`number` rows of the stream `calibration`, or of the training rows where there is none; drawn without replacement."""
    stream = "calibration" if ctx is not None and ctx.has_rows("calibration") else "train"
    if ctx is None or not ctx.has_rows(stream):
        raise RecipeError(f"'{name}' looks at a few rows before training; add `data: {{calibration: FILE}}` or training rows.")
    rows = ctx.rows(stream)
    order = ctx.numpy(f"calibration/{name}").permutation(len(rows))[:number]
    return [rows[int(i)] for i in sorted(order)]


# checks -----------------------------------------------------------------------------------------------------------------
def validate(method: Any, positive: Iterable[str] = (), shares: Iterable[str] = ()) -> None:
    """Refuse a value outside its Literal, numbers of `positive` that are not above 0, and `shares` outside [0, 1)."""
    hints = typing.get_type_hints(type(method))
    for one in fields(method):
        value, hint = getattr(method, one.name), hints[one.name]
        choices = [c for part in (hint, *typing.get_args(hint)) if typing.get_origin(part) is Literal for c in typing.get_args(part)]
        if choices and value is not None and value not in choices:
            raise RecipeError(f"'{one.name}' is {value!r}; it must be one of {', '.join(map(str, choices))}.")
    for name in positive:
        if getattr(method, name) is not None and not getattr(method, name) > 0:
            raise RecipeError(f"'{name}' is {getattr(method, name)!r}; it must be above 0.")
    for name in shares:
        if not 0 <= getattr(method, name) < 1:
            raise RecipeError(f"'{name}' is {getattr(method, name)!r}; it must be at least 0 and below 1.")


# networks ---------------------------------------------------------------------------------------------------------------
def heads(network: Any) -> list[str]:
    """Names of a classifier's own top modules (what is not its backbone), which are new and train whole."""
    backbone = getattr(network, "base_model", network)
    if backbone is network or not hasattr(network, "get_output_embeddings") or network.get_output_embeddings() is not None:
        return []
    if not any(word in type(network).__name__ for word in ("Classification", "Regression", "QuestionAnswering")):
        return []
    return [n for n, child in network.named_children() if child is not backbone and any(True for _ in child.parameters())]


def target_layers(network: nn.Module, targets: list[str], skip: Iterable[str] = ()) -> dict[str, nn.Module]:
    """The linear layers that `targets` names: by the end of their name, or all but the head (`all-linear`), none below `skip`."""
    if targets != [ALL_LINEAR]:
        layers = linear_layers(network, head=True)
        for target in targets:
            if not any(_ends(n, target) for n in layers):
                raise ModelError(f"The network has no linear layer '{target}'.{nearest(target, {n.rpartition('.')[2] for n in layers})}")
        return {n: m for n, m in layers.items() if any(_ends(n, t) for t in targets)}
    skip = tuple(skip)
    return {n: m for n, m in linear_layers(network).items() if not any(_ends(n, s) or n.startswith(f"{s}.") for s in skip)}


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def side_sizes(layer: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer or a Conv1D, whose weight is transposed."""
    rows, columns = layer.weight.shape  # type: ignore[misc]
    return (rows, columns) if isinstance(layer, nn.Linear) else (columns, rows)


def divisor(sides: Iterable[int], wanted: int) -> int:
    """The largest number up to `wanted` that divides all sides."""
    common = math.gcd(*sides)
    return max((d for d in range(1, min(wanted, common) + 1) if common % d == 0), default=1)


def unwrapped(model: Family, name: str) -> bool:
    """Merge the peft adapter that an earlier stage left on the network for good; says whether there was one."""
    if not hasattr(model.network, "peft_config"):
        return False
    if not hasattr(model.network, "merge_and_unload"):
        raise ModelError(f"The network carries prompt vectors of an earlier stage, which cannot be merged into it; '{name}' needs a plain network.")
    model.network = model.network.merge_and_unload()
    return True


# the shell around peft --------------------------------------------------------------------------------------------------
@dataclass
class PeftAdapter(Adapter):
    """A tuner of peft. A subclass gives `config`; the rest (wrapping, groups, switching off, export) is the same for all."""

    role: ClassVar[str] = "adapter"
    switchable = True
    positive: ClassVar[tuple[str, ...]] = ()
    """Fields that must be above 0."""
    shares: ClassVar[tuple[str, ...]] = ()
    """Fields that must lie in [0, 1)."""

    def __post_init__(self) -> None:
        validate(self, self.positive, self.shares)

    def check(self, recipe: Any) -> str | None:
        """peft carries one tuner at a time here."""
        tuners = [c.method for c in getattr(recipe, "adapt", None) or [] if _is_peft(str(getattr(c, "method", "")))]
        return f"'{tuners[0]}' and '{tuners[1]}' are both peft tuners and cannot share a stage; use two stages." if len(tuners) > 1 else None

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        """The peft configuration."""
        raise NotImplementedError

    def before(self, model: Family, config: Any, ctx: Context | None) -> None:
        """Look at rows, leave marks that peft's initialisation reads."""

    def after(self, model: Family, ctx: Context | None) -> None:
        """Overwrite or remember what peft initialised."""

    def task(self, model: Family) -> str | None:
        """peft's name of the task, which decides the class of the shell."""
        return "CAUSAL_LM" if model.kind == "causal-lm" else None

    def attach(self, model: Family, ctx: Context | None = None) -> Parts:
        from peft import get_peft_model

        self._rebased = unwrapped(model, self.name)
        config: Any
        model.network.requires_grad_(False)
        config = self.config(model, ctx)
        self.before(model, config, ctx)
        try:
            wrapped = get_peft_model(model.network, config)
        except (ValueError, TypeError, NotImplementedError) as error:
            reason = str(error).replace("`target_modules` in `peft_config`", "the layers in `targets`")
            raise ModelError(f"peft cannot put '{self.name}' on {type(model.network).__name__}: {reason}") from error
        if not config.base_model_name_or_path:
            config.base_model_name_or_path = model.source or None
        model.network = wrapped
        self.after(model, ctx)
        groups = self.groups(model)
        if not groups:
            raise ModelError(f"'{self.name}' found no layer that it can change in {type(model.base_network).__name__}; name others in `targets`.")
        return Parts(groups)

    def groups(self, model: Family) -> list[Group]:
        """What trains: the adapter's own parameters, and heads that train whole."""
        mine: dict[str, nn.Parameter] = {}
        whole: dict[str, nn.Parameter] = {}
        for name, param in model.network.named_parameters():
            if param.requires_grad:
                (whole if "modules_to_save" in name else mine)[name] = param
        return [g for g in (Group(self.role, mine), Group("head", whole)) if g.params]

    @contextmanager
    def disabled(self, model: Family) -> Iterator[Family]:
        # peft sets requires_grad of the whole adapter when it switches it on again; what was frozen stays frozen.
        flags = [(p, p.requires_grad) for p in model.network.parameters()]
        try:
            with model.network.disable_adapter():
                yield model
        finally:
            for param, flag in flags:
                param.requires_grad_(flag)

    def export(self, model: Family, directory: Path) -> None:
        """An adapter folder that plain peft loads onto the base model; the whole network if this stage's base is not the base."""
        if getattr(self, "_rebased", False):
            from luthier.core.models import save_network

            save_network(model, directory)
            return
        self.save(model, Path(directory))
        if hasattr(model.processor, "save_pretrained"):
            model.processor.save_pretrained(directory)

    def save(self, model: Family, directory: Path) -> None:
        model.network.save_pretrained(directory, save_embedding_layers=False)


def _is_peft(name: str) -> bool:
    from luthier.catalog import entries

    return any(e.name == name.replace("_", "-") and str(e.wraps or "").startswith("peft.") for e in entries("adapt"))


@dataclass
class Targeted(PeftAdapter):
    """A tuner that changes some of the network's layers."""

    targets: list[str] = field(default_factory=lambda: [ALL_LINEAR])
    """Layers by the end of their name (`q_proj`), or `all-linear`: every linear layer but the head."""
    train_also: list[str] = field(default_factory=list)
    """Modules that train whole besides, by the end of their name. A classifier's head always does."""

    def common(self, model: Family) -> dict[str, Any]:
        """The arguments that all these configurations take."""
        return {"task_type": self.task(model), "target_modules": self.layers(model), "modules_to_save": self.whole(model) or None}

    def whole(self, model: Family) -> list[str]:
        return [*self.train_also, *(h for h in heads(model.network) if h not in self.train_also)]

    def layers(self, model: Family) -> list[str]:
        """The targets, by name."""
        return list(target_layers(model.network, self.targets, self.whole(model))) if self.targets == [ALL_LINEAR] else list(self.targets)

    def sizes(self, model: Family) -> list[tuple[int, int]]:
        """(outputs, inputs) of every targeted linear layer."""
        return [side_sizes(m) for m in target_layers(model.network, self.targets, self.whole(model)).values()]

    def block(self, model: Family, wanted: int, sides: Literal["in", "out", "both"] = "both") -> int:
        """The largest block size up to `wanted` that fits every target."""
        return divisor([s for out, into in self.sizes(model) for s in {"in": [into], "out": [out], "both": [out, into]}[sides]], wanted)


@dataclass
class LoraLike(Targeted):
    """LoRA and its initialisations: W x + (alpha / rank) B A x with A [rank, in], B [out, rank]."""

    rank: int = 16
    """Rank of the update."""
    alpha: float = 32.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout on the update's input."""

    positive: ClassVar[tuple[str, ...]] = ("rank", "alpha")
    shares: ClassVar[tuple[str, ...]] = ("dropout",)

    def lora(self, model: Family, **more: Any) -> Any:
        """peft's LoraConfig with this method's settings."""
        from peft import LoraConfig

        return LoraConfig(**{"r": self.rank, "lora_alpha": self.alpha, "lora_dropout": self.dropout, **more, **self.common(model)})

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        return self.lora(model)


@dataclass
class MovedBase(LoraLike):
    """Initialisations that take what the adapter starts with out of the base: W = W_residual + s B0 A0.

    The trained adapter belongs to W_residual, so it is not switchable, and it is exported as a plain LoRA of twice the rank on the
    original W: s (B A - B0 A0) = s [B, -B0] [A; A0]."""

    alpha: float | None = None  # type: ignore[assignment]
    """The adapter's product is scaled by alpha / rank; default: alpha = rank, no scaling."""

    positive: ClassVar[tuple[str, ...]] = ("rank", "alpha")
    switchable = False

    def lora(self, model: Family, **more: Any) -> Any:
        return super().lora(model, **{"lora_alpha": self.rank if self.alpha is None else self.alpha, **more})

    def after(self, model: Family, ctx: Context | None) -> None:
        self._network = model.network
        self._initial = {n: t.detach().clone() for n, t in adapter_state(model.network).items() if _is_factor(n)}

    def save(self, model: Family, directory: Path) -> None:
        from safetensors.torch import save_file

        directory.mkdir(parents=True, exist_ok=True)
        tensors = plain_lora(adapter_state(model.network), self._initial)
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, directory / "adapter_model.safetensors", {"format": "pt"})
        network: Any = model.network
        config = copy.deepcopy(network.peft_config["default"])
        growth = math.sqrt(2) if config.use_rslora else 2
        config.r, config.lora_alpha = 2 * config.r, growth * config.lora_alpha
        config.init_lora_weights, config.inference_mode = True, True
        config.corda_config = config.lora_ga_config = None
        config.save_pretrained(directory)

    def state_dict(self) -> dict[str, Any]:
        return {"initial": dict(self._initial)} if hasattr(self, "_initial") else {}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """`attach` made the residual anew; where its start differs from the saved one (another machine), the base is put right."""
        saved = state.get("initial", {})
        if {n: t.shape for n, t in saved.items()} != {n: t.shape for n, t in self._initial.items()}:
            raise ModelError(f"This run was begun with another '{self.name}' (rank or targets differ), so it cannot be continued.")
        for name, layer in self._network.named_modules():
            a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
            if a not in saved or (torch.equal(saved[a], self._initial[a].cpu()) and torch.equal(saved[b], self._initial[b].cpu())):
                continue
            device = layer.get_base_layer().weight.device
            then, now = (s[b].to(device).float() @ s[a].to(device).float() for s in (saved, self._initial))
            change = layer.scaling["default"] * (now - then)
            layer.get_base_layer().weight.add_((change.T if layer.fan_in_fan_out else change).to(layer.get_base_layer().weight))
        self._initial = {n: t.clone() for n, t in saved.items()}


def adapter_state(network: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors under the names of a saved adapter."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(network, save_embedding_layers=False)


def _is_factor(name: str) -> bool:
    return "lora_A" in name or "lora_B" in name


def plain_lora(now: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A trained adapter and the one it started from -> the plain LoRA of their difference: A' = [A; A0], B' = [B, -B0]."""
    made = {}
    for name, tensor in now.items():
        if "lora_A" in name:
            tensor = torch.cat([tensor, initial[name].to(tensor)], 0)
        elif "lora_B" in name:
            tensor = torch.cat([tensor, -initial[name].to(tensor)], 1)
        made[name] = tensor
    return made


@dataclass
class Prompted(PeftAdapter):
    """Learned vectors before the input; the network itself is not touched."""

    tokens: int = 20
    """How many vectors."""

    role: ClassVar[str] = "prompt"
    families = frozenset({"causal-lm"})
    positive: ClassVar[tuple[str, ...]] = ("tokens",)

    def task(self, model: Family) -> str | None:
        return "CAUSAL_LM"

    def check(self, recipe: Any) -> str | None:
        if getattr(recipe, "merge", None):
            return f"'{self.name}' learns vectors beside the weights, so its result cannot be merged; leave out `merge`, or choose another value for `adapt`."
        return super().check(recipe)


def text_ids(model: Family, text: str, length: int) -> Tensor:
    """The token ids of a text, repeated or cut to `length`."""
    ids = model.processor(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise RecipeError(f"The text {text!r} has no tokens to start the prompt from.")
    return torch.tensor((ids * math.ceil(length / len(ids)))[:length])
