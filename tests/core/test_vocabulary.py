"""New tokens: what they start as, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch

from luthier.core.vocabulary import add_tokens
from luthier.errors import ModelError
from tests.helpers import tiny_llama
from tests.objective.lm_batches import random_batch


@pytest.mark.parametrize("tied", [False, True])
def test_new_words_are_distinct_and_leave_the_old_ones_as_they_were(tied):
    family = tiny_llama(tie_word_embeddings=tied)
    network, batch = family.network, random_batch()
    into, out = network.get_input_embeddings().weight, network.get_output_embeddings().weight
    before = family.score(batch).map(lambda z, i: z).detach()
    old = into.detach().clone()
    ids = add_tokens(family, ["[A]", "[B]", "w3", "[A]"])
    assert ids == [64, 65, family.processor.convert_tokens_to_ids("w3"), 64]
    assert network.get_input_embeddings().weight is into and network.get_output_embeddings().weight is out and (into is out) == tied
    assert into.shape[0] == out.shape[0] == network.config.vocab_size == 66 and torch.equal(into[:64], old)
    assert not torch.equal(into[64], into[65])
    # like an ordinary word: its distance to the mean is that of the others
    far = (into.detach() - old.mean(0)).norm(dim=1)
    assert 0.5 * far[:64].mean() < far[64:].min() and far[64:].max() < 2 * far[:64].mean()
    torch.testing.assert_close(family.score(batch).map(lambda z, i: z).detach()[:, :64], before)
    assert add_tokens(family, ["[A]"]) == [64] and add_tokens(family, []) == [] and into.shape[0] == 66


def test_the_same_model_gets_the_same_words():
    one, two = tiny_llama(), tiny_llama()
    for family in (one, two):
        add_tokens(family, ["[A]", "[B]"])
    assert torch.equal(one.network.get_input_embeddings().weight, two.network.get_input_embeddings().weight)


def test_an_adapted_embedding_is_refused():
    from peft import LoraConfig, get_peft_model

    family = tiny_llama()
    family.network = get_peft_model(family.network, LoraConfig(target_modules=["embed_tokens"]))
    with pytest.raises(ModelError, match="embedding"):
        add_tokens(family, ["[A]"])
