"""Tiny random models that tests and the conformance battery use: built in milliseconds, the same for the same seed."""

from __future__ import annotations

from typing import Any

import torch

SPECIALS = ["<pad>", "<bos>", "<eos>", "<unk>", "<mask>"]
"""Ids 0 to 4."""
COMMON = [*"0123456789", "user", "assistant", "system", ":"]
"""Ids 5 to 18; the words w0, w1, ... follow from id 19."""
FIRST_WORD = len(SPECIALS) + len(COMMON)
CHAT_TEMPLATE = (
    "{% for m in messages %}<bos> {{ m['role'] }} : {{ m['content'] }}{% if m['role'] == 'assistant' %} <eos>{% endif %}"
    "{% if not loop.last %} {% endif %}{% endfor %}{% if add_generation_prompt %} <bos> assistant :{% endif %}"
)


def tiny_tokenizer(vocab: int = 64, wrapped: bool = False, ending: int = 2) -> Any:
    """Words separated by spaces: `w0 w1 7`. No token is added by itself, unless `wrapped`: then <bos> ... <eos> (or the id `ending`)."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = SPECIALS + COMMON
    words += [f"w{i}" for i in range(max(0, vocab - len(words)))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words[:vocab])}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if wrapped:
        end = words[ending]
        inner.post_processor = processors.TemplateProcessing(
            single=f"<bos> $A {end}", pair=f"<bos> $A {end} $B {end}", special_tokens=[("<bos>", 1), (end, ending)]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", mask_token="<mask>",
        clean_up_tokenization_spaces=False, padding_side="right", model_max_length=512,
    )  # fmt: skip
    made.chat_template = CHAT_TEMPLATE
    return made


def tiny_llama(vocab: int = 64, hidden: int = 32, layers: int = 2, seed: int = 0, **kw: Any) -> Any:
    """A random Llama as a CausalLM in eval mode; `kw` are fields of LlamaConfig (`num_key_value_heads`, `tie_word_embeddings` ...)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from luthier.core.families import CausalLM

    fields = {
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 2 * hidden, "max_position_embeddings": 512,
        "initializer_range": 0.2, "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    config = LlamaConfig(vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, **fields | kw)
    return CausalLM(_seeded(seed, LlamaForCausalLM, config), tiny_tokenizer(vocab), "tiny-llama")


def tiny_bert(vocab: int = 64, hidden: int = 32, layers: int = 2, seed: int = 0, classes: int = 0, **kw: Any) -> Any:
    """A random BERT as a TextEncoder: with its masked-word head, or with a classification head of `classes` classes."""
    from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

    from luthier.core.encoders import TextEncoder

    fields = {
        "num_attention_heads": 4, "intermediate_size": 2 * hidden, "max_position_embeddings": 128, "initializer_range": 0.2, "pad_token_id": 0,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    fields |= {"num_labels": classes} if classes else {}
    config = BertConfig(vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, **fields | kw)
    kind = BertForSequenceClassification if classes else BertForMaskedLM
    return TextEncoder(_seeded(seed, kind, config), tiny_tokenizer(vocab, wrapped=True), "tiny-bert")


def tiny_vit(classes: int = 3, hidden: int = 32, layers: int = 2, size: int = 12, patch: int = 4, seed: int = 0, **kw: Any) -> Any:
    """A random ViT for RGB images of `size` x `size` as an ImageClassifier."""
    from transformers import ViTConfig, ViTForImageClassification

    from luthier.core.encoders import ImageClassifier

    fields = {
        "num_attention_heads": 4, "intermediate_size": 2 * hidden, "initializer_range": 0.2,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    config = ViTConfig(hidden_size=hidden, num_hidden_layers=layers, image_size=size, patch_size=patch, num_labels=classes, **fields | kw)  # type: ignore[call-arg]
    return ImageClassifier(_seeded(seed, ViTForImageClassification, config), None, "tiny-vit")


def tiny_clip(vocab: int = 64, hidden: int = 32, layers: int = 2, size: int = 12, patch: int = 4, seed: int = 0, **kw: Any) -> Any:
    """A random CLIP as a DualEncoder: towers of `layers` blocks, a shared space of `hidden` / 2."""
    from transformers import CLIPConfig, CLIPModel

    from luthier.core.encoders import DualEncoder

    tower = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 2 * hidden, "initializer_range": 0.2}
    text = {**tower, "vocab_size": vocab, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    vision = {**tower, "image_size": size, "patch_size": patch}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=hidden // 2, **kw)
    # with the end at id 2 transformers pools CLIP's texts at their largest id (as the first releases did), so texts end with the last id
    return DualEncoder(_seeded(seed, CLIPModel, config), tiny_tokenizer(vocab, wrapped=True, ending=vocab - 1), "tiny-clip")


def _seeded(seed: int, kind: type, config: Any) -> Any:
    """The network of a seed, in fp32 and eval mode; the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config).float().eval()
