"""Loading models into families, and writing them as folders that plain transformers loads.

`load` takes the embedded models by name, `lab:NAME`, folders (transformers, peft adapters, our runs), GGUF files and hub ids.
Nothing is unpickled and no remote code runs unless it is asked for by name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from luthier.core.encoders import DualEncoder, ImageClassifier, TextEncoder
from luthier.core.families import CausalLM, Family
from luthier.core.fetch import ALIASES, EMBEDDED, fetch
from luthier.core.gguf_export import export_gguf, mend_pre_tokenizer
from luthier.core.places import Place, place_of
from luthier.core.probe import probe
from luthier.core.quiet import first_line, folded, quiet, unquantised
from luthier.errors import ModelError, UserError

__all__ = ["DualEncoder", "ImageClassifier", "TextEncoder", "export_gguf", "fingerprint", "load", "load_state", "probe", "save_network", "wrap"]

DTYPES = {"auto": torch.float32, "fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16, "float16": torch.float16}
DUAL = frozenset({"clip", "siglip", "siglip2", "chinese_clip", "altclip"})
FAMILIES = ("causal-lm", "text-encoder", "image-classifier", "dual-encoder")


def load(
    spec: Any, device: str = "auto", dtype: str = "auto", attention: str = "sdpa", base: Any = None, trust_remote_code: bool = False,
    tokenizer: str | None = None, template: str | None = None,
) -> Family:  # fmt: skip
    """A model, ready to train or to ask.

    spec: an embedded name (smollm2-135m, minilm), `lab:NAME`, a folder (a transformers model, a peft adapter, a run of ours), a
    .gguf file, or a hub id. Weights are fp32 unless `dtype` says bf16 or fp16; half-precision files are converted. An adapter's
    base is the one it names, or `base`, which must then be the model that the adapter was trained on. `tokenizer`: another
    tokenizer's folder or id; `template`: a chat template, or a file that holds one. A mapping {id: spec, dtype: ...} gives the options as well."""
    if isinstance(spec, Mapping):
        options = {"dtype": dtype, "attention": attention, "trust_remote_code": trust_remote_code, "tokenizer": tokenizer, "template": template, **spec}
        return load(options.pop("id"), device, base=base, **options)
    if hasattr(spec, "network"):
        return spec
    target = _device(device)
    if dtype not in DTYPES:
        raise ModelError(f"There is no dtype '{dtype}'; it is one of {', '.join(sorted(DTYPES))}.")
    place = place_of(spec)
    if place.kind == "adapter":
        return dressed(_adapter(place, target, dtype, attention, base, trust_remote_code, tokenizer), None, template)
    if base is not None:
        raise ModelError(f"'{spec}' is a whole model, so it has no base; leave `base` out.")
    family = _read(place, DTYPES[dtype], attention, trust_remote_code, tokenizer)
    family.network.to(target)
    return _ready(dressed(family, None, template))


def wrap(network: nn.Module, processor: Any = None, source: str = "") -> Family:
    """A family around a network in memory; `processor` is its tokenizer or image processor."""
    if not isinstance(network, nn.Module):
        raise ModelError(f"A model must be a torch module, not a {type(network).__name__}.")
    inner: Any = network.get_base_model() if hasattr(network, "peft_config") else network  # type: ignore[operator]
    kind = family_of(getattr(inner, "config", None), [type(inner).__name__])
    made = {"causal-lm": CausalLM, "text-encoder": TextEncoder, "image-classifier": ImageClassifier, "dual-encoder": DualEncoder}[kind]
    return _ready(made(network, processor, source))


def family_of(config: Any, architectures: list[str] | None = None) -> str:
    """The family that a configuration belongs to, by the class it names."""
    name = ((architectures or getattr(config, "architectures", None) or [""])[0]) or ""
    kind = str(getattr(config, "model_type", ""))
    if name.endswith(("ForCausalLM", "LMHeadModel")) and not name.startswith("Bert"):
        return "causal-lm"
    if name.endswith("ForImageClassification"):
        return "image-classifier"
    if kind in DUAL and name in ("", "CLIPModel", "SiglipModel", "Siglip2Model", "ChineseCLIPModel", "AltCLIPModel"):
        return "dual-encoder"
    from transformers.models.auto import modeling_auto as auto

    if kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and name.endswith(("ForMaskedLM", "ForSequenceClassification", "ForPreTraining", "Model", "")):
        return "text-encoder"
    if kind in auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES and (name.endswith("Model") or not name):
        return "image-classifier"
    if not name and kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "causal-lm"
    raise ModelError(f"A model of the class '{name or kind or 'unknown'}' belongs to no family here. The families are: {', '.join(FAMILIES)}.")


# reading ----------------------------------------------------------------------------------------------------------------
def _read(place: Place, dtype: torch.dtype, attention: str, remote: bool, tokenizer: str | None = None) -> Family:
    import transformers

    where: dict[str, Any] = {"pretrained_model_name_or_path": str(place.path or place.source), "trust_remote_code": remote}
    if place.gguf:
        where["gguf_file"] = place.gguf
    if place.path is not None:
        where["local_files_only"] = True
    with _sentences(place):
        config = transformers.AutoConfig.from_pretrained(**where)
        kind = "causal-lm" if place.gguf else family_of(config)
        network, report, notices = _network(transformers, config, kind, where, dtype, attention)
        processor = _processor(transformers, kind, where, place) if tokenizer is None or kind == "dual-encoder" else None
    notices += _lacking(report, network, kind, place)
    network.config._name_or_path = network.name_or_path = place.source
    if place.gguf:
        unquantised(network)
    if kind == "text-encoder":
        family: Family = _text_encoder(network, processor, place, notices)
    else:
        family = {"causal-lm": CausalLM, "image-classifier": ImageClassifier, "dual-encoder": DualEncoder}[kind](network, processor, place.source)
    family.notices += notices
    return dressed(family, tokenizer, None, remote)


def _network(transformers: Any, config: Any, kind: str, where: dict[str, Any], dtype: torch.dtype, attention: str) -> tuple[Any, dict[str, Any], list[str]]:
    name = (getattr(config, "architectures", None) or [""])[0]
    auto = {"causal-lm": "AutoModelForCausalLM", "image-classifier": "AutoModelForImageClassification", "dual-encoder": "AutoModel"}.get(kind)
    if kind == "text-encoder":
        auto = "AutoModelForSequenceClassification" if name.endswith("ForSequenceClassification") else "AutoModelForMaskedLM" if name.endswith(("ForMaskedLM", "ForPreTraining")) else "AutoModel"
    if kind == "image-classifier" and not name.endswith("ForImageClassification"):
        auto = "AutoModel"
    given = {**where, "dtype": dtype, "output_loading_info": True}
    if "gguf_file" not in where:
        given["use_safetensors"] = True
    reader = getattr(transformers, str(auto)).from_pretrained
    with quiet():
        try:
            network, report = reader(**given, attn_implementation=attention)
        except (ValueError, ImportError) as error:
            if "attn" not in str(error).lower() and "attention" not in str(error).lower():
                raise
            network, report = reader(**given, attn_implementation="eager")
            return network.eval(), report, [f"The attention '{attention}' does not serve this model, so the plain one is used: {first_line(error)}"]
    return network.eval(), report, []


def _lacking(report: Mapping[str, Any], network: nn.Module, kind: str, place: Place) -> list[str]:
    """A language model with a random tensor is refused; an encoder may lack its pooler."""
    missing = sorted(report.get("missing_keys", ()))
    if missing and (kind == "causal-lm" or not all("pool" in k for k in missing)):
        raise ModelError(f"{place.source} lacks {len(missing)} tensors of a {type(network).__name__}, e.g. '{missing[0]}'; it is not a whole model.")
    unused = sorted(report.get("unexpected_keys", ()))
    return [f"{place.source} holds {len(unused)} tensors that a {type(network).__name__} has no place for, e.g. '{unused[0]}'."] if unused else []


def _processor(transformers: Any, kind: str, where: dict[str, Any], place: Place) -> Any:
    given = {k: v for k, v in where.items() if k != "pretrained_model_name_or_path"}
    path = where["pretrained_model_name_or_path"]
    images = place.path is None or (place.path / "preprocessor_config.json").is_file() or (place.path / "processor_config.json").is_file()
    if kind == "image-classifier":
        return transformers.AutoImageProcessor.from_pretrained(path, **given) if images else None
    if place.path is not None and not place.gguf and not any((place.path / n).is_file() for n in ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model")):
        raise ModelError(f"{place.path} holds a model but no tokenizer; save the tokenizer there too: tokenizer.save_pretrained('{place.path}').")
    if kind == "dual-encoder" and images:
        return transformers.AutoProcessor.from_pretrained(path, **given)
    made = transformers.AutoTokenizer.from_pretrained(path, **given)
    if place.gguf and place.path is not None:
        mend_pre_tokenizer(made, place.path / place.gguf)
    return made


def dressed(family: Family, tokenizer: str | None, template: str | None, remote: bool = False) -> Family:
    """The family with another tokenizer (a folder or an id) and another chat template (a text, or a file that holds one)."""
    if tokenizer is not None:
        import transformers

        path = Path(tokenizer).expanduser()
        known = ALIASES.get(tokenizer.lower(), tokenizer)
        where = str(fetch(known)) if known in EMBEDDED else str(path) if path.is_dir() else tokenizer
        try:
            read = transformers.AutoTokenizer.from_pretrained(where, trust_remote_code=remote, local_files_only=path.is_dir())
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"The tokenizer '{tokenizer}' cannot be loaded: {first_line(error)}") from error
        if hasattr(family.processor, "image_processor"):
            family.processor.tokenizer = read
        else:
            family.processor = read
    if template is not None:
        if getattr(family, "tokenizer", None) is None:
            raise ModelError("A chat template needs a tokenizer, and this model has none; leave out `template`.")
        file = Path(template).expanduser() if "\n" not in template and "{" not in template else None
        if file is not None and not file.is_file():
            raise ModelError(f"The chat template {file} does not exist; give a .jinja file or the template itself.")
        family.tokenizer.chat_template = template if file is None else file.read_text(encoding="utf-8")  # type: ignore[attr-defined]
    return family


def _text_encoder(network: nn.Module, tokenizer: Any, place: Place, notices: list[str]) -> TextEncoder:
    """With the pooling and the length that a sentence-transformers folder states."""
    family = TextEncoder(network, tokenizer, place.source)
    if place.path is None or not (place.path / "modules.json").is_file():
        return family
    for module in json.loads((place.path / "modules.json").read_text()):
        part, kind = place.path / module["path"], str(module["type"]).rpartition(".")[2]
        if kind == "Pooling":
            stated = json.loads((part / "config.json").read_text())
            on = [k.removeprefix("pooling_mode_") for k, v in stated.items() if k.startswith("pooling_mode_") and v is True]
            on = on or [str(stated.get("pooling_mode", "mean"))]
            known = {"mean_tokens": "mean", "cls_token": "cls", "max_tokens": "max", "lasttoken": "last", "mean": "mean", "cls": "cls", "max": "max"}
            if len(on) != 1 or on[0] not in known:
                raise ModelError(f"{place.source} pools by {', '.join(on)}; only mean, cls, max and the last token are known here.")
            family.pooling = known[on[0]]  # type: ignore[assignment]
        elif kind not in ("Transformer", "Normalize"):
            notices.append(f"{place.source} has a layer '{kind}' behind its pooling, which is left out.")
    settings = place.path / "sentence_bert_config.json"
    if settings.is_file():
        family.cut = json.loads(settings.read_text()).get("max_seq_length")
    return family


def _adapter(place: Place, device: torch.device, dtype: str, attention: str, base: Any, remote: bool, tokenizer: str | None = None) -> Family:
    from peft import PeftModel

    assert place.path is not None
    stated = json.loads((place.path / "adapter_config.json").read_text())
    named = stated.get("base_model_name_or_path") or None
    if base is None and named is None:
        raise ModelError(f"The adapter {place.path} does not say which model it belongs to; load it with `base=`.")
    if base is not None and named is not None and not hasattr(base, "network") and place_of(base).source != _source(named):
        raise ModelError(f"The adapter {place.path} belongs to '{named}', not to '{base}'; an adapter on another base gives nonsense.")
    if not (place.path / "adapter_model.safetensors").is_file():
        raise ModelError(f"{place.path} holds no adapter_model.safetensors; save the adapter with peft as safetensors.")
    if tokenizer is None and (place.path / "tokenizer_config.json").is_file():
        tokenizer = str(place.path)  # what was saved with the adapter is what it was trained with
    try:
        family = load(named if base is None else base, str(device), dtype, attention, trust_remote_code=remote, tokenizer=tokenizer)
    except ModelError as error:
        raise ModelError(f"The base of the adapter {place.path} cannot be loaded. {error} If it has moved, say where with `base=`.") from error
    try:
        family.network = PeftModel.from_pretrained(family.network, str(place.path), local_files_only=True).to(device).eval()
    except (RuntimeError, ValueError, KeyError) as error:
        raise ModelError(f"The adapter {place.path} does not fit '{named or base}': {first_line(error)}") from error
    family.source = str(place.path)
    return _ready(family)


def _source(named: str) -> str | None:
    try:
        return place_of(named).source
    except ModelError:
        return None


def _ready(family: Family) -> Family:
    if isinstance(family, CausalLM):
        notice = probe(family)
        if notice:
            family.notices.append(notice)
    return family


def _device(device: str) -> torch.device:
    if device != "auto":
        try:
            return torch.device(device)
        except RuntimeError as error:
            raise ModelError(f"There is no device '{device}'; use auto, cpu, cuda or cuda:0.") from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@contextmanager
def _sentences(place: Place) -> Iterator[None]:
    """Errors of transformers, as one sentence."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        text = first_line(error)
        if "trust_remote_code" in str(error):
            text = "it brings code of its own, which only runs if you ask for it with trust_remote_code=True."
        if place.path is None:
            raise ModelError(f"'{place.source}' cannot be loaded from the hub: {text} Embedded models need no network: {', '.join(EMBEDDED)}.") from error
        raise ModelError(f"{place.path} cannot be loaded: {text}") from error


# writing ----------------------------------------------------------------------------------------------------------------
def save_network(family: Family, directory: str | Path) -> None:
    """Write a folder that transformers loads without us: safetensors, configuration, tokenizer or image processor.

    Adapters are merged into a copy of the network. What belongs to plug-ins (`family.modules`) is not part of it."""
    import copy

    directory = Path(directory)
    network: Any = family.network
    if hasattr(network, "peft_config"):
        network = folded(copy.deepcopy(network))
    directory.mkdir(parents=True, exist_ok=True)
    with quiet():
        network.save_pretrained(directory)
    if family.processor is not None:
        family.processor.save_pretrained(directory)
    if isinstance(family, TextEncoder) and not family.has_classes:
        _save_pooling(family, directory)


def _save_pooling(family: TextEncoder, directory: Path) -> None:
    """What sentence-transformers needs to pool as the family does."""
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"))
    modules = [{"idx": i, "name": str(i), "path": p, "type": f"sentence_transformers.models.{k}"} for i, (p, k) in enumerate(kinds)]
    (directory / "modules.json").write_text(json.dumps(modules, indent=2))
    (directory / "1_Pooling").mkdir(exist_ok=True)
    modes = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens", "last": "lasttoken"}
    width = int(family.config.get_text_config().hidden_size)
    pooling = {"word_embedding_dimension": width, **{f"pooling_mode_{m}": m == modes[family.pooling] for m in modes.values()}}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling, indent=2))
    if family.cut:
        (directory / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": family.cut, "do_lower_case": False}))


def load_state(family: Family, source: Mapping[str, Tensor]) -> None:
    """Put tensors (a merged state dict, a TensorSource) into the network; names and shapes must be its own.

    A tied tensor may be left out if its twin is there. Nothing is changed unless all names fit."""
    own = {n: t for n, t in family.network.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    strange = sorted(set(source) - set(own))
    if strange:
        raise ModelError(f"The checkpoint has a tensor '{strange[0]}' ({len(strange)} such) that the network has not; they are of different models.")
    twins: dict[tuple[int, int], list[str]] = {}
    for name, tensor in own.items():
        twins.setdefault((tensor.data_ptr(), tensor.numel()) if tensor.numel() else (id(tensor), 0), []).append(name)
    lost = [names[0] for names in twins.values() if not any(n in source for n in names)]
    if lost:
        raise ModelError(f"The checkpoint lacks the tensor '{lost[0]}' ({len(lost)} such) of the network.")
    stated: Callable[[str], Any] = getattr(source, "meta", lambda name: None)
    for name in source:
        known = stated(name)
        _same_shape(name, known[0] if known else source[name].shape if isinstance(source, dict) else own[name].shape, own[name].shape)
    with torch.no_grad():
        for name in source:
            value = source[name]
            _same_shape(name, value.shape, own[name].shape)
            own[name].copy_(value)


def _same_shape(name: str, given: Any, wanted: Any) -> None:
    if tuple(given) != tuple(wanted):
        raise ModelError(f"The tensor '{name}' is {list(given)} in the checkpoint and {list(wanted)} in the network.")


_AS_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def fingerprint(network: Any) -> str:
    """A hash of a network's parameters and buffers: names, shapes, 64 values of each, and the sum of all bits.

    The sum runs over the values' bits as integers, so it is the same for any number of threads and sees a single changed entry."""
    network = getattr(network, "network", network)
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        if not isinstance(tensor, Tensor):
            continue
        flat = tensor.detach().contiguous().flatten()
        sample = flat[:: max(1, len(flat) // 64)].cpu().contiguous()
        eights = len(flat) * flat.element_size() % 8 == 0
        flat = flat.clone() if flat.storage_offset() * flat.element_size() % 8 else flat
        flat = flat.view(torch.int64 if eights else _AS_INTEGERS[flat.element_size()])
        digest.update(f"{name}{list(tensor.shape)}{tensor.dtype}{int(flat.sum(dtype=torch.int64)) if len(flat) else 0}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
