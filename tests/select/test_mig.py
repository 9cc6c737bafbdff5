import itertools

import numpy as np
import pytest
from scipy import sparse

from luthier.core.context import Context
from luthier.core.rows import Rows
from luthier.errors import DataError, RecipeError
from luthier.select.mig import MIG, mig, propagation_matrix
from tests.helpers import tiny_llama


def dense(tags, quality, budget, graph=None, power=0.8, smoothing=1e-6, exact=False):
    """The release's greedy, one matrix-vector product a pick."""
    x = np.asarray(tags, float) * np.asarray(quality)[:, None]
    x = x if graph is None else x @ graph
    total, used, picks, values = np.zeros(x.shape[1]), np.zeros(len(x), bool), [], []
    phi = lambda z: (z + smoothing) ** power  # noqa: E731
    for _ in range(budget):
        gain = (phi(total + x) - phi(total)).sum(1) if exact else x @ (power * (total + smoothing) ** (power - 1))
        gain = np.where(used, -np.inf, gain)
        picks.append(int(np.flatnonzero(gain >= gain.max() - 1e-9 * abs(gain.max()))[0]))
        used[picks[-1]] = True
        total += x[picks[-1]]
        values.append(phi(total).sum())
    return np.array(picks), total, values


def pool(n=300, tags=25, seed=0):
    rng = np.random.default_rng(seed)
    matrix = np.zeros((n, tags))
    for i in range(n):
        matrix[i, rng.choice(tags, rng.integers(1, 4), replace=False)] = 1
    return matrix, rng.uniform(0.1, 1, n), rng.normal(size=(tags, 4))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("connected", [False, True])
def test_picks_are_those_of_the_dense_greedy(exact, connected):
    matrix, quality, vectors = pool()
    graph = propagation_matrix(vectors, 0.7, 0.6).toarray() if connected else None
    wanted, total, values = dense(matrix, quality, 60, graph, exact=exact)
    got, facts = mig(matrix, quality, 60, vectors if connected else None, threshold=0.7, propagation=0.6, gain="exact" if exact else "gradient", with_info=True)
    assert np.array_equal(got, wanted)
    assert np.allclose(facts["information"], total)
    assert all(b >= a for a, b in itertools.pairwise(values))


def test_lists_matrices_and_sparse_matrices_mean_the_same():
    matrix, quality, _ = pool()
    lists = [np.flatnonzero(row).tolist()[::-1] for row in matrix]
    want = mig(matrix, quality, 50)
    assert np.array_equal(mig(lists, quality, 50), want)
    assert np.array_equal(mig(sparse.csr_matrix(matrix), quality, 50), want)
    assert np.array_equal(mig([[f"tag{t:02}" for t in row] for row in lists], quality, 50), want)


def test_ties_go_to_the_lowest_index_whatever_the_order_of_a_sum():
    rng = np.random.default_rng(1)
    matrix = np.zeros((400, 60))
    for i in range(400):
        matrix[i, rng.choice(60, rng.integers(1, 9), replace=False)] = 1
    wanted, _, _ = dense(matrix, np.ones(400), 80)
    assert np.array_equal(mig(matrix, np.ones(400), 80), wanted)


@pytest.mark.parametrize("rate", [0.5, 400.0])
def test_the_exponential_phi_and_its_saturation(rate):
    matrix, quality, _ = pool(n=120, tags=6)
    x, used, total, wanted = matrix * quality[:, None], np.zeros(120, bool), np.zeros(6), []
    for _ in range(100):
        gain = np.where(used, -np.inf, x @ (rate * np.exp(-rate * total)))
        wanted.append(int(gain.argmax()))
        used[wanted[-1]] = True
        total += x[wanted[-1]]
    assert (rate < 1) == bool(gain.max() > 0)  # the high rate runs out of gains: the rest comes by index
    assert mig(matrix, quality, 100, phi="exp", rate=rate).tolist() == wanted


def test_normalised_rows_share_their_quality_among_their_tags():
    matrix, quality, _ = pool()
    wanted, _, _ = dense(matrix, quality / matrix.sum(1), 50)
    assert np.array_equal(mig(matrix, quality, 50, normalise=True), wanted)


def test_columns_of_the_graph_are_normalised():
    vectors = np.array([[1.0, 0.0], [0.95, 0.3], [0.0, 1.0]])
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    w = np.where(unit @ unit.T >= 0.9, 0.5 * (unit @ unit.T), 0)
    np.fill_diagonal(w, 1)
    assert np.allclose(propagation_matrix(vectors, 0.9, 0.5).toarray(), w / w.sum(0, keepdims=True))


def test_equal_quality_and_one_tag_each_is_round_robin():
    tags = [[t] for t in (0,) * 20 + (1,) * 10 + (2,) * 3]
    for budget in (3, 7, 9, 15):
        counts = np.bincount([tags[i][0] for i in mig(tags, np.ones(33), budget)], minlength=3)
        supplied = np.minimum([20, 10, 3], counts.max())
        assert (supplied - counts).max() <= 1


def test_a_linear_phi_is_top_k_by_mass():
    matrix, quality, _ = pool()
    mass = matrix.sum(1) * quality
    assert set(mig(matrix, quality, 40, power=1.0)) == set(np.argsort(-mass, kind="stable")[:40])


def test_rows_without_tags_come_last_and_are_counted():
    rows = [{"tags": ["a"], "q": 1.0}, {"tags": [], "q": 5.0}, {"tags": "b", "q": 0.5}, {"tags": None, "q": 1.0}]
    picks = MIG(tags="tags", quality="q").select(rows, 2)
    assert picks.indices.tolist() == [0, 2] and picks.why["without_tags"] == 2
    assert len(MIG(tags="tags").select(rows, 4).indices) == 4


def test_without_tags_clusters_of_embeddings_stand_in():
    rows = Rows.of([{"prompt": f"w{i % 5}", "completion": "w9"} for i in range(20)])
    picks = MIG(clusters=5).select(rows, 5, Context(tiny_llama()))
    assert len({rows[int(i)]["prompt"] for i in picks.indices}) >= 4


def test_an_embedder_makes_near_tags_share():
    vector = {"sum": [1.0, 0.0], "total": [0.99, 0.1], "poem": [0.0, 1.0]}
    rows = [{"tags": [t], "text": t} for t in ("sum", "total", "poem")]
    ctx = Context(None, helpers={"words": lambda texts: [vector[t] for t in texts]})
    picks = MIG(tags="tags", embedder="words").select(rows, 2, ctx)
    assert picks.indices.tolist() == [0, 2] and picks.why["edges"] == 1
    assert MIG(tags="tags").select(rows, 2, ctx).indices.tolist() == [0, 1]


def test_quality_may_be_the_models_own_certainty():
    rows = Rows.of([{"prompt": "w1", "completion": f"w{i}", "tags": ["a"]} for i in range(8)])
    ctx = Context(tiny_llama())
    picks = MIG(tags="tags", quality="loss").select(rows, 3, ctx)
    assert picks.indices.tolist() == np.argsort(ctx.signal("loss", rows), kind="stable")[:3].tolist()


def test_bad_input():
    with pytest.raises(RecipeError, match="power"):
        MIG(power=1.5)
    with pytest.raises(RecipeError, match="Did you mean 'tags'"):
        MIG(tags="tgas").select([{"tags": ["a"]}], 1)
    with pytest.raises(DataError, match="quality -1"):
        mig([["a"]], [-1.0], 1)
    with pytest.raises(DataError, match="2 rows of tags and 1 qualities"):
        mig([["a"], ["b"]], [1.0], 1)
