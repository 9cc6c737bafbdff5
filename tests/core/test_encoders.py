"""Text encoders, image classifiers and dual encoders against transformers and sentence-transformers."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
import transformers

from luthier.core.batch import Sequence
from luthier.core.encoders import ImageClassifier, TextEncoder, pool, texts_of
from luthier.core.fetch import fetch
from luthier.core.heads import UNLABELLED, classes_of
from luthier.core.models import load, save_network
from luthier.core.pixels import pixels
from luthier.errors import DataError, ModelError
from tests.helpers import tiny_bert, tiny_clip, tiny_llama, tiny_tokenizer, tiny_vit

TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w1"]
RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 256, (12, 12, 3), dtype=np.uint8), RNG.random((12, 12)).astype(np.float32), RNG.random((24, 24, 3))]


# -- vectors ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["mean", "cls", "max", "last"])
def test_pooling_equals_each_text_alone(how):
    family = tiny_bert()
    family.pooling = how
    found = family.embed(TEXTS)
    for text, vector in zip(TEXTS, found):
        ids = torch.tensor([family.tokenizer(text)["input_ids"]])
        hidden = family.network.bert(ids).last_hidden_state[0]
        wanted = {"mean": hidden.mean(0), "cls": hidden[0], "max": hidden.amax(0), "last": hidden[-1]}[how]
        torch.testing.assert_close(vector, wanted, rtol=1e-5, atol=1e-5)


def test_a_sentence_transformer_of_the_saved_folder_gives_the_same(tmp_path):
    from sentence_transformers import SentenceTransformer

    for how in ("mean", "cls"):
        family = tiny_bert()
        family.pooling = how
        save_network(family, tmp_path / how)
        other = SentenceTransformer(str(tmp_path / how), device="cpu")
        with torch.no_grad():
            np.testing.assert_allclose(family.embed(TEXTS).numpy(), other.encode(TEXTS), rtol=1e-4, atol=1e-5)
        assert load(tmp_path / how).pooling == how


def test_many_texts_run_in_chunks_and_come_back_in_order():
    family = tiny_bert()
    texts = [" ".join(f"w{j % 30}" for j in range(i % 9 + 1)) for i in range(150)]
    with torch.no_grad():
        found = family.embed(texts)
        for i in (0, 77, 149):
            torch.testing.assert_close(found[i], family.embed([texts[i]])[0], rtol=1e-4, atol=1e-5)


def test_branches_of_a_batch():
    family = tiny_bert()
    rows = [{"anchor": "w1", "positive": "w2 w3", "negatives": ["w4", "w5 w6"]}, {"anchor": "w7", "positive": "w8", "negative": "w9"}]
    batch = family.collate(rows)
    assert [(s.row, s.branch) for s in batch.sequences] == [(0, "anchor"), (0, "positive"), (0, "negative"), (0, "negative"), (1, "anchor"), (1, "positive"), (1, "negative")]
    torch.testing.assert_close(family.embed(batch, "negative"), family.embed(["w4", "w5 w6", "w9"]))
    assert family.embed(batch).shape == (7, 32)
    with pytest.raises(DataError, match="nothing to embed in the branch 'text'"):
        family.embed(batch, "text")


def test_long_texts_are_cut_and_keep_their_end():
    family = tiny_bert(max_position_embeddings=8)
    s = family.encode("w1 " * 50)
    assert len(s) == 8 and s.ids[-1] == family.tokenizer.eos_token_id
    family.cut = 5
    assert len(family.encode("w1 " * 50)) == 5


def test_pairs_of_texts_have_segments():
    family = tiny_bert(classes=2)
    inner = family.tokenizer.backend_tokenizer
    from tokenizers import processors

    inner.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", pair="<bos> $A <eos> $B:1 <eos>:1", special_tokens=[("<bos>", 1), ("<eos>", 2)])
    batch = family.collate([{"premise": "w1 w2", "hypothesis": "w3", "label": 1}, {"text": "w1", "label": 0}])
    made = family.tokenizer("w1 w2", "w3", return_tensors="pt", return_token_type_ids=True)
    torch.testing.assert_close(family.classify(batch)[0], family.network(**made).logits[0], rtol=1e-5, atol=1e-5)
    assert batch.sequences[0].data["token_types"].tolist() == [0, 0, 0, 0, 1, 1]


def test_texts_of_rows():
    assert texts_of({"prompt": "a", "completion": "b"}) == [("text", "a b")]
    assert texts_of({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) == [("text", "a\nb")]
    with pytest.raises(DataError, match="Row 4 has no text"):
        texts_of({"image": 1}, 4)
    with pytest.raises(DataError, match="positive is not a text but a int"):
        texts_of({"anchor": "a", "positive": [3]})


def test_prompt_tuned_encoders_run_pefts_forward():
    from peft import PromptTuningConfig, get_peft_model

    family = tiny_bert(classes=2)
    torch.manual_seed(0)
    family.network = get_peft_model(family.network, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)).eval()
    batch = family.collate([{"text": t, "label": 0} for t in TEXTS])
    wanted = [family.network(input_ids=torch.tensor([family.tokenizer(t)["input_ids"]])).logits[0] for t in TEXTS]
    torch.testing.assert_close(family.classify(batch), torch.stack(wanted), rtol=1e-4, atol=1e-5)
    hidden, real = family.states(batch.sequences)
    assert hidden.shape[:2] == real.shape
    assert not torch.allclose(TextEncoder(family.base_network, family.processor).embed(TEXTS), pool(hidden, real))


# -- masked words -------------------------------------------------------------------------------------------------------
def _networks():
    common = {"vocab_size": 40, "pad_token_id": 0}
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.3}
    yield transformers.BertForMaskedLM(transformers.BertConfig(**common, **small))
    yield transformers.RobertaForMaskedLM(transformers.RobertaConfig(**common, **small, type_vocab_size=1))
    yield transformers.DistilBertForMaskedLM(transformers.DistilBertConfig(**common, dim=16, hidden_dim=16, n_layers=1, n_heads=2, max_position_embeddings=32))
    yield transformers.ElectraForMaskedLM(transformers.ElectraConfig(**common, **small, embedding_size=16))
    yield transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**common, **small, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2))


@pytest.mark.parametrize("network", _networks(), ids=lambda n: type(n).__name__)
def test_masked_words_are_scored_at_their_own_place(network):
    family = TextEncoder(network.eval(), tiny_tokenizer(40, wrapped=True))
    rows = []
    for ids, hidden in (([1, 20, 21, 22, 2], [2]), ([1, 30, 31, 32, 33, 34, 2], [1, 4])):
        mask = np.isin(np.arange(len(ids)), hidden)
        rows.append(Sequence(np.where(mask, 4, ids), mask, targets=np.array(ids)))
    found = family.score(rows)
    wanted = []
    for s in rows:
        logp = torch.log_softmax(network(torch.from_numpy(s.ids)[None]).logits[0].float(), -1)
        wanted += [logp[i, s.targets[i]] for i in np.flatnonzero(s.mask)]
    torch.testing.assert_close(found.logp, torch.stack(wanted), rtol=1e-4, atol=1e-5)
    assert found.sequence.tolist() == [0, 1, 1]
    assert "score" not in family.verbs  # classification and ranking are not left-to-right scoring


def test_bare_encoders_score_nothing():
    with pytest.raises(ModelError, match="no masked-word head"):
        tiny_bert(classes=2).score([])


# -- classes ------------------------------------------------------------------------------------------------------------
def _classifiers():
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32, "num_labels": 3, "vocab_size": 40, "pad_token_id": 0}
    yield transformers.BertForSequenceClassification(transformers.BertConfig(**small))
    yield transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**small))
    yield transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(dim=16, hidden_dim=16, n_layers=1, n_heads=2, vocab_size=40, num_labels=3, pad_token_id=0))


@pytest.mark.parametrize("network", _classifiers(), ids=lambda n: type(n).__name__)
def test_text_features_and_head_give_the_networks_logits(network):
    family = TextEncoder(network.eval(), tiny_tokenizer(40, wrapped=True))
    batch = family.collate([{"text": t, "label": i} for i, t in enumerate(TEXTS)])
    wanted = torch.cat([network(torch.tensor([family.tokenizer(t)["input_ids"]])).logits for t in TEXTS])
    torch.testing.assert_close(family.classify(batch), wanted, rtol=1e-5, atol=1e-5)
    features = family.features(batch)
    assert features.shape == (3, 16)
    torch.testing.assert_close(family.classifier_of(features), wanted, rtol=1e-5, atol=1e-5)
    assert batch.tensors["labels"].tolist() == [0, 1, 2]


def _vision():
    yield tiny_vit().network
    yield transformers.ResNetForImageClassification(transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=3))
    yield transformers.ConvNextForImageClassification(transformers.ConvNextConfig(patch_size=2, num_stages=2, hidden_sizes=[4, 8], depths=[1, 1], num_labels=3, image_size=12))
    yield transformers.SwinForImageClassification(transformers.SwinConfig(image_size=16, patch_size=4, embed_dim=8, depths=[1], num_heads=[1], window_size=2, num_labels=3))


@pytest.mark.parametrize("network", _vision(), ids=lambda n: type(n).__name__)
def test_image_features_and_head_give_the_networks_logits(network):
    family = ImageClassifier(network.eval(), None)
    batch = family.collate([{"image": IMAGES[0], "label": 2}, {"image": IMAGES[1], "label": 0}])
    wanted = network(pixel_values=batch.tensors["image"]).logits
    torch.testing.assert_close(family.classify(batch), wanted)
    torch.testing.assert_close(family.classifier_of(family.features(batch)), wanted)
    torch.testing.assert_close(family.embed([IMAGES[0]])[0], family.features(batch)[0], rtol=1e-4, atol=1e-5)


def test_labels_by_name_and_what_is_wrong_with_them():
    family = tiny_vit(classes=2)
    assert family.ensure_classes(["cat", "dog"]) and family.labels == ["cat", "dog"] and not family.ensure_classes(["dog"])
    assert family.label_ids([{"label": "dog"}, {"label": "cat"}, {"label": None}]).tolist() == [1, 0, UNLABELLED]
    with pytest.raises(DataError, match=r"Row 0: the model has no class 'dogs'\. Did you mean 'dog'"):
        family.label_ids([{"label": "dogs"}])
    with pytest.raises(DataError, match="Row 1: label 2, but the model has 2 classes"):
        family.label_ids([{"label": 0}, {"label": 2}])
    assert family.label_ids([{}, {}]) is None
    assert family.label_ids([{"label": [0.25, 0.75]}, {"label": [1, 0]}]).tolist() == [[0.25, 0.75], [1.0, 0.0]]
    assert family.label_ids([{"label": 0.5}, {"label": 2.0}]).tolist() == [0.5, 2.0]
    with pytest.raises(DataError, match="same length"):
        family.label_ids([{"label": [1.0]}, {"label": [1.0, 0.0]}])
    with pytest.raises(ModelError, match="no classes yet"):
        tiny_bert().label_ids([{"label": "dog"}])


def test_classes_of_rows():
    assert classes_of([{"label": "b"}, {"label": "a"}, {"label": "b"}]) == ["a", "b"]
    assert classes_of([{"label": 0}, {"label": 4}]) == 5
    assert classes_of([{"label": 0}]) == 2 and classes_of([{"label": [0.1, 0.9, 0.0]}]) == 3
    assert not tiny_vit(classes=3).fit_to([{"label": 1}]) and not tiny_vit(classes=3).fit_to([{"text": "x"}])
    assert classes_of([{"label": 0.5}]) is None and classes_of([{"label": np.float32(0.5)}]) is None and classes_of([{"text": "x"}]) is None


@pytest.mark.parametrize("make", [tiny_bert, lambda: tiny_bert(classes=2), tiny_vit])
def test_a_fresh_head_is_seeded_and_leaves_the_body(make, tmp_path):
    family, twin, other = (make() for _ in range(3))
    rng = torch.get_rng_state()
    assert all([family.fit_to([{"label": "x"}, {"label": "y"}, {"label": "z"}, {"label": "q"}], seed=3), twin.ensure_classes(["q", "x", "y", "z"], seed=3), other.ensure_classes(4, seed=4)])
    assert torch.equal(rng, torch.get_rng_state())
    assert family.labels == ["q", "x", "y", "z"] and other.labels == [f"LABEL_{i}" for i in range(4)]
    assert torch.equal(family.classifier.weight, twin.classifier.weight) and not torch.equal(family.classifier.weight, other.classifier.weight)
    body = dict(make().network.base_model.state_dict())
    assert all(torch.equal(v, family.network.base_model.state_dict()[k]) for k, v in body.items())
    rows = [{"text": "w1 w2", "image": IMAGES[0], "label": "y"}]
    assert family.classify(family.collate(rows)).shape == (1, 4)
    save_network(family, tmp_path)
    again = load(tmp_path)
    assert again.labels == family.labels
    torch.testing.assert_close(again.classify(again.collate(rows)), family.classify(family.collate(rows)))
    assert not again.fit_to(rows)


def test_roberta_heads_are_drawn_anew_as_a_whole():
    network = list(_classifiers())[1]
    family = TextEncoder(network.eval(), tiny_tokenizer(40, wrapped=True))
    before = network.classifier.dense.weight.clone()
    assert family.ensure_classes(5)
    assert network.classifier.out_proj.out_features == 5 and not torch.equal(before, network.classifier.dense.weight)
    assert family.classify(family.collate([{"text": "w1", "label": 4}])).shape == (1, 5)


def test_heads_under_adapters():
    from peft import LoraConfig, get_peft_model

    family = tiny_bert(classes=3)
    family.network = get_peft_model(family.network, LoraConfig(task_type="SEQ_CLS", target_modules=["query"])).eval()
    batch = family.collate([{"text": t, "label": 0} for t in TEXTS])
    torch.testing.assert_close(family.classifier_of(family.features(batch)), family.classify(batch))
    assert family.has_classes and not family.ensure_classes(3)
    with pytest.raises(ModelError, match="Adapters are attached already"):
        family.ensure_classes(4)


def test_without_a_head():
    family = tiny_bert()
    batch = family.collate([{"text": t} for t in TEXTS])
    torch.testing.assert_close(family.features(batch), family.embed(TEXTS))
    with pytest.raises(ModelError, match="ensure_classes"):
        family.classify(batch)
    with pytest.raises(ModelError, match="cannot 'classify'"):
        tiny_llama().classify(batch)


# -- pictures -----------------------------------------------------------------------------------------------------------
def test_pixels_equal_the_processors():
    processor = transformers.ViTImageProcessor(size={"height": 12, "width": 12}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4])
    config = tiny_vit().config
    wanted = processor([IMAGES[0]], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels([IMAGES[0]], config, processor), wanted, rtol=1e-5, atol=1e-5)
    large = np.kron(IMAGES[0], np.ones((3, 3, 1))).astype(np.uint8)
    # the processor resizes in whole numbers, so one grey level may differ
    torch.testing.assert_close(pixels([large], config, processor), processor([large], return_tensors="pt")["pixel_values"], rtol=0, atol=1.5 / 255 / 0.2)


def test_pixels_of_every_kind():
    from PIL import Image

    config = tiny_vit().config
    red = np.zeros((12, 12, 3), np.uint8)
    red[..., 0] = 255
    buffer = io.BytesIO()
    Image.fromarray(red).save(buffer, "PNG")
    same = [red, red.tolist(), red / 255.0, Image.fromarray(red), {"bytes": buffer.getvalue(), "path": None}, torch.from_numpy(red), np.concatenate([red, red[..., :1]], -1)]
    found = pixels(same, config)
    assert found.shape == (7, 3, 12, 12) and found.min() == -1 and found.max() == 1
    for one in found[1:]:
        torch.testing.assert_close(one, found[0])
    gray = pixels([np.full((12, 12), 0.75)], config)
    assert gray.shape == (1, 3, 12, 12) and torch.allclose(gray, torch.tensor(0.5))
    one_channel = tiny_vit(num_channels=1).config
    torch.testing.assert_close(pixels([red], one_channel), torch.full((1, 1, 12, 12), 2 * 0.299 - 1))


@pytest.mark.parametrize(
    "image, sentence",
    [(np.full((4, 4), 16.0), "divide it"), (np.array([[np.nan]]), "divide it"), (np.zeros((2, 2, 5)), "5 channels"), (np.zeros(4), "height x width"), ("/nowhere.png", "cannot be read")],
)
def test_bad_pictures(image, sentence):
    with pytest.raises(DataError, match=sentence):
        pixels([image], tiny_vit().config)


def test_rows_without_pictures():
    with pytest.raises(DataError, match="Row 1 has no image"):
        tiny_vit().collate([{"image": IMAGES[0]}, {"text": "w1"}])


# -- two towers ---------------------------------------------------------------------------------------------------------
def test_pairs_score_as_clip_does():
    family = tiny_clip()
    batch = family.collate([{"image": i, "text": t} for i, t in zip(IMAGES, TEXTS)])
    with torch.no_grad():
        found = family.score_pairs(batch)
        for i, text in enumerate(TEXTS):
            ids = torch.tensor([family.tokenizer(text)["input_ids"]])
            out = family.network(input_ids=ids, pixel_values=batch.tensors["image"])
            torch.testing.assert_close(found[i], out.logits_per_text[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(family.score_pairs(TEXTS, IMAGES), found)
        torch.testing.assert_close(family.embed(IMAGES), family.embed(batch, "image"))
        torch.testing.assert_close(family.embed(TEXTS), family.embed(batch, "text"))
    with pytest.raises(ModelError, match="texts and images"):
        family.embed(batch)


def test_clip_pools_at_the_end_or_says_that_it_does_not():
    from luthier.core.encoders import DualEncoder

    family = tiny_clip()
    assert family.notices == []
    # a word behind the end token's place must not matter, a word before it must
    first, second = family.embed(["w1 w2"])[0], family.embed(["w3 w2"])[0]
    assert not torch.allclose(first, second)
    other = DualEncoder(family.network, tiny_tokenizer(64, wrapped=True))
    assert "largest token id" in other.notices[0]


def test_dual_rows():
    family = tiny_clip()
    batch = family.collate([{"text": "w1", "label": 1}, {"text": "w2 w3", "label": 0}])
    assert batch.tensors["labels"].tolist() == [1, 0] and [s.branch for s in batch.sequences] == ["text", "text"]
    assert family.collate([{"image": IMAGES[0]}]).tensors["image"].shape == (1, 3, 12, 12)
    with pytest.raises(DataError, match="neither"):
        family.collate([{"prompt": 1}])


def test_batches_split_and_take_with_their_tensors():
    family = tiny_vit()
    batch = family.collate([{"image": IMAGES[0], "label": i % 3} for i in range(5)])
    part = batch.take([4, 1])
    assert part.tensors["labels"].tolist() == [1, 1] and part.tensors["image"].shape[0] == 2
    assert sum(len(b) for b in batch.split(3 * 144 * 2)) == 5


# -- the real one -------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_minilm_equals_sentence_transformers():
    from sentence_transformers import SentenceTransformer

    family = load("minilm")
    texts = ["A cat sits on the mat.", "Shares fell sharply on Monday as investors sold.", "cats " * 400]
    other = SentenceTransformer(str(fetch("minilm")), device="cpu")
    with torch.no_grad():
        found = torch.nn.functional.normalize(family.embed(texts), dim=-1).numpy()
    np.testing.assert_allclose(found, other.encode(texts, normalize_embeddings=True), atol=1e-5)

