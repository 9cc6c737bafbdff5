"""What is found before training, and what a run is said to cost."""

import re
import types

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from luthier.core.estimate import estimate, low_rank_size, matmul_rate
from luthier.core.families import CausalLM, Family
from luthier.core.preflight import before_training, preflight
from luthier.core.rows import Rows, encode
from luthier.errors import DataError

WORDS = ["<unk>", "<s>", "</s>", "<end>", "user", "assistant", ":", "the", "sky", "is", "blue", "red", "what", "?", "\x1b[31m", "a", "b", "c", "d", "e"]
TEMPLATE = "{{ bos_token }}{% for m in messages %} {{ m['role'] }} : {{ m['content'] }} END {% endfor %}{% if add_generation_prompt %} assistant :{% endif %}"


def tokenizer(template=None):
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", extra_special_tokens=["<end>"])
    made.chat_template = template
    return made


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=24,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def family(network, template=None):
    return CausalLM(network, tokenizer(template))


ROW = {"prompt": "what is the sky ?", "completion": "the sky is blue"}
ENDS = TEMPLATE.replace("END", "{{ eos_token if m['role'] == 'assistant' else '' }}")


def test_the_table_shows_the_mask_token_by_token(network):
    model = family(network, ENDS)
    found = preflight([ROW, {**ROW, "completion": "red"}], model)
    (s,) = encode(ROW, model.tokenizer)
    assert [t.id for t in found.table] == s.ids.tolist()
    assert [t.text for t in found.table if t.learned] == ["the", "sky", "is", "blue", "</s>"]
    assert found.notices == []
    assert (found.longest, found.where_longest, found.examined) == (len(s), "rows, row 1", 2)
    assert (found.tokens, found.learned) == (len(s) - 1.5, 3.5)
    plain, coloured = found.lines(), found.lines(colour=True)
    assert [re.sub(r"\x1b\[\d*m", "", line) for line in coloured] == plain
    assert [" + " in line for line in plain[2:]] == [t.learned for t in found.table]
    assert sum("\x1b[32m" in line for line in coloured) == 5
    assert plain[0] == "2 rows, 14 tokens a row, 4 of them learned; the longest is rows, row 1 with 15."


def test_data_cannot_command_the_terminal(network):
    lines = preflight([{**ROW, "prompt": "\x1b[31m sky", "plain": True}], family(network)).lines()
    assert not any("\x1b" in line for line in lines)
    assert any("\\x1b[31m" in line for line in lines)


def test_long_rows_lose_their_middle_in_the_table_only(network):
    network.config.max_position_embeddings, before = 4096, network.config.max_position_embeddings
    try:
        found = preflight([{**ROW, "prompt": "a b c d e " * 50}], family(network))
    finally:
        network.config.max_position_embeddings = before
    lines = found.lines(most=20)
    assert len(found.table) == 256
    assert any("... 236 more ..." in line for line in lines)
    assert len(lines) == 2 + 20 + 1
    assert sum(" + " in line for line in lines) == 5


def test_an_end_that_generation_does_not_stop_at_is_told(network):
    found = preflight([ROW], family(network, TEMPLATE.replace("END", "<end>")))
    assert found.table[-1].text == "<end>"
    assert found.table[-1].learned
    (notice,) = found.notices
    assert "end the answer with '<end>', but generation stops only at '</s>'. Add its id 3" in notice.replace("ends", "end")
    network.generation_config.eos_token_id, before = [2, 3], network.generation_config.eos_token_id
    try:
        assert preflight([ROW], family(network, TEMPLATE.replace("END", "<end>"))).notices == []
    finally:
        network.generation_config.eos_token_id = before


def test_a_template_without_an_end_is_told(network):
    (notice,) = preflight([ROW], family(network, TEMPLATE.replace("END", ""))).notices
    assert "will not learn to end its answers" in notice


def test_a_generation_prompt_that_training_does_not_have_is_told(network):
    opens = ENDS.replace("assistant :{% endif %}", "assistant : a{% endif %}")
    notices = preflight([ROW], family(network, opens)).notices
    assert len(notices) == 1
    assert "generation starts from other tokens than training did" in notices[0]


def test_rows_without_anything_to_learn_are_refused(network):
    silent = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": False}]}
    said = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(DataError, match=r"In x.jsonl, row 2 nothing is learned"):
        preflight(Rows([said, silent], source="x.jsonl"), family(network, ENDS))
    with pytest.raises(DataError, match="holds no rows"):
        preflight([], family(network))
    both = {"messages": [*said["messages"], *silent["messages"]]}
    assert [t.text for t in preflight([both], family(network, ENDS)).table if t.learned] == ["b", "</s>"]


def test_a_mask_without_the_answer_is_refused(network):
    """Marks around the wrong turn."""
    wrong = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{% generation %}{{ m['content'] }}{% endgeneration %}{% else %} {{ m['content'] }}{% endif %} </s> {% endfor %}"
    )
    with pytest.raises(DataError, match="template and the mask disagree: the answer 'the sky is blue'"):
        preflight([ROW], family(network, wrong))


def test_unknown_words_are_told(network):
    notices = preflight([{"prompt": "x y z", "completion": "a"}], family(network)).notices
    assert len(notices) == 1
    assert re.search(r"\d\d% of the tokens are unknown to the tokenizer", notices[0])


@pytest.mark.parametrize("max_length", [None, 24])
def test_rows_longer_than_the_model_reads(network, max_length):
    rows = Rows([ROW, {**ROW, "prompt": "a b c d e " * 6}], source="x.jsonl")
    with pytest.raises(DataError, match=r"1 of 2 rows are longer than 24 tokens; the longest is x.jsonl, row 2 with 36.*too_long: skip"):
        preflight(rows, family(network), max_length=max_length)
    skipped = preflight(rows, family(network), max_length=max_length, too_long="skip")
    assert (len(skipped.rows), len(skipped.rows.aside)) == (1, 1)
    assert "set aside" in skipped.notices[0]
    cut = preflight(rows, family(network), max_length=max_length, too_long="cut")
    assert (len(cut.rows), cut.longest) == (2, 24)
    assert "lose the beginning" in cut.notices[0]


def test_preferences_pairs_and_prompts_pass(network):
    model = family(network, ENDS)
    found = preflight([{"prompt": "a", "chosen": "b", "rejected": "c"}], model)
    assert [t.text for t in found.table if t.learned] == ["b", "</s>"]
    for row in ({"anchor": "a", "positive": "b"}, {"prompt": "a"}, {"text": "a", "label": 1}, {"text": "a b"}, {"state": 1}):
        assert preflight([row], model).notices == []


def test_large_data_is_sampled_with_its_longest_rows(network, monkeypatch):
    from luthier.core import preflight as module

    monkeypatch.setattr(module, "EXAMINED", 600)
    rows = [{"prompt": "a", "completion": "b"}] * 900
    rows[777] = {"prompt": "a b c d", "completion": "b"}
    found = preflight(rows, family(network))
    assert found.examined <= 600
    assert (found.longest, found.where_longest) == (7, "rows, row 778")
    assert "(examined:" in found.lines()[0]
    rows[778] = {"prompt": "a " * 40, "completion": "b"}
    with pytest.raises(DataError, match="row 779 with 43"):
        preflight(rows, family(network))


# -- cost -----------------------------------------------------------------------------------------------------------------------


def test_memory_counts_tensors(network):
    model = family(network)
    params = sum(p.numel() for p in network.parameters())
    cost = estimate(model, [ROW], batch=4, steps=10, optimizer_bytes_per_param=8, measure=False)
    assert cost.parts["weights"] >= 4 * params
    assert cost.parts["weights"] - 4 * params == sum(b.numel() * b.element_size() for b in network.buffers())
    assert (cost.parts["gradients"], cost.parts["optimizer"]) == (4 * params, 8 * params)
    assert cost.memory_bytes == sum(cost.parts.values())
    assert (cost.seconds, cost.tokens) == (None, 10 * 4 * len(encode(ROW, model.tokenizer)[0]))
    assert len(cost.sentences) == 1
    few = estimate(model, [ROW], 4, 10, trainable=100, measure=False)
    assert (few.parts["gradients"], few.parts["optimizer"]) == (400, 800)
    small = estimate(model, [ROW], 4, 10, checkpointing=True, measure=False)
    assert small.parts["activations"] < cost.parts["activations"] / 2


def test_activations_are_of_the_size_that_autograd_keeps():
    """Against the bytes that autograd really saves for one micro-batch."""
    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, attn_implementation="sdpa")
    network = LlamaForCausalLM(config)
    seen: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}

    def keep(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), keep(t))[1], lambda t: t):
        network.model(torch.randint(0, 64, (4, 64))).last_hidden_state.sum()
    guess = estimate(CausalLM(network, None), [], 4, 1, tokens_per_row=64, measure=False).parts["activations"]
    assert 0.5 < guess / sum(seen.values()) < 2


def test_time_follows_the_operations(network):
    model = family(network)
    assert matmul_rate(model, 64, seconds=0.001) > 1e5
    one, ten = (estimate(model, [ROW], 4, steps) for steps in (1, 10))
    assert ten.tokens == 10 * one.tokens
    assert one.seconds > 0
    assert "Time: about" in ten.sentences[1]
    assert "for 10 steps over" in ten.sentences[1]


def test_low_rank_size_is_pefts(network):
    import copy

    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(copy.deepcopy(network), LoraConfig(r=3, target_modules="all-linear"))
    assert low_rank_size(family(network), 3) == sum(p.numel() for p in tuned.parameters() if p.requires_grad)


def test_other_families_are_only_estimated():
    class Pictures(Family):
        kind, verbs = "image-classifier", frozenset({"classify"})

    model = Pictures(torch.nn.Linear(4, 2), None)
    rows = [{"image": np.zeros((2, 2)), "label": 0}]
    assert preflight(rows, model).lines() == []
    assert estimate(model, rows, 1, 1, measure=False).parts["weights"] == 40


def test_before_training_says_it_all(network):
    recipe = types.SimpleNamespace(select=[], budget=None,
        data=types.SimpleNamespace(train_on="completion", max_length=None),
        train=types.SimpleNamespace(steps=None, epochs=2.0, batch=2, tokens_per_micro_batch=64, gradient_checkpointing=False, device="cpu", parallel="auto"),
        adapt=[types.SimpleNamespace(options={"rank": 2}, build=lambda: None)],
    )
    lines = before_training(family(network), Rows([ROW] * 5), recipe)
    assert lines[0].startswith("5 rows, ")
    assert "for 6 steps" in lines[-1]
    assert lines[-2].startswith("Memory: about")
    assert before_training(family(network), None, recipe) == []
