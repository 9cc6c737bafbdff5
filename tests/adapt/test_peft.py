"""The wraps of peft: each loads with plain peft onto the base, switches off exactly, trains what its groups name and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from luthier.adapt._shared import PeftAdapter, Targeted, divisor, heads
from luthier.catalog import entries, method
from luthier.core.plugin import Step
from luthier.errors import ModelError, RecipeError
from tests.adapt._rows import ROWS, context, llama
from tests.helpers import tiny_bert, tiny_vit

SMALL = {
    "lora": {"rank": 4}, "rslora": {"rank": 4}, "dora": {"rank": 4}, "mica": {"rank": 4}, "velora": {"rank": 4}, "monteclora": {"rank": 4},
    "bd-lora": {"rank": 4}, "pissa": {"rank": 4}, "olora": {"rank": 4}, "eva": {"rank": 4, "samples": 12}, "lora-ga": {"rank": 4, "samples": 6},
    "corda": {"rank": 4, "samples": 8}, "adalora": {"rank": 2, "start_rank": 4}, "trainable-tokens": {"ids": [5, 6]},
    "prompt-tuning": {"tokens": 3}, "prefix-tuning": {"tokens": 3, "hidden": 8}, "p-tuning": {"tokens": 3, "hidden": 8},
    "cpt": {"examples": 2}, "cartridge": {"tokens": 3}, "adaption-prompt": {"tokens": 3, "layers": 1},
    "fourierft": {"frequencies": 30}, "waveft": {"coefficients": 30}, "vera": {"rank": 8}, "pvera": {"rank": 8}, "hra": {"rank": 4},
    "gralora": {"rank": 4}, "randlora": {"rank": 4}, "lily": {"rank": 4}, "peanut": {"rank": 4}, "glora": {"rank": 4}, "hira": {"rank": 4},
    "lemo": {"rank": 4, "block_size": 2, "first": 0, "predictor_steps": 3, "samples": 4, "hidden": 8}, "vblora": {"vectors": 12}, "supertuning": {"sparsity": 0.9}, "psoft": {"rank": 8}, "adamss": {"rank": 8, "subspaces": 2},
}  # fmt: skip
NAMES = [e.name for e in entries("adapt") if str(e.wraps or "").startswith("peft.") and 78 not in e.papers]
RANDOM_START = {"fourierft", "c3a", "vblora", "unilora", "prompt-tuning", "prefix-tuning", "p-tuning", "cpt", "cartridge"}
"""Their first function is not the pretrained one."""


def logits(network, ids):
    with torch.no_grad():
        return network(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :]


def train(model, method_, parts, ctx, steps=3):
    """A few steps of plain descent with the hooks that the loop calls."""
    optimizer = torch.optim.SGD([p for g in parts.groups for p in g.params.values()], lr=0.3)
    ctx.clock.steps = 10
    model.train()
    for number in range(steps):
        ctx.clock.step = number
        step = Step(number, 0, model, parts.groups, optimizer)
        method_.before_step(step, ctx)
        loss = -model.score(model.collate(ROWS[:6])).logp.mean()
        extra = method_.penalty(model, ctx)
        (loss + (extra.mean() if extra else 0.0)).backward()
        method_.after_backward(step, ctx)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method_.after_step(step, ctx)
    model.eval()


@pytest.mark.parametrize("name", NAMES)
def test_every_tuner(name, tmp_path):
    from peft import PeftModel

    model = llama()
    base = copy.deepcopy(model.network)
    ids = torch.tensor([ROWS[4]["ids"], ROWS[9]["ids"]])
    before = logits(base, ids)
    tuner, ctx = method("adapt", name)(**SMALL.get(name, {})), context(model)
    torch.manual_seed(0)
    parts = tuner.attach(model, ctx)
    model.eval()
    named = {id(p) for g in parts.groups for p in g.params.values()}
    assert named and {id(p) for p in model.network.parameters() if p.requires_grad} == named
    start = logits(model.network, ids)
    if name not in RANDOM_START:
        torch.testing.assert_close(start, before, atol=2e-4, rtol=1e-3)
    frozen = {n: p.detach().clone() for n, p in model.network.named_parameters() if not p.requires_grad}
    train(model, tuner, parts, ctx)
    after = logits(model.network, ids)
    assert float((after - start).abs().max()) > 1e-6, "nothing was learned"
    for n, p in model.network.named_parameters():
        assert n not in frozen or torch.equal(p, frozen[n]), n
    # What the loop scores is what peft's own forward gives.
    hidden = model.score(model.collate(ROWS[:2])).logp
    lsm = logits(model.network, torch.tensor([ROWS[0]["ids"]])).log_softmax(-1)[0]
    own = [float(lsm[i - 1, ROWS[0]["ids"][i]]) for i in range(2, 4)]
    torch.testing.assert_close(hidden[:2].detach(), torch.tensor(own), atol=1e-4, rtol=1e-3)
    if tuner.switchable:
        flags = [p.requires_grad for p in model.network.parameters()]
        with tuner.disabled(model):
            assert torch.equal(logits(model.network, ids), before)
        assert torch.equal(logits(model.network, ids), after) and [p.requires_grad for p in model.network.parameters()] == flags
    with tuner.folded(model) as folded:
        assert torch.equal(logits(folded.network, ids), after)
    tuner.export(model, tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(logits(loaded, ids), after, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["pissa", "olora", "corda", "lora-ga"])
@pytest.mark.parametrize("alpha", [None, 16.0])
def test_moved_bases_export_twice_the_rank(name, alpha, tmp_path):
    from peft import PeftConfig

    model = llama()
    tuner = method("adapt", name)(rank=4, **({"alpha": alpha} if alpha else {}), **({"samples": 6} if name in ("corda", "lora-ga") else {}))
    parts = tuner.attach(model, context(model))
    train(model, tuner, parts, context(model), 1)
    tuner.export(model, tmp_path)
    saved = PeftConfig.from_pretrained(tmp_path)
    assert saved.r == 8 and saved.init_lora_weights is True
    assert not tuner.switchable


def test_a_resumed_moved_base_starts_from_the_saved_split():
    """A start that differs (here: other signs) is put right by moving the difference into the base."""
    model, other = llama(), llama()
    ids = torch.tensor([ROWS[4]["ids"]])
    first, second = method("adapt", "pissa")(rank=4), method("adapt", "pissa")(rank=4)
    first.attach(model, context(model))
    second.attach(other, context(other))
    state = first.state_dict()
    flipped = {"initial": {n: t * 0.5 for n, t in state["initial"].items()}}
    second.load_state_dict(flipped)
    with torch.no_grad():
        for n, p in other.network.named_parameters():
            if "lora_" in n:
                p.mul_(0.5)
    torch.testing.assert_close(logits(other.network, ids), logits(model.network, ids), atol=1e-4, rtol=1e-3)
    first.load_state_dict(state)
    with pytest.raises(ModelError, match="pissa"):
        second.load_state_dict({"initial": {}})


def test_lora_plus_gives_b_its_own_rate():
    model = llama()
    groups = method("adapt", "lora")(rank=2, b_lr_scale=16.0).attach(model).groups
    assert [g.lr_scale for g in groups] == [1.0, 16.0]
    assert all("lora_A" in n for n in groups[0].params) and all("lora_B" in n for n in groups[1].params)


def test_targets_are_all_linear_layers_but_the_head():
    model = llama()
    method("adapt", "lora")(rank=2).attach(model)
    wrapped = {n.split("base_model.model.")[1] for n, m in model.network.named_modules() if hasattr(m, "lora_A")}
    linear = {n for n, m in llama().network.named_modules() if isinstance(m, nn.Linear)}
    assert wrapped == linear - {"lm_head"}
    chosen = llama()
    method("adapt", "lora")(rank=2, targets=["q_proj"]).attach(chosen)
    assert all("q_proj" in n for n, p in chosen.network.named_parameters() if p.requires_grad)


def test_adalora_ends_with_the_budget_and_resumes():
    model, ctx = llama(), context()
    tuner = method("adapt", "adalora")(rank=2, start_rank=4, start=0.1, end=0.3, every=1, orthogonal=0.1)
    parts = tuner.attach(model, ctx)
    train(model, tuner, parts, ctx, 8)
    left = [int((p != 0).sum()) for n, p in model.network.named_parameters() if "lora_E" in n]
    assert sum(left) <= 2 * len(left) < 4 * len(left)
    state = tuner.state_dict()
    assert set(state) == {"importance", "ranks"} and state["ranks"]
    tuner.load_state_dict(copy.deepcopy(state))
    assert tuner.penalty(model).terms["orthogonal"].weight == 0.1


def test_adalora_refuses_to_rank_what_another_method_keeps_from_training():
    model, ctx = llama(), context()
    tuner = method("adapt", "adalora")(rank=2, start_rank=4)
    parts = tuner.attach(model, ctx)
    next(p for n, p in model.network.named_parameters() if "lora_E" in n).requires_grad_(False)
    with pytest.raises(RecipeError, match="adalora ranks all its tensors by their gradients, but '.*lora_E"):
        train(model, tuner, parts, ctx, 1)


def test_a_new_stage_merges_the_last_adapter():
    model, ids = llama(), torch.tensor([ROWS[4]["ids"]])
    first = method("adapt", "lora")(rank=2)
    train(model, first, first.attach(model), context(model))
    tuned = logits(model.network, ids)
    second = method("adapt", "lora")(rank=2)
    second.attach(model)
    model.eval()
    torch.testing.assert_close(logits(model.network, ids), tuned, atol=1e-5, rtol=1e-4)
    with second.disabled(model):
        torch.testing.assert_close(logits(model.network, ids), tuned, atol=1e-5, rtol=1e-4)
    prompted = llama()
    method("adapt", "prompt-tuning")(tokens=2).attach(prompted)
    with pytest.raises(ModelError, match="prompt"):
        first.attach(prompted)


def test_classifier_heads_train_whole():
    bert, vit = tiny_bert(classes=3), tiny_vit()
    assert heads(bert.network) == ["classifier"] and heads(vit.network) == ["classifier"] and heads(llama().network) == []
    assert heads(tiny_bert().network) == []
    for model in (bert, vit):
        groups = {g.role: g for g in method("adapt", "lora")(rank=2).attach(model).groups}
        assert set(groups) == {"adapter", "head"} and all("classifier" in n for n in groups["head"].params)


def test_prompts_start_from_words():
    model = llama(vocab=64)
    method("adapt", "prompt-tuning")(tokens=4, text="w1 w2 w3").attach(model)
    ids = model.processor("w1 w2 w3 w1")["input_ids"]
    got = model.network.prompt_encoder["default"].embedding.weight
    assert torch.equal(got, model.base_network.get_input_embeddings().weight[ids])
    with pytest.raises(RecipeError, match="no tokens"):
        method("adapt", "prompt-tuning")(tokens=4, text="").attach(llama(vocab=64))


def test_a_cartridge_of_a_text_continues_like_the_text():
    model = llama(vocab=64)
    text, tail = "w1 w2 w3", torch.tensor([[20, 21, 22]])
    whole = torch.cat([torch.tensor([model.processor(text)["input_ids"]]), tail], 1)
    wanted = logits(model.network, whole)[:, -3:]
    tuner = method("adapt", "cartridge")(tokens=3, text=text)
    parts = tuner.attach(model)
    torch.testing.assert_close(logits(model.network, tail), wanted, atol=1e-4, rtol=1e-3)
    assert sum(p.shape[0] for g in parts.groups for p in g.params.values()) == 2, "the first of three entries is frozen"
    with pytest.raises(RecipeError, match="Lower"):
        method("adapt", "cartridge")(tokens=9, text=text).attach(llama(vocab=64))


def test_trainable_tokens_by_name():
    model = llama(vocab=64)
    tuner = method("adapt", "trainable-tokens")(tokens=["w1"], ids=[5])
    assert tuner.indices(model) == [5, 20]
    for bad, words in (({"tokens": ["w1 w2"]}, "2 tokens"), ({"ids": [999]}, "outside")):
        with pytest.raises(RecipeError, match=words):
            method("adapt", "trainable-tokens")(**bad).attach(llama(vocab=64))
    with pytest.raises(RecipeError, match="nothing"):
        method("adapt", "trainable-tokens")()


def test_block_sizes_fit_every_layer():
    assert divisor([16, 24, 32], 100) == 8 and divisor([16, 24], 6) == 4 and divisor([5, 7], 3) == 1


@pytest.mark.parametrize("name", NAMES)
def test_bad_values_are_refused(name):
    kind = method("adapt", name)
    assert issubclass(kind, PeftAdapter) and (kind.__doc__ or "").strip()
    needed = SMALL.get(name, {}) if name == "trainable-tokens" else {}
    for field in kind.positive:
        with pytest.raises(RecipeError, match=field):
            kind(**needed, **{field: 0})
    for field in kind.shares:
        with pytest.raises(RecipeError, match=field):
            kind(**needed, **{field: 1.0})


def test_wrong_choices_and_impossible_networks_are_refused():
    with pytest.raises(RecipeError, match="init"):
        method("adapt", "lora")(init="zeros")
    with pytest.raises(ModelError, match="nowhere"):
        method("adapt", "lora")(targets=["nowhere"]).attach(llama())
    with pytest.raises(RecipeError, match="calibration"):
        method("adapt", "eva")(rank=2).attach(llama())
    assert issubclass(method("adapt", "vera"), Targeted)


def test_two_tuners_cannot_share_a_stage():
    from types import SimpleNamespace as Named

    tuner = method("adapt", "lora")()
    assert tuner.check(Named(adapt=[Named(method="lora"), Named(method="full")])) is None
    assert "two stages" in tuner.check(Named(adapt=[Named(method="lora"), Named(method="ia3")]))


def test_networks_that_a_tuner_cannot_change_are_refused_in_a_sentence(monkeypatch):
    from transformers import GPT2Config, GPT2LMHeadModel

    from luthier.core.families import CausalLM

    def gpt2():
        return CausalLM(GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=2)), None)

    for name, words in (("oft", "peft cannot put"), ("olora", "pissa"), ("osf", "no layer"), ("beft", "`targets`")):
        with pytest.raises(ModelError, match=words):
            method("adapt", name)(**({"rank": 2} if name == "olora" else {})).attach(gpt2())
    assert method("adapt", "lora")(rank=2).attach(gpt2()).groups
