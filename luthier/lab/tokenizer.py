"""The one tokenizer of the lab: a WordPiece file of 1,024 fixed entries, built from the word lists, never trained.

Lab text is words separated by single spaces. A word outside the list falls apart into `x ##y ##z` letters, so no
printable text is ever `<unk>`, and decoding gives the words back with their spaces, exactly.
"""

from __future__ import annotations

import functools
from pathlib import Path

from luthier.lab.words import SENTINELS, SPECIALS, vocabulary

SIZE = 1024
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} {{ m['role'] }} : {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %} {{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} assistant :{% endif %}"
)


def entries() -> dict[str, int]:
    """word -> id; free places at the end are reserved so that the size never changes."""
    words = vocabulary()
    if len(words) > SIZE:
        raise ValueError(f"the word lists hold {len(words)} entries, {len(words) - SIZE} too many")
    words += [f"<reserved{i}>" for i in range(SIZE - len(words))]
    return {word: i for i, word in enumerate(words)}


@functools.cache
def tokenizer():
    """`lab-1024` as a transformers PreTrainedTokenizerFast."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = entries()
    piece = models.WordPiece(vocab, unk_token="<unk>", continuing_subword_prefix="##", max_input_chars_per_word=100_000)
    inner = Tokenizer(piece)
    # Accents fall away and every other foreign character becomes '?', which is an entry.
    inner.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Replace(Regex(r"[^\s\x21-\x7e]"), "?")]
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    inner.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <eos> $B", special_tokens=[("<bos>", vocab["<bos>"]), ("<eos>", vocab["<eos>"])]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        mask_token="<mask>",
        unk_token="<unk>",
        extra_special_tokens=SPECIALS[5:] + SENTINELS,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
        padding_side="right",
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def save(folder: Path | str, chat: bool = False) -> None:
    """Write the tokenizer beside a model. Only a chat model carries a template: the others were never shown one."""
    import copy

    made = copy.deepcopy(tokenizer())
    made.chat_template = CHAT_TEMPLATE if chat else None
    made.save_pretrained(str(folder))
