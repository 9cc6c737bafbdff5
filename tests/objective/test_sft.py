"""SFT against torch's cross-entropy and transformers' own loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from luthier.errors import RecipeError
from luthier.objective.sft import SFT, sft
from tests.helpers import tiny_llama
from tests.objective.lm_batches import batch_of, gradients, logits_of, logps_of, random_batch, sequence


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_per_token_value_is_torchs_cross_entropy(smoothing):
    logits, target = torch.randn(7, 11), torch.randint(11, (7,))
    expected = F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(sft(logits, target, smoothing), expected)


def test_z_loss_adds_the_squared_normaliser():
    logits, target = torch.randn(5, 9), torch.randint(9, (5,))
    torch.testing.assert_close(sft(logits, target, z_loss=0.3) - sft(logits, target), 0.3 * torch.logsumexp(logits, -1) ** 2)


def test_equals_transformers_loss_and_gradient_on_one_row():
    family = tiny_llama()
    batch = random_batch(rows=1)
    s = batch.sequences[0]
    labels = torch.from_numpy(s.ids).clone()
    labels[~torch.from_numpy(s.mask)] = -100
    expected = family.network(input_ids=torch.from_numpy(s.ids)[None], labels=labels[None]).loss
    mine = SFT().loss(family, batch).mean()
    torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)
    for a, b in zip(gradients(family, mine), gradients(family, expected)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_tokens_weigh_the_same_and_micro_batches_do_not_matter():
    family = tiny_llama()
    batch = random_batch(rows=4)
    expected = -torch.cat([logps_of(family, s) for s in batch.sequences]).mean()
    torch.testing.assert_close(SFT().loss(family, batch).mean(), expected, atol=1e-5, rtol=1e-5)
    parts = [SFT().loss(family, p).value(batch.counts()) for p in batch.split(12)]
    assert len(parts) > 1
    torch.testing.assert_close(sum(parts), expected, atol=1e-5, rtol=1e-5)


def test_average_sequence_weighs_rows_the_same():
    family = tiny_llama()
    batch = random_batch(rows=3, weights=[1.0, 0.0, 2.0])
    means = torch.stack([-logps_of(family, s).mean() for s in batch.sequences])
    expected = (means * torch.tensor([1.0, 0.0, 2.0])).sum() / 3
    loss = SFT(average="sequence").loss(family, batch)
    torch.testing.assert_close(loss.mean(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss.value(batch.counts()), expected, atol=1e-5, rtol=1e-5)


def test_smoothed_class_uses_the_full_vocabulary():
    family = tiny_llama()
    batch = random_batch(rows=2)
    logits = torch.cat([logits_of(family, s) for s in batch.sequences])
    target = torch.cat([torch.from_numpy(s.ids[s.supervised]) for s in batch.sequences])
    expected = F.cross_entropy(logits, target, label_smoothing=0.2)
    torch.testing.assert_close(SFT(label_smoothing=0.2).loss(family, batch).mean(), expected, atol=1e-5, rtol=1e-5)


def test_nothing_supervised_is_zero():
    family = tiny_llama()
    empty = batch_of([sequence([5, 6, 7], prompt=3)])
    for method in (SFT(), SFT(label_smoothing=0.1), SFT(average="sequence")):
        assert float(method.loss(family, empty).mean().detach()) == 0.0


@pytest.mark.parametrize("bad", [{"label_smoothing": 1.0}, {"z_loss": -1.0}, {"average": "row"}])
def test_bad_fields_are_refused(bad):
    with pytest.raises(RecipeError, match=next(iter(bad))):
        SFT(**bad)
