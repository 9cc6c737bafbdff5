"""Rows to tokens: the mask is right for any chat template, prompts are prefixes, nothing is cut silently."""

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from luthier.core.rows import answer_of, encode, fit_lengths, lengths, prompt_ids, prompt_text
from luthier.errors import DataError, RecipeError

SPECIALS = [
    "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]",
    "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>",
]  # fmt: skip
TEXT = ["What is the sky's colour? The sky is blue, user.", "system assistant user model", "I think about it. <think> why </think> Because.\n\n", *["user\n\nmodel\n\n\nuser"] * 3]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}" + CHATML
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (  # the system prompt goes into the LAST user turn, so history is rewritten with every turn
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}{% set rest = messages[1:] %}{% else %}"
    "{% set system = '' %}{% set rest = messages %}{% endif %}{% set ns = namespace(last=0) %}{% for m in rest %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{{ bos_token }}{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}[INST] {{ system if loop.index0 == ns.last else '' }}"
    "{{ m['content'] }}[/INST]{% else %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ first if loop.first else '' }}{{ m['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
THINKS = (  # qwen3: thoughts of earlier answers are dropped, the last answer gets an empty thought if it has none
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% set c = m['content'] %}{% set thought = '' %}"
    "{% if '</think>' in c %}{% set thought = c.split('</think>')[0].split('<think>')[-1].strip() %}{% set c = c.split('</think>')[-1].lstrip() %}{% endif %}"
    "<|im_start|>assistant\n{% if loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ c }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
R1 = (  # deepseek-r1: the generation prompt opens a thought that no rendered answer has
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}{% else %}<|assistant|>"
    "{{ m['content'].split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED_WITHOUT_END = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>"), "chatml-default-system": (CHATML_DEFAULT_SYSTEM, "<|im_end|>"), "llama3": (LLAMA3, "<|eot_id|>"),
    "mistral": (MISTRAL, "</s>"), "gemma": (GEMMA, "<end_of_turn>"), "marked": (MARKED, "<|im_end|>"),
    "marked-without-end": (MARKED_WITHOUT_END, "<|im_end|>"),
}  # fmt: skip


def bpe(template=None, eos="</s>", bos=True, trim_offsets=True):
    inner = Tokenizer(models.BPE())
    # As in Llama 3 and Qwen: line ends stay together, whatever follows them.
    cut = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(cut, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIALS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    )
    steps = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if bos:
        steps.append(processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", inner.token_to_id("<s>"))]))
    inner.post_processor = processors.Sequence(steps)
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token=eos, pad_token="<pad>", extra_special_tokens=SPECIALS[3:], clean_up_tokenization_spaces=False
    )
    made.chat_template = template
    return made


@pytest.fixture(scope="module")
def plain():
    return bpe()


def words(names, eos=True):
    vocab = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", *names])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>" if eos else None)


def learned(sequence, tokenizer):
    """The supervised stretches, decoded."""
    runs, current = [], []
    for token, on in zip(sequence.ids, sequence.mask):
        if on:
            current.append(token)
        elif current:
            runs.append(tokenizer.decode(current))
            current = []
    return runs + ([tokenizer.decode(current)] if current else [])


TALK = [
    {"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "user"}, {"role": "user", "content": "The sky?"},
    {"role": "assistant", "content": "It is blue.\n"},
]  # fmt: skip


def clean(stretches):
    return [s.strip() for s in stretches]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "user: be brief"}]])
def test_every_template_supervises_the_answers_and_their_end(name, trim, system):
    template, end = TEMPLATES[name]
    tokenizer = bpe(template, eos=end, trim_offsets=trim)
    example = {"messages": system + TALK}
    (s,) = encode(example, tokenizer)
    assert s.ids.tolist() == tokenizer.apply_chat_template(system + TALK, tokenize=True, return_dict=False)
    assert [x.replace("\n", "") for x in clean(learned(s, tokenizer))] == [f"user{end}", f"It is blue.{end}"]
    assert all(x.endswith(end) for x in learned(s, tokenizer)), "what follows the end of turn is never produced"
    (last,) = encode(example, tokenizer, train_on="last")
    assert learned(last, tokenizer) == learned(s, tokenizer)[-1:]
    (whole,) = encode(example, tokenizer, train_on="all")
    assert whole.mask.all()
    assert (whole.ids == s.ids).all()


@pytest.mark.parametrize("name", TEMPLATES)
def test_generation_starts_from_a_prefix_of_what_was_trained(name):
    template, end = TEMPLATES[name]
    tokenizer = bpe(template, eos=end)
    for example in (
        {"prompt": "What is the sky?", "completion": "Blue"},
        {"messages": TALK},
        {"messages": [{"role": "system", "content": "Be brief."}, *TALK]},
        {"prompt": "Why?", "completion": "Because", "system": "Be brief."},
        {"prompt": TALK[:1], "completion": TALK[1:2]},
    ):
        (s,) = encode(example, tokenizer, train_on="last")
        head = prompt_ids(example, tokenizer)
        assert s.ids[: len(head)].tolist() == head.tolist()
        assert s.supervised[0] == len(head)
        assert (s.ids == tokenizer.bos_token_id).sum() == (template.count("bos_token") > 0), "one beginning, never two"
        decoded = tokenizer.decode(s.ids[s.mask])
        assert answer_of(example).strip() in decoded


def test_generation_marks_give_transformers_own_mask():
    tokenizer = bpe(MARKED, eos="<|im_end|>")
    theirs = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    (ours,) = encode({"messages": TALK}, tokenizer)
    assert ours.ids.tolist() == theirs["input_ids"]
    assert ours.mask.astype(int).tolist() == theirs["assistant_masks"]
    tokenizer.chat_template = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert encode({"messages": TALK}, tokenizer)[0].mask.tolist() == ours.mask.tolist(), "the same text without marks has the same mask"


def test_chosen_turns_and_assistant_turns_inside_a_prompt():
    tokenizer = bpe(CHATML, eos="<|im_end|>")
    turns = [dict(m) for m in TALK]
    turns[1]["train"] = False
    (s,) = encode({"messages": turns}, tokenizer)
    assert learned(s, tokenizer) == ["It is blue.\n<|im_end|>"]
    turns[1]["train"], turns[3]["train"], turns[2]["train"] = True, False, True
    (s,) = encode({"messages": turns}, tokenizer)
    assert learned(s, tokenizer) == ["user<|im_end|>", "<|im_start|>user\nThe sky?<|im_end|>"]
    example = {"prompt": TALK[:3], "completion": TALK[3:]}
    assert len(learned(encode(example, tokenizer)[0], tokenizer)) == 1
    assert len(learned(encode(example, tokenizer, train_on="assistant")[0], tokenizer)) == 2


def test_thoughts_dropped_from_history_are_not_supervised_there():
    tokenizer = bpe(THINKS, eos="<|im_end|>")
    talk = [
        {"role": "user", "content": "a?"}, {"role": "assistant", "content": "<think> why </think> a"}, {"role": "user", "content": "b?"},
        {"role": "assistant", "content": "<think> so </think>\n\nb"},
    ]  # fmt: skip
    (s,) = encode({"messages": talk}, tokenizer)
    assert "why" not in tokenizer.decode(s.ids)
    assert learned(s, tokenizer) == ["a<|im_end|>", "<think>\nso\n</think>\n\nb<|im_end|>"]
    head = prompt_ids({"messages": talk}, tokenizer)
    assert s.ids[: len(head)].tolist() == head.tolist()
    (s,) = encode({"prompt": "a?", "completion": "b"}, tokenizer)
    assert learned(s, tokenizer) == ["<think>\n\n</think>\n\nb<|im_end|>"], "the model itself must write the empty thought"


def test_a_template_whose_generation_prompt_is_no_prefix():
    tokenizer = bpe(R1)
    (s,) = encode({"messages": [*TALK[:3], {"role": "assistant", "content": "<think> x </think>assistant"}]}, tokenizer)
    assert learned(s, tokenizer) == ["user</s>", "assistant</s>"]


def test_a_template_that_changes_the_words_is_refused_and_marks_help():
    shouting = CHATML.replace("m['content']", "m['content'] | upper").replace("{% endfor %}", "{% endfor %}{% if messages | length > 3 %} {% endif %}")
    tokenizer = bpe("{{ messages | length }}" + shouting, eos="<|im_end|>")
    with pytest.raises(DataError, match=r"row 7.*\n?.*train_on: all|cannot be trained on turn by turn"):
        encode({"messages": TALK}, tokenizer, row=7)
    assert encode({"messages": TALK}, tokenizer, train_on="all")[0].mask.all()
    tokenizer.chat_template = "{{ messages | length }}" + MARKED.replace("{% generation %}{{ m['content'] }}", "{% generation %}{{ m['content'] | upper }}")
    assert learned(encode({"messages": TALK}, tokenizer)[0], tokenizer) == ["USER<|im_end|>", "IT IS BLUE.\n<|im_end|>"]


def test_words_replaced_in_history_are_not_taken_for_the_answer():
    tokenizer = bpe("{{ messages | length }}" + CHATML.replace("m['content']", "m['content'] | replace('blue', 'BLUE')"), eos="<|im_end|>")
    with pytest.raises(DataError, match="turn 4 of row 0 cannot be found"):
        encode({"messages": TALK}, tokenizer)


def test_a_template_that_raises_names_the_row():
    tokenizer = bpe(MISTRAL)
    with pytest.raises(DataError, match=r"row 2.*roles must alternate"):
        encode({"messages": [TALK[0], TALK[0], TALK[1]]}, tokenizer, row=2)
    with pytest.raises(DataError, match="no chat template"):
        encode({"messages": TALK}, bpe())


def test_rows_give_values_to_the_template_but_never_another_template():
    tokenizer = bpe("{{ mood if mood is defined else '' }}" + CHATML, eos="<|im_end|>")
    (s,) = encode({"messages": TALK, "chat_template_kwargs": {"mood": "sky"}}, tokenizer)
    assert tokenizer.decode(s.ids).startswith("sky<|im_start|>")
    for wrong in ({"chat_template": "x"}, {"tokenize": True}, ["mood"], "mood"):
        with pytest.raises(DataError, match="chat_template_kwargs holds"):
            encode({"messages": TALK, "chat_template_kwargs": wrong}, tokenizer)


def test_tool_calls_without_content_are_learned():
    template = CHATML.replace("{{ m['content'] }}", "{{ m['content'] or '' }}{% for c in m['tool_calls'] %}call {{ c['name'] }}{% endfor %}")
    tokenizer = bpe("{% if tools %}{{ tools[0]['name'] }};{% endif %}" + template, eos="<|im_end|>")
    talk = [TALK[0], {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}, {"role": "tool", "content": "blue"}, TALK[3]]
    (s,) = encode({"messages": talk, "tools": [{"name": "look"}]}, tokenizer)
    assert learned(s, tokenizer) == ["call look<|im_end|>", "It is blue.\n<|im_end|>"]
    assert tokenizer.decode(s.ids).startswith("look;")


# -- plain text ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize(("prompt", "completion"), [("The sky is", " blue"), ("The sky is ", "blue"), ("Sky:\n", "blue 😀"), ("x=", "4"), ("", "blue")])
def test_plain_text_is_tokenised_as_one(prompt, completion, trim):
    tokenizer = bpe(trim_offsets=trim)
    (s,) = encode({"prompt": prompt, "completion": completion}, tokenizer)
    joined = tokenizer(prompt + completion)["input_ids"] + [tokenizer.eos_token_id]
    assert s.ids.tolist() == joined
    assert tokenizer.decode(s.ids[s.mask]).strip() == f"{completion.strip()}</s>"
    assert s.mask[-1]


def test_plain_prompts_are_prefixes_where_the_boundary_is_clean(plain):
    example = {"prompt": "The sky is", "completion": " blue"}
    head = prompt_ids(example, plain)
    (s,) = encode(example, plain)
    assert s.ids[: len(head)].tolist() == head.tolist()
    assert s.supervised[0] == len(head)
    assert plain.decode(head) == "<s>The sky is"


def test_a_plain_row_ignores_the_template():
    tokenizer = bpe(CHATML)
    (s,) = encode({"prompt": "The sky is", "completion": " blue", "plain": True}, tokenizer)
    assert tokenizer.decode(s.ids) == "<s>The sky is blue</s>"
    assert "<|im_start|>" in tokenizer.decode(encode({"prompt": "The sky is", "completion": " blue"}, tokenizer)[0].ids)


def test_a_text_that_already_begins_and_ends_is_not_begun_twice(plain):
    (s,) = encode({"prompt": "<s>The sky is", "completion": " blue</s>"}, plain)
    assert plain.decode(s.ids) == "<s>The sky is blue</s>"
    assert plain.decode(prompt_ids({"prompt": "<s>The"}, plain)) == "<s>The"


def test_word_tokenizers_join_with_a_space():
    tokenizer = words(["2", "+", "=", "4", "=4"])
    (s,) = encode({"prompt": "2 + 2 =", "completion": "4"}, tokenizer)
    assert tokenizer.convert_ids_to_tokens(s.ids) == ["2", "+", "2", "=", "4", "</s>"]
    assert s.mask.tolist() == [False] * 4 + [True, True]
    no_end = words(["2", "+", "=", "4"], eos=False)
    assert no_end.convert_ids_to_tokens(encode({"prompt": "2 + 2 =", "completion": "4"}, no_end)[0].ids) == ["2", "+", "2", "=", "4"]


def test_all_tokens_of_a_plain_row_but_the_beginning(plain):
    (s,) = encode({"prompt": "The sky is", "completion": " blue"}, plain, train_on="all")
    assert s.mask.tolist() == [False] + [True] * (len(s) - 1)
    (t,) = encode({"text": "The sky is blue"}, plain)
    assert (t.ids == s.ids).all()
    assert (t.mask == s.mask).all()
    assert t.branch == "completion"


def test_tokenizers_without_offsets_give_the_same_mask(plain):
    """The same tokens, served by a tokenizer that cannot tell where they lie."""

    class Slow:
        is_fast, chat_template, eos_token_id, bos_token_id = False, None, plain.eos_token_id, plain.bos_token_id

        def __call__(self, text, add_special_tokens=True, verbose=False, **other):
            assert "return_offsets_mapping" not in other
            return plain(text, add_special_tokens=add_special_tokens)

        def __len__(self):
            return len(plain)

    for prompt, completion in (("The sky is", " blue"), ("The sky is ", "blue")):
        fast, slow = (encode({"prompt": prompt, "completion": completion}, t)[0] for t in (plain, Slow()))
        assert fast.ids.tolist() == slow.ids.tolist()
        assert fast.mask.tolist() == slow.mask.tolist()


# -- other kinds --------------------------------------------------------------------------------------------------------------


PREFERENCES = [
    {"prompt": "What?", "chosen": "Blue", "rejected": "Red"},
    {"prompt": "The sky is ", "chosen": "blue", "rejected": "\n\nred"},
    {"prompt": TALK[:1], "chosen": TALK[1:2], "rejected": TALK[3:]},
    {"chosen": [TALK[0], TALK[1]], "rejected": [TALK[0], TALK[3]]},
    {"prompt": "What is it?", "chosen": [TALK[0], TALK[1]], "rejected": [TALK[0], TALK[3]]},
    {"prompt": "What is it?", "chosen": TALK[1:2], "rejected": TALK[3:]},
]


@pytest.mark.parametrize(
    ("name", "example"), [(n, e) for n in ("chatml", "llama3", "gemma", "mistral", None) for e in PREFERENCES if n or isinstance(e["chosen"], str)]
)
def test_both_answers_share_the_prompts_tokens(name, example):
    template, end = TEMPLATES.get(name, (None, "</s>"))
    tokenizer = bpe(template, eos=end)
    chosen, rejected = encode(example, tokenizer)
    assert (chosen.branch, rejected.branch) == ("chosen", "rejected")
    n = chosen.supervised[0]
    assert n == rejected.supervised[0]
    assert chosen.ids[:n].tolist() == rejected.ids[:n].tolist()
    for s, answer in ((chosen, example["chosen"]), (rejected, example["rejected"])):
        text = answer if isinstance(answer, str) else answer[-1]["content"]
        assert tokenizer.decode(s.ids[s.mask]).replace(end, "").strip() == text.strip()
        assert s.ids[-1 if name is None else np.flatnonzero(s.mask)[-1]] == tokenizer.eos_token_id
    assert prompt_ids(example, tokenizer).tolist() == chosen.ids[:n].tolist()


def test_implicit_string_prompts_are_plain_text():
    tokenizer = bpe(CHATML)
    chosen, rejected = encode({"chosen": "Human: hi\nAssistant: yes", "rejected": "Human: hi\nAssistant: no"}, tokenizer)
    assert tokenizer.decode(chosen.ids) == "<s>Human: hi\nAssistant: yes</s>"
    assert tokenizer.decode(chosen.ids[chosen.mask]) == " yes</s>"
    assert tokenizer.decode(rejected.ids[rejected.mask]) == " no</s>"


def test_pairs_texts_and_prompts_are_read_and_not_supervised(plain):
    made = encode({"anchor": "a", "positive": "b", "negative": ["c", "d"], "negative_1": "e"}, plain, row=4)
    assert [s.branch for s in made] == ["anchor", "positive", "negative", "negative", "negative"]
    assert [plain.decode(s.ids) for s in made] == ["<s>a", "<s>b", "<s>c", "<s>d", "<s>e"]
    assert not any(s.mask.any() for s in made)
    assert {s.row for s in made} == {4}
    (s,) = encode({"text": "The sky", "label": 1}, plain)
    assert (s.branch, s.mask.any()) == ("text", False)
    (s,) = encode({"prompt": "The sky"}, plain)
    assert (s.branch, s.mask.any(), plain.decode(s.ids)) == ("prompt", False, "<s>The sky")
    chat = bpe(CHATML)
    assert chat.decode(encode({"prompt": "Why?"}, chat)[0].ids).endswith("<|im_start|>assistant\n")
    with pytest.raises(DataError, match="no text"):
        encode({"image": np.zeros((2, 2)), "label": 1}, plain)
    with pytest.raises(RecipeError, match="Did you mean 'completion'"):
        encode({"prompt": "a", "completion": "b"}, plain, train_on="completions")


def test_what_people_and_verifiers_read():
    assert answer_of({"prompt": "a", "completion": "b"}) == "b"
    assert answer_of({"messages": TALK}) == "It is blue.\n"
    assert answer_of(PREFERENCES[3]) == "user"
    assert answer_of({"chosen": "x: yes", "rejected": "x: no"}) == " yes"
    assert answer_of({"prompt": "a"}) is None
    assert answer_of({"text": "a", "label": 1}) is None
    assert prompt_text({"prompt": "a", "completion": "b"}) == "a"
    assert prompt_text({"messages": TALK[:2]}) == "What is it?"
    assert prompt_text({"messages": TALK}) == "user: What is it?\nassistant: user\nuser: The sky?"
    assert prompt_text({"image": 1, "label": 2}) == ""


def test_the_memory_does_not_leak_into_rows(plain):
    example = {"prompt": "The sky is", "completion": " blue"}
    (first,) = encode(example, plain)
    first.ids[:] = 0
    first.mask[:] = True
    (second,) = encode(example, plain, row=3)
    assert second.row == 3
    assert plain.decode(second.ids) == "<s>The sky is blue</s>"
    tokenizer = bpe(CHATML)
    one = encode(example, tokenizer)[0].ids.tolist()
    tokenizer.chat_template = LLAMA3
    assert encode(example, tokenizer)[0].ids.tolist() != one


# -- length -------------------------------------------------------------------------------------------------------------------


LONG = {"prompt": "The sky is" * 10, "completion": " blue, blue, blue"}


def test_long_rows_are_refused_set_aside_or_cut(plain):
    rows = [{"prompt": "The", "completion": " sky"}, LONG]
    sizes = lengths(rows, plain)
    assert sizes.tolist() == [len(encode(r, plain)[0]) for r in rows]
    limit = int(sizes[1]) - 5
    with pytest.raises(DataError, match=rf"row 1.*{sizes[1]} tokens.*max_length = {limit}"):
        encode(LONG, plain, row=1, max_length=limit)
    with pytest.raises(DataError, match=r"1 of 2 rows are longer.*row 2 with"):
        fit_lengths(rows, plain, limit)
    kept = fit_lengths(rows, plain, limit, "skip")
    assert (len(kept), len(kept.aside), kept.ids.tolist()) == (1, 1, [0])
    cut = fit_lengths(rows, plain, limit, "cut")
    assert cut.ids.tolist() == [0, 1]
    assert "max_length" not in rows[1], "the given rows are not changed"
    (whole,), (short,) = encode(LONG, plain), encode(cut[1], plain)
    assert len(short) == limit
    assert short.ids[0] == plain.bos_token_id
    assert short.ids[1:].tolist() == whole.ids[6:].tolist()
    assert short.ids[short.mask].tolist() == whole.ids[whole.mask].tolist()
    head = prompt_ids(cut[1], plain)
    assert short.ids[: len(head)].tolist() == head.tolist()
    assert fit_lengths(rows, plain, 1000) is not None


def test_an_answer_is_never_cut(plain):
    with pytest.raises(DataError, match="leaves no room"):
        fit_lengths([LONG], plain, 4, "cut")
    with pytest.raises(RecipeError, match="stop, skip or cut"):
        fit_lengths([LONG], plain, 4, "drop")


def test_cut_preferences_still_share_their_prompt(plain):
    example = {"prompt": LONG["prompt"], "chosen": "blue", "rejected": "red, or so I think"}
    whole = encode(example, plain)
    chosen, rejected = encode(example, plain, max_length=max(map(len, whole)) - 4, too_long="cut")
    n = chosen.supervised[0]
    assert n == rejected.supervised[0] == whole[0].supervised[0] - 4
    assert chosen.ids[:n].tolist() == rejected.ids[:n].tolist()
    (text,) = encode({"text": "The sky is blue", "label": 0}, plain, max_length=3, too_long="cut")
    assert text.ids.tolist() == plain("The sky is blue")["input_ids"][:3]


def test_a_tokenizer_loaded_again_goes_on_with_what_was_encoded_and_another_never_does(monkeypatch):
    from luthier.core import encode as module

    row, done, whole = {"text": "a very particular sky"}, [], module._encode
    monkeypatch.setattr(module, "_encode", lambda *args: done.append(1) or whole(*args))
    first, again, other = bpe(), bpe(), bpe(bos=False)
    (a,), (b,), (c,) = (encode(row, t) for t in (first, again, other))
    assert len(done) == 2 and a.ids.tolist() == b.ids.tolist(), "alike: remembered"
    assert b.ids.tolist() == [first.bos_token_id, *c.ids.tolist()], "the other writes no beginning, so nothing was taken over"
    first.chat_template = CHATML
    (turned,) = encode({"prompt": "a", "completion": "sky"}, first)
    (plainly,) = encode({"prompt": "a", "completion": "sky"}, again)
    assert turned.ids.tolist() != plainly.ids.tolist(), "another template, another memory"
