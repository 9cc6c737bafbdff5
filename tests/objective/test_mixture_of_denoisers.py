"""Mixture of denoisers: nothing is lost, the published shares, and the two-way prefix against transformers' own mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency, chisquare

from luthier.core.batch import Sequence
from luthier.core.context import Context
from luthier.errors import ModelError, RecipeError
from luthier.objective.asft import ASFT
from luthier.objective.mixture_of_denoisers import (
    DENOISERS,
    Denoiser,
    MixtureOfDenoisers,
    expanded,
    mixture_of_denoisers,
    rolled,
    spans,
)
from luthier.objective.sft import SFT
from tests.helpers import tiny_llama
from tests.objective.lm_batches import batch_of, engine, logps_of, sequence

SENTINELS = list(range(1000, 1100))


def text(n: int, seed: int = 0, row: int = 0) -> Sequence:
    return sequence(np.append(np.random.default_rng(seed).integers(19, 64, n), 2), prompt=0, row=row)


@pytest.mark.parametrize("denoiser", DENOISERS, ids=lambda d: f"{d.mode}-{d.span}-{d.rate}")
def test_inputs_and_targets_give_the_sequence_back_and_hide_the_published_share(denoiser):
    rng = np.random.default_rng(0)
    for length in (2, 3, 5, 16, 30, 63, 80, 128, 512):  # 30 x 0.15 is 4.5: 4 are hidden
        ids = rng.integers(0, 900, length)
        hidden = spans(length, denoiser, rng)
        inputs, targets = mixture_of_denoisers(ids, hidden, SENTINELS, mark=not denoiser.at_end)
        assert expanded(inputs, targets, SENTINELS).tolist() == ids.tolist()
        number = min(max(1, int(np.round(length * denoiser.rate))), length - 1)
        assert (hidden >= 0).sum() == number and hidden[0] == -1 and hidden[-1] >= 0
        wanted = 1 if denoiser.at_end else max(1, int(np.round(number / denoiser.span)))
        assert hidden.max() + 1 == min(wanted, number, length - number)
        if denoiser.at_end:
            assert (np.flatnonzero(hidden >= 0) == np.arange(length - number, length)).all() and not set(inputs) & set(SENTINELS)
        else:
            assert [i for i in inputs if i >= 1000] == SENTINELS[: hidden.max() + 1] == [t for t in targets if t >= 1000]


def test_three_spans_by_hand():
    inputs, targets = mixture_of_denoisers([1, 2, 3, 4, 5, 6], np.array([-1, 0, 0, -1, -1, 1]), [90, 91])
    assert inputs.tolist() == [1, 90, 4, 5, 91] and targets.tolist() == [90, 2, 3, 91, 6]


def test_rolled_spans_lie_anywhere_and_lose_nothing():
    one = np.array([-1, -1, -1, -1, 0, 0])
    assert [rolled(one, by).tolist() for by in (0, 1, 2)] == [[-1, -1, -1, -1, 0, 0], [0, -1, -1, -1, -1, 1], [0, 0, -1, -1, -1, -1]]
    rng, first = np.random.default_rng(0), set()
    for _ in range(400):
        ids = rng.integers(0, 900, 20)
        span = rolled(spans(20, DENOISERS[1], rng), int(rng.integers(20)))
        first.add(int(np.argmax(span >= 0)))
        assert (span >= 0).sum() == 3 and expanded(*mixture_of_denoisers(ids, span, SENTINELS), SENTINELS).tolist() == ids.tolist()
    assert first == set(range(18))  # a hole of three that begins at each place, or lies across the end
    method, batch = MixtureOfDenoisers(length=20, roll=True, mode_tokens=False, shares={"R": 1.0}), batch_of([text(20, seed=i, row=i) for i in range(40)])
    family = tiny_llama()
    ctx = Context(family)
    method.attach(family, ctx)
    sentinels = [i for t, i in family.processor.get_vocab().items() if t.startswith("<extra_id_")]
    for before, after in zip(batch.sequences, method.prepare(batch, ctx).sequences):
        start = int(np.argmax(after.mask))
        assert expanded(after.ids[:start], after.ids[start:-1], sentinels).tolist() == before.ids[:-1].tolist()


def test_every_segmentation_is_equally_likely():
    """Six tokens, two spans of three hidden ones: 2 cuts of the kept part times 2 of the hidden one."""
    rng = np.random.default_rng(1)
    seen = [tuple(spans(6, Denoiser("R", 1.5, 0.5), rng)) for _ in range(2000)]
    kinds, counts = np.unique(seen, axis=0, return_counts=True)
    assert len(kinds) == 4 and chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("shares", [None, {"S": 0.5, "R": 0.25, "X": 0.25}, {"S": 1}])
def test_denoisers_are_drawn_as_stated(shares):
    family = tiny_llama()
    method = MixtureOfDenoisers(shares=shares, length=24)
    ctx = Context(family)
    method.attach(family, ctx)
    batch = batch_of([text(24, row=i) for i in range(1400)])
    drawn = [s.data["mode"] for s in method.prepare(batch, ctx).sequences]
    expected = {"R": 2 / 7, "S": 1 / 7, "X": 4 / 7} if shares is None else {m: shares.get(m, 0) for m in "RSX"}
    counts = {m: drawn.count(m) for m in "RSX"}
    assert all(counts[m] == 0 for m in "RSX" if expected[m] == 0)
    used = [m for m in "RSX" if expected[m] > 0]
    if len(used) > 1:
        assert chisquare([counts[m] for m in used], [1400 * expected[m] for m in used]).pvalue > 1e-3
        # what was drawn does not depend on the row's place in the batch
        halves = [[drawn[:700].count(m) for m in used], [drawn[700:].count(m) for m in used]]
        assert chi2_contingency(halves).pvalue > 1e-3


def test_a_prepared_row():
    family = tiny_llama()
    method = MixtureOfDenoisers(length=20)
    ctx = Context(family)
    method.attach(family, ctx)
    modes = {m: family.processor.convert_tokens_to_ids(f"[{m}]") for m in "RSX"}
    sentinels = [i for t, i in family.processor.get_vocab().items() if t.startswith("<extra_id_")]
    assert family.network.generation_config.suppress_tokens == sorted(modes.values())
    batch = batch_of([text(40, seed=i, row=i) for i in range(30)])
    new = method.prepare(batch, ctx)
    assert new.touched and not batch.touched
    for before, after in zip(batch.sequences, new.sequences):
        start = int(np.argmax(after.mask))
        assert after.mask[start:].all() and after.ids[0] == modes[after.data["mode"]] and after.ids[-1] == 2
        window = expanded(after.ids[1:start], after.ids[start:-1], sentinels)
        assert len(window) == 20 and any((before.ids[i : i + 20] == window).all() for i in range(21))
    short = batch_of([sequence([19, 2], prompt=0)])
    assert method.prepare(short, ctx).sequences[0] is short.sequences[0]
    bare = MixtureOfDenoisers(length=20, mode_tokens=False)
    assert not set(modes.values()) & {int(i) for s in bare.prepare(batch, ctx).sequences for i in s.ids}


def test_the_loss_is_the_targets_likelihood_and_references_know_the_tokens():
    family = tiny_llama()
    ctx = Context(family, models={"stage": tiny_llama})
    method = MixtureOfDenoisers(length=16)
    method.attach(family, ctx)
    new = method.prepare(batch_of([text(16, seed=i, row=i) for i in range(4)]), ctx)
    expected = -torch.cat([logps_of(family, s) for s in new.sequences]).mean()
    torch.testing.assert_close(method.loss(family, new, ctx).mean(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(ctx.model("stage").network.get_input_embeddings().weight, family.network.get_input_embeddings().weight)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_two_way_prefix_is_what_transformers_computes_with_that_mask(attention):
    family = tiny_llama()
    family.network.set_attn_implementation(attention)
    rows = [text(9, 1), text(6, 2)]
    wanted = []
    for s, prefix in zip(rows, (5, 3)):
        s.prefix, s.mask = prefix, np.arange(len(s)) >= prefix
        n = len(s)
        seen = torch.ones(n, n, dtype=torch.bool).tril()
        seen[:prefix, :prefix] = True
        mask = torch.zeros(1, 1, n, n).masked_fill(~seen, torch.finfo(torch.float32).min)
        logits = family.network(input_ids=torch.from_numpy(s.ids)[None], attention_mask=mask, position_ids=torch.arange(n)[None]).logits[0]
        at = torch.from_numpy(s.supervised)
        wanted.append(torch.log_softmax(logits[at - 1], -1)[torch.arange(len(at)), torch.from_numpy(s.ids)[at]])
    found = family.score(rows).logp
    torch.testing.assert_close(found, torch.cat(wanted), atol=1e-5, rtol=1e-5)
    for s in rows:
        s.prefix = 0
    assert (family.score(rows).logp - found).abs().max() > 1e-3


def test_no_target_is_seen_and_an_empty_prefix_is_the_causal_loss():
    family = tiny_llama()
    ctx = Context(family)
    method = MixtureOfDenoisers(length=16, attention="prefix", shares={"X": 1})
    method.attach(family, ctx)
    batch = method.prepare(batch_of([text(16)]), ctx)
    s = batch.sequences[0]
    start = int(np.argmax(s.mask))
    assert s.prefix == start > 2
    before = family.score(batch).logp.detach()
    s.ids[-2] = 30 if s.ids[-2] != 30 else 31
    after = family.score(batch).logp.detach()
    torch.testing.assert_close(after[: len(after) - 2], before[: len(before) - 2])
    s.prefix = 0
    causal = SFT().loss(family, batch, ctx).mean()
    torch.testing.assert_close(causal, -logps_of(family, s).mean(), atol=1e-5, rtol=1e-5)


def test_a_model_without_masks_of_its_own_refuses_the_prefix():
    family = tiny_llama()
    family.can_share = False
    row = text(6)
    row.prefix = 3
    with pytest.raises(ModelError, match="both directions"):
        family.score([row])


def test_it_composes_with_another_supervised_loss_in_the_loop():
    family = tiny_llama()
    rows = [{"text": "w1 w2 w3 w4 w5 w6"}, {"text": "w5 w6 w7 w8 w9"}]
    ctx = Context(family, models={"stage": family.frozen_copy()})
    outcome = engine(family, [MixtureOfDenoisers(length=16), ASFT()], rows, ctx, steps=3).run()
    assert set(outcome.losses) == {"asft", "loss"} and np.isfinite(outcome.losses["loss"])


@pytest.mark.parametrize("bad", [{"shares": {"Q": 1}}, {"shares": {"R": 0}}, {"shares": {}}, {"attention": "full"}, {"length": 1}, {"sentinel": "x"}, {"mode_token": "m"}])
def test_bad_fields_are_refused(bad):
    with pytest.raises(RecipeError, match=next(iter(bad))):
        MixtureOfDenoisers(**bad)


def test_a_length_beyond_the_positions_is_refused_and_the_default_fits():
    family = tiny_llama(max_position_embeddings=40)
    with pytest.raises(RecipeError, match="set length to"):
        MixtureOfDenoisers(length=64).attach(family)
    limit = MixtureOfDenoisers().limit(family)
    assert 10 < limit < 40 and limit + 2 * max(1, round(limit / 2 / 3)) + 4 <= 41
