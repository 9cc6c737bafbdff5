"""The classes and sizes of the lab's models, untrained: `fresh("lm-s", seed=0)`."""

from __future__ import annotations

import torch

from luthier.errors import ModelError, nearest
from luthier.lab.tokenizer import SIZE

# An initial spread of about 1/sqrt(d) in place of 0.02: at 1.2 M tokens the loss of lm-s is 1.18 and not 1.72.
LLAMA = {
    "lm-s": {"num_hidden_layers": 3, "hidden_size": 96, "num_attention_heads": 4, "intermediate_size": 256, "max_position_embeddings": 512,
             "initializer_range": 0.1},
    "lm-m": {"num_hidden_layers": 6, "hidden_size": 128, "num_attention_heads": 8, "intermediate_size": 256, "max_position_embeddings": 1024,
             "initializer_range": 0.09},
}
SAME_CLASS = {"lm-s.b": "lm-s", "lm-s@half": "lm-s", "chat": "lm-s"}


def fresh(name: str, seed: int = 0, **changes) -> torch.nn.Module:
    """An untrained model of a shipped model's class, or a perceptron for digits (`mlp`); `changes` override fields of its configuration."""
    known = [*LLAMA, *SAME_CLASS, "enc", "vit", "mlp"]
    if name not in known:
        raise ModelError(f"the lab builds no model '{name}'.{nearest(name, known)}")
    torch.manual_seed(seed)
    kind = SAME_CLASS.get(name, name)
    if kind in LLAMA:
        return _llama({**LLAMA[kind], **changes})
    if kind == "mlp":
        from luthier.lab._mlp import perceptron

        return perceptron(changes)
    return (_bert if kind == "enc" else _vit)(changes)


def _llama(fields: dict) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = {"num_key_value_heads": fields["num_attention_heads"], **fields}
    config = LlamaConfig(vocab_size=SIZE, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0, **fields)
    return LlamaForCausalLM(config)


def _bert(changes: dict) -> torch.nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    fields = {"num_hidden_layers": 6, "hidden_size": 96, "num_attention_heads": 4, "intermediate_size": 384,
              "max_position_embeddings": 256, "type_vocab_size": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.1}  # fmt: skip
    return BertForMaskedLM(BertConfig(vocab_size=SIZE, pad_token_id=0, bos_token_id=1, eos_token_id=2, **{**fields, **changes}))


def _vit(changes: dict) -> torch.nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    fields = {"num_hidden_layers": 6, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 256, "image_size": 24,
              "patch_size": 4, "num_labels": 22, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.1}  # fmt: skip
    return ViTForImageClassification(ViTConfig(**{**fields, **changes}))
