"""The tokenizer: 1,024 fixed entries, never <unk>, and decoding gives the text back."""

from __future__ import annotations

import functools
import hashlib

import numpy as np
import pytest

import luthier.lab as lab
from luthier.lab.mixture import MIXTURE_A, drawn, encode
from luthier.lab.tokenizer import SIZE, entries, save, tokenizer


@functools.cache
def texts() -> list[str]:
    found = [f"{prompt} {completion}".strip() for prompt, completion in drawn(np.random.default_rng(0), 500, MIXTURE_A)]
    for spec in ("traces?skills=all&style=2", "facts?forms=question,explain&contracts=plain,json,capitals", "sounds", "grammar?languages=1,2,3,4", "corpus", "corpus?kind=code",
                 "scenes?objects=1-4&caption=paragraph", "scenes?language=2"):  # fmt: skip
        for row in lab.make(spec, n=30).train:
            found += [str(row[key]) for key in ("prompt", "completion", "text", "anchor", "positive") if key in row]
    return found


def test_decoding_gives_all_lab_text_back_exactly():
    tok = tokenizer()
    for text in texts():
        ids = tok(text)["input_ids"]
        assert ids[0] == tok.bos_token_id and tok.unk_token_id not in ids
        assert tok.decode(ids[1:]) == text


def test_the_fast_encoder_agrees_with_the_tokenizer():
    for text in texts()[::7]:
        assert tokenizer()(text)["input_ids"][1:] == encode(text)


@pytest.mark.parametrize("text", ["Crème brûlée", "漢字 ok", "unheard-of WORDS, 3.14!", "a\tb\nc", "x" * 500])
def test_nothing_is_ever_unknown(text):
    assert tokenizer().unk_token_id not in tokenizer()(text)["input_ids"]


def test_the_entries_are_fixed():
    words = entries()
    assert len(words) == SIZE == len(tokenizer())
    assert [words[w] for w in ("<pad>", "<bos>", "<eos>", "<mask>", "<unk>")] == [0, 1, 2, 3, 4]
    assert all(word in words for word in ("<refuse>", "<s9>", "##z", "AE1", "chain", "paris", "circle", "RESTRICTED"))
    # The shipped weights depend on this order.
    assert hashlib.sha256("\n".join(words).encode()).hexdigest()[:16] == FINGERPRINT


FINGERPRINT = "f8e91a5ff2da4095"


def test_a_saved_tokenizer_loads_with_plain_transformers(tmp_path):
    from transformers import AutoTokenizer

    save(tmp_path, chat=True)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("the servers help <refuse>")["input_ids"] == tokenizer()("the servers help <refuse>")["input_ids"]
    chat = loaded.apply_chat_template([{"role": "user", "content": "copy 1 2 ="}], tokenize=False, add_generation_prompt=True)
    assert chat == "<bos> user : copy 1 2 = assistant :"
    save(tmp_path / "base")
    assert AutoTokenizer.from_pretrained(tmp_path / "base").chat_template is None and tokenizer().chat_template
