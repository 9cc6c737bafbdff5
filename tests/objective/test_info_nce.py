import pytest
import torch
import torch.nn.functional as F

from luthier.core.context import Context
from luthier.core.loss import Loss
from luthier.errors import RecipeError
from luthier.objective.info_nce import InfoNCE, info_nce
from tests.helpers import tiny_bert


def test_equals_sentence_transformers_ranking_loss():
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    torch.manual_seed(0)
    a, p, n = (torch.randn(6, 8) for _ in range(3))

    class Fake(torch.nn.Module):
        def forward(self, features):
            return {"sentence_embedding": features["x"]}

    official = losses.MultipleNegativesRankingLoss(Fake(), scale=20.0)
    wanted = official([{"x": a}, {"x": p}, {"x": n}], labels=None)
    unit = [F.normalize(x, dim=-1) for x in (a, p, n)]
    got = info_nce(unit[0], torch.cat(unit[1:]), temperature=0.05).mean()
    assert torch.allclose(got, wanted, atol=1e-6)


def test_excluded_pairs_leave_the_denominator_and_positives_never_do():
    q, k = torch.randn(3, 4), torch.randn(5, 4)
    exclude = torch.zeros(3, 5, dtype=torch.bool)
    exclude[0, [0, 3]] = True  # the positive itself may not be excluded
    got = info_nce(q, k, 1.0, exclude=exclude)
    kept = [0, 1, 2, 4]
    logits = q[0] @ k[kept].T
    assert torch.allclose(got[0], torch.logsumexp(logits, 0) - logits[0], atol=1e-6)


ROWS = [{"anchor": f"w{i} w{i + 1}", "positive": f"w{i + 2} w{i}", "negative": f"w{i + 9}"} for i in range(7)]


@pytest.mark.parametrize("symmetric", [False, True])
def test_cached_gradients_are_exact(symmetric):
    grads = []
    for chunk in (0, 3):
        model = tiny_bert()
        batch = model.collate(ROWS)
        given = InfoNCE(chunk=chunk, symmetric=symmetric).loss(model, batch)
        total = 0.0
        for part in [given] if isinstance(given, Loss) else given:
            value = part.value({"row": float(len(batch))})
            value.backward()
            total += sum(float((t.total if t.report is None else t.report).detach()) for t in part.terms.values()) / len(batch)
        grads.append((total, torch.cat([p.grad.flatten() for p in model.network.parameters() if p.grad is not None])))
    assert grads[0][0] == pytest.approx(grads[1][0], rel=1e-5)
    assert torch.allclose(grads[0][1], grads[1][1], rtol=1e-3, atol=1e-6)


def test_equal_texts_are_no_negatives_of_each_other():
    model = tiny_bert()
    rows = [{"anchor": "w1", "positive": "w5 w6"}, {"anchor": "w2", "positive": "w5 w6"}, {"anchor": "w3", "positive": "w7"}]
    batch = model.collate(rows)
    ctx = Context(model)
    loss = InfoNCE().loss(model, batch, ctx).mean()
    a, p = (F.normalize(model.embed(batch, b), dim=-1) for b in ("anchor", "positive"))
    s = a @ p.T / 0.05
    wanted = [s[0, [0, 2]].logsumexp(0) - s[0, 0], s[1, [1, 2]].logsumexp(0) - s[1, 1], s[2].logsumexp(0) - s[2, 2]]
    assert torch.allclose(loss, torch.stack(wanted).mean(), atol=1e-5)


def test_bad_temperature():
    with pytest.raises(RecipeError, match="temperature > 0"):
        InfoNCE(temperature=0)
