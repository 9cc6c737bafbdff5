import pytest
import torch

from luthier.core.context import Context
from luthier.core.rows import Rows
from luthier.errors import RecipeError
from luthier.measure.retrieval import Retrieval, collection, ranking, retrieval
from tests.helpers import tiny_bert


def test_figures_of_a_ranking_by_hand():
    found = retrieval([4, 7, 2, 9], {7: 1.0, 9: 1.0, 5: 1.0}, k=3)
    best = 1 + 1 / torch.log2(torch.tensor(3.0)) + 0.5
    assert found["recall"] == pytest.approx(1 / 3) and found["mrr"] == 0.5
    assert found["ndcg"] == pytest.approx(float(1 / torch.log2(torch.tensor(3.0)) / best))
    assert retrieval([1], {1: 1.0})["ndcg"] == 1 and retrieval([1], {}) == {"recall": 0.0, "ndcg": 0.0, "mrr": 0.0}


def test_figures_agree_with_scikit_learn_and_sentence_transformers():
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
    from sklearn.metrics import ndcg_score

    g = torch.Generator().manual_seed(0)
    questions, documents = torch.randn(20, 6, generator=g), torch.randn(50, 6, generator=g)
    relevant = [{int(i): 1.0 for i in torch.randperm(50, generator=g)[: 1 + n % 3]} for n in range(20)]
    ranked = ranking(questions, documents, 50).tolist()
    scores = (torch.nn.functional.normalize(questions, dim=1) @ torch.nn.functional.normalize(documents, dim=1).T).numpy()
    for row, order, own in zip(scores, ranked, relevant):
        truth = [[own.get(d, 0.0) for d in range(50)]]
        assert retrieval(order, own)["ndcg"] == pytest.approx(ndcg_score(truth, [row], k=10), abs=1e-6)
    judge = InformationRetrievalEvaluator(
        {str(i): "" for i in range(20)}, {str(i): "" for i in range(50)}, {str(i): {str(d) for d in own} for i, own in enumerate(relevant)}
    )
    listed = [[{"corpus_id": str(d), "score": -i} for i, d in enumerate(order)] for order in ranked]
    theirs = judge.compute_metrics(listed)
    assert sum(retrieval(o, r)["mrr"] for o, r in zip(ranked, relevant)) / 20 == pytest.approx(theirs["mrr@k"][10], abs=1e-6)
    assert sum(retrieval(o, r)["ndcg"] for o, r in zip(ranked, relevant)) / 20 == pytest.approx(theirs["ndcg@k"][10], abs=1e-6)


def test_equal_texts_are_one_document_and_every_positive_of_a_question_counts():
    rows = [{"anchor": "a", "positive": "x", "negatives": ["y", "z"]}, {"anchor": "a", "positive": "y"}, {"anchor": "b", "positive": "x", "negative": "z"}]
    documents, relevant = collection(rows, "anchor", "positive", [{"text": "w"}, {"text": "x"}])
    assert documents == ["x", "y", "z", "w"] and relevant == {"a": {0: 1.0, 1: 1.0}, "b": {0: 1.0}}


def test_a_question_that_is_its_own_document_is_found_first_and_strangers_are_not():
    model = tiny_bert()
    texts = [f"w{i} w{i + 7} w{2 * i}" for i in range(12)]
    rows = [{"anchor": t, "positive": t} for t in texts]
    out = Retrieval(k=[1, 3]).measure(model, rows, Context(model, 0, {"corpus": Rows.of([{"text": f"w{i} w3"} for i in range(20, 30)])}))
    assert out.numbers["recall@1"] == out.numbers["mrr@10"] == 1.0 and out.numbers["documents"] == 22
    wrong = [{"anchor": a, "positive": b} for a, b in zip(texts, texts[1:] + texts[:1])]
    assert Retrieval(k=[1]).measure(model, wrong).numbers["recall@1"] == 0.0


def test_rows_without_pairs_are_said_and_bad_settings_refused():
    assert "anchor" in Retrieval().measure(tiny_bert(), [{"text": "w1"}]).notes[0]
    with pytest.raises(RecipeError, match="depths"):
        Retrieval(k=[0])
