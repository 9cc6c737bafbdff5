"""The count of operations against a counted model."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from bench import flops
from bench.flops import Load, Shape

LLAMA = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 64}
BERT = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 64}


def llama(length=12):
    """A model whose attention is two plain products, and what one row makes it read (every pair: eager attention masks afterwards)."""
    network = LlamaForCausalLM(LlamaConfig(**LLAMA, attn_implementation="eager"))
    ids = torch.randint(64, (1, length))
    return network, ids, Load(length, length * length, length), Shape.of(network.config.to_dict())


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_a_forward_pass():
    network, ids, load, shape = llama()
    with torch.no_grad():
        rotary = counted(lambda: network.model.rotary_emb(torch.zeros(1, ids.shape[1], 32), torch.arange(ids.shape[1])[None]))
        assert counted(lambda: network(ids, use_cache=False)) - rotary == flops.forward(shape, load)


def test_a_step_of_lora_with_everything_else_frozen():
    network, ids, load, shape = llama()
    rotary = counted(lambda: network.model.rotary_emb(torch.zeros(1, ids.shape[1], 32), torch.arange(ids.shape[1])[None]))
    tuned = get_peft_model(network, LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert counted(lambda: tuned(ids, use_cache=False).logits.sum().backward()) - rotary == flops.adapter_step(shape, load, 3)


def test_a_step_that_trains_every_weight_of_an_encoder():
    network = BertModel(BertConfig(**BERT, attn_implementation="eager"), add_pooling_layer=False)
    ids = torch.randint(64, (3, 10))
    load, shape = flops.bidirectional([10, 10, 10]), Shape.of(network.config.to_dict())
    assert counted(lambda: network(ids).last_hidden_state.sum().backward()) == flops.full_step(shape, load)


@pytest.mark.parametrize("rows, prompts, expected", [
    ([[1, 2, 3, 4]], [2], Load(3, 6, 2)),
    ([[1, 2, 3, 4], [1, 2, 5, 6]], [2, 2], Load(4, 9, 4)),
    ([[1, 2, 3], [1, 2, 3]], [2, 2], Load(2, 3, 2)),
])  # fmt: skip
def test_shared_beginnings_count_once_and_last_tokens_are_not_read(rows, prompts, expected):
    assert flops.causal(rows, prompts) == expected


def test_loads_add_up():
    assert Load(1, 2, 3) + Load(10, 20, 30) == Load(11, 22, 33)
