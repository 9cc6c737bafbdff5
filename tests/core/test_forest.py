"""A token forest gives exactly what separate, unpadded rows give: log-probabilities, losses and gradients."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier.core import prefix_attention, tree_attention
from luthier.core.batch import Batch, Sequence, TokenForest
from luthier.core.families import CausalLM
from tests.helpers import tiny_tokenizer

VOCAB = 24
COMMON = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 4,
    "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3,
}  # fmt: skip
WINDOWED = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
ARCHITECTURES = {
    "llama": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "llama-grouped-tied": ("Llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "qwen2-sliding-layers": ("Qwen2", {"num_key_value_heads": 2, "use_sliding_window": True, "max_window_layers": 0, **WINDOWED}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2}),
    "mistral-window": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 4}),
    "gemma3": ("Gemma3", {"num_key_value_heads": 2, "query_pre_attn_scalar": 4, **WINDOWED}),
    "gpt2": ("GPT2", {}),
}


@pytest.fixture(autouse=True, scope="module", params=["whole bins", "by parts", "in place"])
def layout(request):
    """Under one mask over a bin, as small ones are, and taken apart, as large ones; keys of beginnings copied, or read where they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_attention, "CALL", 0 if request.param == "in place" else 10**12)
        patch.setattr(tree_attention, "WORTH", 10**12 if request.param == "whole bins" else -(10**12))
        yield


@functools.cache
def model(name: str, attention: str = "sdpa") -> CausalLM:
    """A random network in fp64, so that only mistakes differ by more than rounding (scores themselves are fp32)."""
    kind, fields = ARCHITECTURES[name]
    if kind == "GPT2":
        config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3,
                                         resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=3)  # fmt: skip
        made = transformers.GPT2LMHeadModel
    else:
        text = "Text" if kind == "Gemma3" else ""
        config = getattr(transformers, f"{kind}{text}Config")(**{**COMMON, **fields})
        made = getattr(transformers, f"{kind}ForCausalLM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = made._from_config(config, attn_implementation=attention).double().eval()
    return CausalLM(network, tiny_tokenizer(VOCAB), name)


def alone(family: CausalLM, sequences: list[Sequence]) -> list[torch.Tensor]:
    """Log-probabilities of the supervised tokens, one plain forward pass a row, by transformers alone."""
    found = []
    for s in sequences:
        logits = family.network(input_ids=torch.from_numpy(s.ids)[None], use_cache=False).logits[0].float()
        at = torch.from_numpy(s.supervised)
        found.append(torch.log_softmax(logits[at - 1], -1)[torch.arange(len(at)), torch.from_numpy(s.labels)[at]])
    return found


def gradients(family: CausalLM, value: torch.Tensor) -> dict[str, torch.Tensor]:
    named = [(n, p) for n, p in family.network.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(value, [p for _, p in named], allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named, found)}


def assert_same(family: CausalLM, sequences: list[Sequence], seed: int = 0) -> None:
    """Forest and separate rows: log-probabilities, and the gradients of a randomly weighted loss, to 1e-5."""
    scores = family.score(sequences)
    apart = torch.cat(alone(family, sequences))
    torch.testing.assert_close(scores.logp, apart, rtol=1e-5, atol=1e-5)
    weights = torch.from_numpy(np.random.default_rng(seed).normal(size=len(apart))).float()
    together, separate = gradients(family, (scores.logp * weights).sum()), gradients(family, (apart * weights).sum())
    for name, wanted in separate.items():
        torch.testing.assert_close(together[name], wanted, rtol=1e-5, atol=1e-5 * max(1e-6, float(wanted.abs().max())) + 1e-9, msg=lambda m, n=name: f"{n}: {m}")


def sequence(ids: list[int], mask: list[bool] | None = None, row: int = 0) -> Sequence:
    return Sequence(np.array(ids), np.array([i > 0 for i in range(len(ids))] if mask is None else mask), row=row)


@st.composite
def trees(draw: st.DrawFn) -> list[Sequence]:
    """Rows that grow out of each other: a cut of an earlier row, or nothing, plus fresh tokens from a small alphabet."""
    rows: list[list[int]] = []
    token = st.integers(1, 4)
    for _ in range(draw(st.integers(1, 5))):
        stem = draw(st.sampled_from(rows)) if rows and draw(st.booleans()) else []
        kept = stem[: draw(st.integers(0, len(stem)))]
        tail = draw(st.lists(token, min_size=0 if kept else 1, max_size=7))
        rows.append([*kept, *tail])
    return [sequence(r, draw(st.lists(st.booleans(), min_size=len(r), max_size=len(r))), row=i) for i, r in enumerate(rows)]


fast = settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_every_architecture_shares_exactly(name, attention):
    family = model(name, attention)
    prompt = [5, 6, 7, 8, 9, 10, 11]
    rows = [sequence([*prompt, *tail], row=i) for i, tail in enumerate([[12, 13, 14, 15], [12, 13, 16], [17, 18, 19, 20, 21]])]
    assert family.forest(rows).shared > 0
    assert_same(family, rows)


@given(rows=trees())
@fast
def test_random_trees_on_llama(rows):
    assert_same(model("llama-grouped-tied"), rows)


@given(rows=trees(), name=st.sampled_from(["mistral-window", "qwen2-sliding-layers", "gemma3", "gpt2"]))
@fast
def test_random_trees_on_windows_and_learned_positions(rows, name):
    assert_same(model(name), rows)


@given(rows=trees(), limit=st.integers(1, 40), gain=st.floats(0, 1))
@settings(fast, max_examples=60)
def test_rows_come_back_and_padding_sees_only_itself(rows, limit, gain):
    forest = TokenForest.pack(rows, limit=limit, min_gain=gain)
    for s, back in zip(rows, forest.rows()):
        np.testing.assert_array_equal(back, s.ids)
    for (b, path), s in zip(forest.slots, rows):
        np.testing.assert_array_equal(forest.positions[b].numpy()[path], np.arange(len(s)))
        # a token sees exactly its own row up to itself
        allowed = forest.allowed()[b, 0].numpy()
        for i, place in enumerate(path):
            assert sorted(np.flatnonzero(allowed[place])) == sorted(path[: i + 1])
    padding = forest.nodes < 0
    allowed = forest.allowed()[:, 0].numpy()
    assert (allowed.sum(-1)[padding] == 1).all()
    assert forest.shared == sum(map(len, rows)) - int((forest.nodes >= 0).sum())


EDGE_CASES = {
    "duplicates": [[5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8]],
    "a row that begins another": [[5, 6, 7], [5, 6, 7, 8, 9], [5, 6]],
    "nothing shared": [[5, 6, 7], [8, 9], [10, 11, 12, 13]],
    "one token": [[5], [5, 6]],
    "one row": [[5, 6, 7]],
}


@pytest.mark.parametrize("rows", EDGE_CASES.values(), ids=EDGE_CASES)
def test_edge_cases(rows):
    assert_same(model("llama"), [sequence(r, row=i) for i, r in enumerate(rows)])


def test_a_supervised_token_that_rows_share_counts_for_each():
    family = model("llama")
    rows = [sequence([5, 6, 7, 8, 9], [False, True, True, True, True], 0), sequence([5, 6, 7, 10], [False, False, True, False], 1)]
    scores = family.score(rows)
    assert scores.sequence.tolist() == [0, 0, 0, 0, 1]
    assert_same(family, rows)


def test_shared_inputs_with_different_targets():
    family = model("llama")
    rows = [sequence([5, 6, 7, 8]), sequence([5, 6, 7, 8])]
    rows[1].targets = np.array([5, 9, 10, 11])
    assert family.forest(rows).shared == 4
    assert_same(family, rows)


def test_empty_supervision_gives_nothing_and_no_nan():
    family = model("llama")
    rows = [sequence([5, 6, 7], [False] * 3), sequence([5, 6, 8], [True, False, False], 1)]
    scores = family.score(rows)
    assert len(scores) == 0 and scores.logp.shape == (0,) and scores.entropy.shape == (0,)
    assert scores.rows("mean").tolist() == [0.0, 0.0]
    for grad in gradients(family, scores.logp.sum()).values():
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("name", ["llama-grouped-tied", "gemma3", "mistral-window"])
def test_gradient_checkpointing_changes_nothing(name):
    kept = model(name)
    family = CausalLM(type(kept.network)(kept.config).double(), kept.tokenizer)
    family.network.load_state_dict(kept.network.state_dict())
    rows = [sequence([5, 6, 7, 8, 9, *tail], row=i) for i, tail in enumerate([[10, 11, 12], [13, 14], [10, 11, 15]])]
    wanted = gradients(kept, kept.score(rows).logp.sum())
    family.network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    family.train()
    found = gradients(family, family.score(rows).logp.sum())
    for grad, name in zip(found.values(), wanted):
        torch.testing.assert_close(grad, wanted[name], rtol=1e-7, atol=1e-9)


def test_dropout_and_prompt_vectors_stop_sharing():
    from peft import PromptTuningConfig, get_peft_model

    rows = [sequence([5, 6, 7, 8]), sequence([5, 6, 7, 9])]
    family = model("llama")
    assert family.forest(rows).shared == 3
    config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=4, n_positions=32)
    dropping = CausalLM(transformers.GPT2LMHeadModel(config).train(), family.tokenizer)
    assert dropping.forest(rows).shared == 0
    assert dropping.eval().forest(rows).shared == 3
    torch.manual_seed(0)
    prompted = CausalLM(get_peft_model(type(family.network)(family.config), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)), family.tokenizer).eval()
    assert prompted.forest(rows).shared == 0
    wanted = [torch.log_softmax(prompted.network(input_ids=torch.from_numpy(s.ids)[None]).logits[0, -4:-1].float(), -1)[torch.arange(3), torch.from_numpy(s.ids)[1:]] for s in rows]
    torch.testing.assert_close(prompted.score(rows).logp, torch.cat(wanted), rtol=1e-5, atol=1e-5)
    with prompted.network.disable_adapter():
        plain = CausalLM(prompted.base_network, family.tokenizer)
        torch.testing.assert_close(prompted.score(rows).logp, plain.score(rows).logp, rtol=1e-6, atol=1e-6)


def test_half_precision_masks_are_finite():
    family = model("gemma3")
    forest = family.forest([sequence([5, 6, 7, 8]), sequence([5, 6, 7, 9])])
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.isfinite(forest.additive(dtype, 2)).all()


def test_options_share_their_prompt_and_equal_scoring_each_alone():
    family = model("qwen3")
    prompts, options = [[5, 6, 7, 8, 9], [10, 11]], [[[12, 13], [14]], [[15], [16, 17], [15, 18]]]
    found = family.options(prompts, options)
    for prompt, candidates, values in zip(prompts, options, found):
        for candidate, value in zip(candidates, values):
            ids = [*prompt, *candidate]
            (logp,) = alone(family, [sequence(ids, [i >= len(prompt) for i in range(len(ids))])])
            assert float(value) == pytest.approx(float(logp.detach().sum()), rel=1e-5)


def test_embeddings_are_means_over_each_rows_own_tokens():
    family = model("llama-grouped-tied")
    rows = [[5, 6, 7, 8, 9], [5, 6, 7, 10], [11]]
    with torch.no_grad():
        found = family.embed(rows)
        for ids, vector in zip(rows, found):
            hidden = family.network.model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]
            torch.testing.assert_close(vector, hidden.mean(0).float())


def test_refuses_no_sequences():
    with pytest.raises(ValueError, match="no sequences"):
        TokenForest.pack([])


@given(widths=st.lists(st.integers(1, 40), min_size=1, max_size=20), tokens=st.integers(1, 200))
@settings(deadline=None)
def test_micro_batches_are_few_full_and_even(widths, tokens):
    def batch_of(lengths):
        rows = [Sequence(np.ones(n, np.int64), np.ones(n, bool), row=i) for i, n in enumerate(lengths)]
        return Batch([{} for _ in lengths], np.arange(len(lengths)), rows)

    def padded(part):
        return max(len(s) for s in part.sequences) * len(part)

    parts = batch_of(widths).split(tokens)
    assert sorted(len(s) for part in parts for s in part.sequences) == sorted(widths)
    assert all(padded(part) <= tokens or len(part) == 1 for part in parts)
    greedy, full = 1, []
    for n in sorted(widths):
        if full and n * (len(full) + 1) > tokens:
            greedy, full = greedy + 1, []
        full.append(n)
    assert len(parts) == greedy  # no more than one after the other would make
    assert [len(part) for part in batch_of([130] * 4).split(512)] == [2, 2]


def test_what_rows_share_counts_once_in_micro_batches():
    prompts = [np.arange(200), np.arange(1000, 1100)]
    answers = [np.concatenate([prompts[i % 2], np.full(50, 5000 + i)]) for i in range(8)]
    batch = Batch([{} for _ in answers], np.arange(8), [Sequence(ids, np.ones(len(ids), bool), row=i) for i, ids in enumerate(answers)])
    assert [len(part) for part in batch.split(700)] == [4, 2, 2]
    assert len(batch.split(700, share=True)) == 1
    parts = batch.split(699, share=True)  # the short prompt with four answers has 300 tokens, the long one 400
    assert [part.ids.tolist() for part in parts] == [[1, 3, 5, 7], [0, 2, 4, 6]]
    assert [TokenForest.pack(part.sequences).ids.shape[1] for part in parts] == [300, 400]
    together = batch.split(500, lambda b: [[0, 1], [2, 3], [4, 5], [6, 7]], share=True)
    assert sorted(i for part in together for i in part.ids.tolist()) == list(range(8))
    assert all(i ^ 1 in part.ids.tolist() for part in together for i in part.ids.tolist())


@given(rows=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), min_size=1, max_size=16), tokens=st.integers(1, 80))
@settings(deadline=None)
def test_shared_micro_batches_hold_every_row_once_and_fit(rows, tokens):
    sequences = [Sequence(np.array(ids), np.ones(len(ids), bool), row=i) for i, ids in enumerate(rows)]
    parts = Batch([{} for _ in rows], np.arange(len(rows)), sequences).split(tokens, share=True)
    assert sorted(i for part in parts for i in part.ids.tolist()) == list(range(len(rows)))
    for part in parts:
        distinct = len({tuple(s.ids[: n + 1]) for s in part.sequences for n in range(len(s))})
        assert distinct <= tokens or len(part) == 1
