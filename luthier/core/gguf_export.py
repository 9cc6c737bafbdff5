"""GGUF files of Llama-type models, for llama.cpp and what is built on it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from luthier.core.tensorfile import open_checkpoint
from luthier.errors import ModelError

ARCHITECTURES = ("LlamaForCausalLM",)


def export_gguf(directory: str | Path, out: str | Path, kind: Literal["f32", "f16"] = "f16") -> Path:
    """Write the transformers folder of a Llama-type model as one GGUF file of fp32 or fp16 numbers.

    Vectors (norms) stay fp32. The tokenizer must be a byte-level BPE, as SmolLM2's and Llama 3's are. `out` is the file."""
    directory, out = Path(directory), Path(out)
    config = _json(directory / "config.json")
    tokenizer = _json(directory / "tokenizer.json")
    _check(config, tokenizer, kind)
    import gguf

    out.parent.mkdir(parents=True, exist_ok=True)
    writing = out.with_name(f".{out.name}.writing")
    writer = gguf.GGUFWriter(str(writing), "llama")
    try:
        _write_config(writer, gguf, config, kind)
        _write_tokenizer(writer, gguf, config, tokenizer, _json(directory / "tokenizer_config.json", {}), directory)
        for name, values in _tensors(gguf, config, directory, kind):
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        writing.replace(out)
    finally:
        writing.unlink(missing_ok=True)
    return out


def _json(path: Path, default: Any = None) -> Any:
    if not path.is_file():
        if default is not None:
            return default
        raise ModelError(f"{path} is missing; a GGUF file is made from a whole transformers folder with a fast tokenizer.")
    return json.loads(path.read_text(encoding="utf-8"))


def _check(config: dict[str, Any], tokenizer: dict[str, Any], kind: str) -> None:
    name = (config.get("architectures") or [config.get("model_type", "unknown")])[0]
    if name not in ARCHITECTURES:
        raise ModelError(f"A {name} cannot be written as GGUF here, only {', '.join(ARCHITECTURES)}; convert the folder with llama.cpp's own script.")
    if kind not in ("f32", "f16"):
        raise ModelError(f"A GGUF file is written as f32 or f16 here, not as '{kind}'; quantise it further with llama.cpp's llama-quantize.")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ModelError(f"Rotary positions of the type '{rope.get('rope_type', rope.get('type'))}' cannot be written as GGUF here; convert the folder with llama.cpp's own script.")
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise ModelError("A Llama with biases cannot be written as GGUF here; convert the folder with llama.cpp's own script.")
    if tokenizer["model"].get("type") != "BPE" or tokenizer["model"].get("byte_fallback") or "ByteLevel" not in json.dumps(tokenizer.get("pre_tokenizer")):
        raise ModelError(f"The tokenizer is a {tokenizer['model'].get('type')} that is not byte-level; only byte-level BPE tokenizers can be written as GGUF here.")


def _head_dim(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _write_config(writer: Any, gguf: Any, config: dict[str, Any], kind: str) -> None:
    rope = config.get("rope_parameters") or {}
    writer.add_name(str(config.get("_name_or_path") or "luthier"))
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(int(config["num_attention_heads"]))
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or config["num_attention_heads"]))
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0))
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_vocab_size(int(config["vocab_size"]))
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if kind == "f16" else gguf.LlamaFileType.ALL_F32)


def _write_tokenizer(writer: Any, gguf: Any, config: dict[str, Any], tokenizer: dict[str, Any], settings: dict[str, Any], directory: Path) -> None:
    size = int(config["vocab_size"])
    tokens, types = _tokens(tokenizer, gguf.TokenType, size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
    place = {t: i for i, t in enumerate(tokens)}
    for role, add in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id), ("pad", writer.add_pad_token_id), ("unk", writer.add_unk_token_id)):
        token = settings.get(f"{role}_token")
        token = token["content"] if isinstance(token, dict) else token
        if token in place:
            add(place[token])
    writer.add_add_bos_token(_begins_with_bos(tokenizer, settings))
    writer.add_add_space_prefix(False)
    template = directory / "chat_template.jinja"
    text = template.read_text(encoding="utf-8") if template.is_file() else settings.get("chat_template")
    if isinstance(text, str):
        writer.add_chat_template(text)


def _tokens(tokenizer: dict[str, Any], types: Any, size: int) -> tuple[list[str], list[int]]:
    """Every id's text and type; ids that the tokenizer does not use are named so that none is missing."""
    tokens = [f"[PAD{i}]" for i in range(size)]
    kinds = [int(types.UNUSED)] * size
    for token, i in tokenizer["model"]["vocab"].items():
        if i < size:
            tokens[i], kinds[i] = token, int(types.NORMAL)
    for added in tokenizer.get("added_tokens") or []:
        if added["id"] >= size:
            raise ModelError(f"The tokenizer's token '{added['content']}' has no row in the network's embedding; resize the network to its tokenizer first.")
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = int(types.CONTROL if added.get("special") else types.USER_DEFINED)
    return tokens, kinds


def _pre_tokenizer(tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name for how the text is cut before merging."""
    text = json.dumps(tokenizer["pre_tokenizer"])
    if '"Digits"' in text:
        return "smollm"
    if "{1,3}" in text:
        return "llama-bpe"
    return "gpt-2"


def _begins_with_bos(tokenizer: dict[str, Any], settings: dict[str, Any]) -> bool:
    bos = settings.get("bos_token")
    bos = bos["content"] if isinstance(bos, dict) else bos
    after = tokenizer.get("post_processor") or {}
    parts = [after, *after.get("processors", [])]
    return any(p.get("type") == "TemplateProcessing" and p["single"] and p["single"][0].get("SpecialToken", {}).get("id") == bos for p in parts)


def _tensors(gguf: Any, config: dict[str, Any], directory: Path, kind: str) -> Iterator[tuple[str, np.ndarray]]:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, int(config["num_hidden_layers"]))
    files = open_checkpoint(directory)
    heads = int(config["num_attention_heads"])
    shared = int(config.get("num_key_value_heads") or heads)
    for name in sorted(files.where):
        if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.get("tie_word_embeddings")):
            continue
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise ModelError(f"The tensor '{name}' has no place in a Llama's GGUF file.")
        tensor = files.read(name).float()
        if name.endswith("q_proj.weight"):
            tensor = _interleaved(tensor, heads)
        if name.endswith("k_proj.weight"):
            tensor = _interleaved(tensor, shared)
        yield new, tensor.numpy().astype(np.float16 if kind == "f16" and tensor.ndim > 1 else np.float32)


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rotary pairs lie half a head apart in transformers and side by side in GGUF: rows (h, 2, d/2) -> (h, d/2, 2)."""
    rows, columns = weight.shape
    return torch.swapaxes(weight.reshape(heads, 2, rows // heads // 2, columns), 1, 2).reshape(rows, columns)


def mend_pre_tokenizer(tokenizer: Any, path: Path) -> None:
    """transformers reads any byte-level tokenizer of a GGUF file as GPT-2's; where digits stand alone ("smollm"), say so again."""
    import gguf

    field = gguf.GGUFReader(str(path)).fields.get("tokenizer.ggml.pre")
    if field is None or field.contents() != "smollm":
        return
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
