"""The builds: exact resume, batches without loss of tokens, and the shipped models against their floors."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import luthier.lab as lab
from luthier.errors import ModelError
from luthier.lab import _build_guide, abilities, build, training
from luthier.lab.decode import greedy
from luthier.lab.mixture import MIXTURE_A, drawn, encoded, held
from luthier.lab.nets import fresh
from luthier.lab.tokenizer import tokenizer


def tiny(seed: int = 0) -> torch.nn.Module:
    return fresh("lm-s", seed, num_hidden_layers=2, hidden_size=32, intermediate_size=32)


def test_configurations_have_the_stated_sizes():
    counts = {name: sum(p.numel() for p in fresh(name).parameters()) / 1e6 for name in ("lm-s", "lm-m", "enc", "vit")}
    assert counts == pytest.approx({"lm-s": 0.43, "lm-m": 1.12, "enc": 0.79, "vit": 0.31}, rel=0.03)
    with pytest.raises(ModelError, match="lm-s"):
        fresh("lm-z")


def test_batches_hold_every_token_once_and_supervise_completions():
    made = [encoded(pair) for pair in drawn(np.random.default_rng(0), 300, MIXTURE_A)]
    total, supervised = 0, 0
    for batch, units in training.text_batches(made, np.random.default_rng(1), tokens=512):
        assert batch["ids"].numel() <= 512 and units == int((batch["ids"] != 0).sum())
        total, supervised = total + units, supervised + int(batch["supervised"].sum())
    assert total == sum(len(ids) for ids, _ in made) and supervised == sum(len(ids) - first for ids, first in made)


def test_held_prompts_are_never_in_a_stream():
    prompts = [prompt for prompt, _ in drawn(np.random.default_rng(0), 2000, MIXTURE_A) if prompt.startswith(("chain", "copy", "add", "reverse"))]
    assert prompts and not any(held(prompt) for prompt in prompts)


def test_the_loss_equals_transformers_own():
    model, batch = tiny(), next(training.text_chunks(MIXTURE_A, 0, rows=50)(0))[0]
    labels = batch["ids"].masked_fill(~batch["supervised"], -100)
    assert training.causal_loss(model, batch, 0).item() == pytest.approx(model(input_ids=batch["ids"], labels=labels).loss.item(), rel=1e-5)


def test_guided_heads_look_at_the_value_of_the_key():
    ids = _build_guide.guide_rows(np.random.default_rng(0), 4)
    tok = tokenizer()
    for r, question, value in zip(*_build_guide.looks(ids)):
        words = tok.convert_ids_to_tokens(ids[r].tolist())
        assert words[question] == "=" and words[value - 1] == ">" and words[value - 2] == words[question - 1]
        assert words[value] == words[question + 1]
    assert len(_build_guide.looks(ids)[0]) == 24
    assert _build_guide.guide_loss(tiny(), ids).item() > 0


def test_a_killed_build_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    def finish(name: str, stop: int | None) -> torch.nn.Module:
        model, plan = tiny(), training.Plan(1500)

        def watch(state, progress):
            if state.chunk == stop:
                training.save_state(tmp_path / name / "state.pt", *kept, state)
                raise KeyboardInterrupt

        kept = [model, None]
        build_optimizer = torch.optim.AdamW

        def remember(*args, **kwargs):
            kept[1] = build_optimizer(*args, **kwargs)
            return kept[1]

        monkeypatch.setattr(torch.optim, "AdamW", remember)
        training.train(name, model, training.text_chunks(MIXTURE_A, 0, rows=25), training.causal_loss, plan, watch)
        return model

    monkeypatch.setattr(training, "CACHE", tmp_path)
    whole = finish("whole", None)
    with pytest.raises(KeyboardInterrupt):
        finish("killed", 2)
    resumed = finish("killed", None)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters()))


def test_greedy_answers_equal_transformers_generate():
    model, tok = tiny(3), tokenizer()
    prompts = ["copy 1 2 3 =", "max 4 5 =", "add 1 2 + 3 4 ="]
    for prompt, answer in zip(prompts, greedy(model, prompts, max_new=6)):
        ids = tok(prompt, return_tensors="pt", return_token_type_ids=False)
        made = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()
        assert answer == tok.decode(made[: made.index(2)] if 2 in made else made)


def test_a_model_below_its_floor_is_not_shipped(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "WEIGHTS", tmp_path)
    monkeypatch.setattr(training, "CACHE", tmp_path / "cache")
    entry = build.Build(training.Plan(500), 0, lambda name, model, plan, seed: training.State(), lambda model: dict.fromkeys(abilities.FLOORS["lm-s"] | {"chain-5": 0}, 0.5))
    monkeypatch.setattr(build, "builds", lambda: {"lm-s": entry})
    with pytest.raises(ModelError, match=r"copy 0.500 < 0.95"):
        build.build("lm-s")
    assert not (tmp_path / "lm-s").exists()
    build.build("lm-s", keep=True)
    assert {p.name for p in (tmp_path / "lm-s").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json", "card.json"}


@pytest.mark.parametrize("name", lab.models())
def test_shipped_models_load_with_plain_transformers(name):
    import transformers
    from safetensors.torch import load_file

    folder = lab.model_path(name)
    card = json.loads((folder / "card.json").read_text())
    assert card["name"] == name and card["abilities"] and card["units_seen"] > 0
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.float16}
    model = build.load(folder, build.builds()[name.split("@")[0]].loads_with)
    assert next(model.parameters()).dtype == torch.float32
    assert len(transformers.AutoTokenizer.from_pretrained(folder)) == 1024


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in lab.models() if "@" not in name])
def test_shipped_models_meet_their_floors_when_measured_again(name):
    measured = build.evaluate(lab.model_path(name))
    assert not abilities.missed(name, measured)
    card = json.loads((lab.model_path(name) / "card.json").read_text())
    assert measured == pytest.approx(card["abilities"], abs=0.02)
