import numpy as np
import pytest
import torch
import torch.nn.functional as F

from luthier.core.context import Context
from luthier.errors import RecipeError
from luthier.objective.classify import Classify, classify
from luthier.objective.core_tuning import CoreTuning, core_tuning, focal_supcon, mine
from tests.helpers import tiny_vit


def features(n=12, d=6, seed=0):
    torch.manual_seed(seed)
    return torch.randn(n, d), torch.arange(n) % 3


def test_without_weights_and_mixing_it_is_the_supervised_contrastive_loss():
    h, y = features()
    z = F.normalize(h, dim=-1)
    sim = (z @ z.T / 0.07).double()
    wanted = []
    for i in range(12):
        others = [k for k in range(12) if k != i]
        denominator = torch.logsumexp(sim[i, others], 0)
        alike = [j for j in others if y[j] == y[i]]
        wanted.append(-sum(sim[i, j] - denominator for j in alike) / len(alike))
    got = focal_supcon(z, y[:, None] == y[None], focal=False)
    assert torch.allclose(got.double(), torch.stack(wanted).mean(), atol=1e-5)


def test_focal_weights_are_one_minus_p_and_rows_norm_is_the_releases():
    h, y = features()
    z = F.normalize(h, dim=-1)
    positive = (y[:, None] == y[None]) & ~torch.eye(12, dtype=torch.bool)
    logits = (z @ z.T / 0.07).masked_fill(torch.eye(12, dtype=torch.bool), -torch.inf)
    logp = logits - logits.logsumexp(1, keepdim=True)
    terms = torch.where(positive, -(1 - logp.exp()) * logp, torch.zeros_like(logp)).sum(1)
    assert torch.allclose(focal_supcon(z, y[:, None] == y[None], norm="rows"), (terms / 12).mean(), atol=1e-5)


def test_the_hardest_partners_are_found_also_among_non_negative_features():
    h, y = features()
    h = h.abs()
    p, q = mine(h, y)
    cosine = F.cosine_similarity(h[:, None], h[None], dim=-1)
    for i in range(12):
        alike = [j for j in range(12) if y[j] == y[i] and j != i]
        other = [j for j in range(12) if y[j] != y[i]]
        assert p[i] == min(alike, key=lambda j: cosine[i, j]) and q[i] == max(other, key=lambda j: cosine[i, j])
    alone_p, alone_q = mine(torch.randn(2, 4), torch.tensor([0, 0])[:2])
    assert alone_q.tolist() == [0, 1] and alone_p.tolist() == [1, 0]


def test_mixed_rows_keep_their_floor_and_their_labels_sum_to_one():
    h, y = features()
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.beta(1, 1, 12)).float() for _ in range(2))
    partner = torch.from_numpy(rng.permutation(12))
    mixed, soft = core_tuning(h, y, 3, a, b, partner)
    assert mixed.shape == (36, 6) and torch.allclose(soft.sum(1), torch.ones(36))
    share = a.clamp(min=0.8)[:, None]
    assert torch.allclose(mixed[12:24], (1 - share) * h + share * h[partner])
    p, _ = mine(h, y)
    certain, _ = core_tuning(h, y, 3, a, torch.ones(12), partner)
    assert torch.equal(certain[24:], h[p])


def rows(n=6):
    rng = np.random.default_rng(0)
    return [{"image": rng.integers(0, 256, (12, 12, 3)).astype(np.uint8), "label": i % 3} for i in range(n)]


def test_without_contrast_and_mixing_it_is_cross_entropy():
    model = tiny_vit()
    batch = model.collate(rows())
    ctx = Context(model)
    got = CoreTuning(eta=0, mixing=False).loss(model, batch, ctx).mean()
    assert torch.allclose(got, F.cross_entropy(model.classify(batch), batch.tensors["labels"]), atol=1e-6)


def test_detaching_the_originals_leaves_them_to_the_heads():
    model = tiny_vit()
    ctx = Context(model)
    method = CoreTuning(mixing=False, detach_original=True)
    method.attach(model, ctx)
    method.loss(model, model.collate(rows()), ctx).mean().backward()
    inside = [n for n, p in model.network.named_parameters() if p.grad is not None]
    assert inside and all("classifier" in n for n in inside)
    assert all(p.grad is not None for p in model.modules["contrast"].parameters())


def test_rows_without_partners_give_no_nan():
    model = tiny_vit()
    ctx = Context(model)
    assert torch.isfinite(CoreTuning().loss(model, model.collate(rows(1)), ctx).mean())


def test_plain_and_focal_classification():
    logits, y = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    assert torch.allclose(classify(logits, y, 0.1), F.cross_entropy(logits, y, reduction="none", label_smoothing=0.1))
    p = logits.softmax(-1)[torch.arange(5), y]
    assert torch.allclose(classify(logits, y, focus=2.0), -((1 - p) ** 2) * p.log(), atol=1e-6)
    with pytest.raises(RecipeError, match="focus"):
        Classify(focus=-1)
    with pytest.raises(RecipeError, match="floor"):
        CoreTuning(floor=1.5)
