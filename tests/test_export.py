"""What a run writes loads elsewhere: with plain transformers, with plain peft, as GGUF; and gives the same numbers there."""

import json

import numpy as np
import pytest
import torch

from luthier import cli
from luthier.core.models import load, save_network
from luthier.errors import ModelError, UserError
from luthier.export import export
from luthier.run import tune
from luthier.testing import tiny
from luthier.testing.toys import rows
from tests.toy_runs import PAIRS, python, recipe

IDS = [[1, 20, 21, 22, 23], [1, 30, 31, 19, 25]]
ELSEWHERE = '''
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

out = {}
for name, (kind, folder) in json.loads(sys.argv[1]).items():
    if kind == "adapter":
        base = json.load(open(folder + "/adapter_config.json"))["base_model_name_or_path"]
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "w1 w2"}], add_generation_prompt=True, tokenize=False)
    with torch.no_grad():
        out[name] = {"logits": model.eval()(torch.tensor(json.loads(sys.argv[2]))).logits.tolist(), "prompt": prompt}
assert not any(m.split(".")[0] == "luthier" for m in sys.modules), "this must be plain"
print(json.dumps(out))
'''


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Runs of a tiny model: a LoRA and a whole one."""
    root = tmp_path_factory.mktemp("export")
    save_network(tiny.tiny_llama(), root / "base")
    tune(recipe(root, model=str(root / "base")), root / "lora")
    tune(recipe(root, model=str(root / "base"), adapt="full", optimize={"method": "adamw", "lr": 1e-3}), root / "full")
    return root


def logits(path):
    family = load(path, device="cpu")
    with family.evaluating():
        return family.network(torch.tensor(IDS)).logits.float()


def test_models_and_exports_give_the_same_logits_where_luthier_is_not_installed(root, tmp_path, capsys):
    for form in ("merged", "adapter"):
        assert cli.main(["export", str(root / "lora"), f"--{form}", "--out", str(tmp_path / form)]) == 0
        assert capsys.readouterr().out.strip() == str(tmp_path / form)
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    folders = {
        "full": ("whole", root / "full" / "model"), "lora": ("adapter", root / "lora" / "model"),
        "merged": ("whole", tmp_path / "merged"), "adapter": ("adapter", tmp_path / "adapter"),
    }  # fmt: skip
    done = python("-I", str(tmp_path / "elsewhere.py"), json.dumps({k: (a, str(b)) for k, (a, b) in folders.items()}), json.dumps(IDS), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name, run in (("full", "full"), ("lora", "lora"), ("merged", "lora"), ("adapter", "lora")):
        assert torch.allclose(torch.tensor(found[name]["logits"]), logits(root / run / "model"), atol=1e-5), name
        assert found[name]["prompt"] == "<bos> user : w1 w2 <bos> assistant :"
    assert not torch.allclose(torch.tensor(found["lora"]["logits"]), logits(root / "base"), atol=1e-3)


def test_a_whole_model_is_no_adapter(root, capsys):
    assert cli.main(["export", str(root / "full"), "--adapter"]) == 2
    assert "use --merged" in capsys.readouterr().err
    assert not (root / "full" / "adapter").exists()


def test_an_export_never_overwrites_what_is_there(root, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("mine")
    with pytest.raises(UserError, match="already holds something"):
        export(root / "lora", "merged", tmp_path / "mine")
    assert (tmp_path / "mine" / "config.json").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert export(root / "full", "merged", tmp_path / "empty") == tmp_path / "empty"
    assert export(root / "lora", "merged") == root / "lora" / "merged" == export(root / "lora", "merged")


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert cli.main(["export", str(tmp_path), "--merged"]) == 2
    assert "no run folder" in capsys.readouterr().err


def test_learned_prompts_cannot_be_merged_but_are_an_adapter(root, tmp_path):
    run = tune(recipe(tmp_path, model=str(root / "base"), adapt={"method": "prompt-tuning", "tokens": 2}, train={"steps": 1}), tmp_path / "run")
    with pytest.raises(ModelError, match="cannot be merged"):
        export(run.folder, "merged", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert (export(run.folder, "adapter", tmp_path / "adapter") / "adapter_config.json").is_file()


# -- GGUF --------------------------------------------------------------------------------------------------------------------------


def byte_tokenizer(template):
    """A byte-level BPE tokenizer, trained on a few words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    specials = ["<pad>", "<bos>", "<eos>"]
    inner.train_from_iterator(["w1 w2 w3 user assistant"] * 4, trainers.BpeTrainer(vocab_size=300, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    made.chat_template = template
    return made


def test_gguf_holds_the_merged_model_and_its_tokenizer(tmp_path, capsys):
    family = tiny.tiny_llama(vocab=300)
    family.processor = byte_tokenizer(tiny.CHAT_TEMPLATE)
    save_network(family, tmp_path / "base")
    tune(recipe(tmp_path, model=str(tmp_path / "base")), tmp_path / "run")
    assert cli.main(["export", str(tmp_path / "run"), "--gguf"]) == 0
    file = tmp_path / "run" / "model.gguf"
    assert capsys.readouterr().out.strip() == str(file)
    assert not list((tmp_path / "run").glob(".merged*"))
    back = load(file, device="cpu")
    wanted, base = logits(tmp_path / "run" / "model"), logits(tmp_path / "base")
    with back.evaluating():
        found = back.network(torch.tensor(IDS)).logits.float()
    rounding = float((found - wanted).abs().max())
    assert rounding < 0.05 and rounding < 0.2 * float((wanted - base).abs().max()), "fp16 numbers of the tuned model, not of the base"
    assert np.array_equal(back.tokenizer("w1 w3")["input_ids"], family.tokenizer("w1 w3")["input_ids"])
    assert back.tokenizer.chat_template == tiny.CHAT_TEMPLATE


def test_gguf_of_another_tokenizer_or_model_is_refused(root, tmp_path, capsys):
    assert cli.main(["export", str(root / "full"), "--gguf", "--out", str(tmp_path / "x.gguf")]) == 2
    assert "byte-level" in capsys.readouterr().err
    assert not list(tmp_path.iterdir()) and not list((root / "full").glob(".merged*"))


def test_an_encoder_has_no_gguf(tmp_path):
    columns = frozenset({"text", "label"})
    data = {"train": rows(columns, 6), "test": rows(columns, 3, 1)}
    run = tune({"model": tiny.tiny_bert(classes=3), "data": data, "adapt": "full", "measure": [], "train": {"steps": 1}}, tmp_path / "run")
    with pytest.raises(ModelError, match="cannot be written as GGUF"):
        export(run.folder, "gguf")


def test_a_run_of_a_model_in_memory_exports_as_well(tmp_path):
    run = tune({"model": tiny.tiny_llama(), "data": rows(PAIRS, 6), "adapt": "full", "measure": [], "train": {"steps": 1}}, tmp_path / "run")
    assert torch.allclose(logits(export(run.folder, "merged")), logits(run.model_path))
