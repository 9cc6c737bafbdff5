import numpy as np
import pytest
import torch
from scipy.fft import dct

from luthier.core.batch import Batch
from luthier.core.context import Context
from luthier.errors import RecipeError
from luthier.select.uds import UDS, Sketch, _transform, nuclear_norm, uds


def test_utility_is_the_sum_of_singular_values_and_rotations_do_not_matter():
    z = torch.randn(7, 30)
    wanted = torch.linalg.svdvals(z.double()).sum().float()
    assert torch.allclose(nuclear_norm(z), wanted, rtol=1e-5)
    assert torch.allclose(nuclear_norm(z.T), wanted, rtol=1e-5)
    turn = lambda n: torch.linalg.qr(torch.randn(n, n))[0]  # noqa: E731
    assert torch.allclose(nuclear_norm(turn(7) @ z @ turn(30)), wanted, rtol=1e-4)


@pytest.mark.parametrize("kind", ["dct", "gaussian"])
def test_sketches_keep_the_norm_on_average(kind):
    z = torch.randn(12, 40)
    ratios = [float(Sketch(40, 16, 4, 10, kind, seed=s)(z).square().sum() / z.square().sum()) for s in range(200)]
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.1)


def test_the_fft_sketch_is_the_releases_projection():
    positions, vocabulary, g = 16, 40, torch.Generator().manual_seed(3)
    signs = [torch.randint(0, 2, (n,), generator=g) * 2.0 - 1 for n in (positions, vocabulary)]
    kept = [torch.randint(0, n, (k,), generator=g) for n, k in ((positions, 4), (vocabulary, 10))]
    z = torch.randn(9, vocabulary)
    x = torch.zeros(positions, vocabulary)
    x[:9] = z
    x = torch.fft.fft(x * signs[1], dim=-1).real[:, kept[1]] * (vocabulary / 10) ** 0.5
    x = torch.fft.fft(x * signs[0][:, None], dim=0).real[kept[0]] * (positions / 4) ** 0.5
    sketch = Sketch(vocabulary, positions, 4, 10, "fft", signs=signs, kept=kept)
    assert torch.allclose(sketch(z), x.flatten(), atol=1e-3)


@pytest.mark.parametrize("n", [7, 16])
def test_the_cosine_transform_is_scipys(n):
    x = torch.randn(3, n)
    assert np.allclose(_transform(x, "dct"), dct(x.numpy(), norm="ortho"), atol=1e-5)


def test_sketches_are_linear_and_distances_survive():
    sketch = Sketch(40, 16, 16, 40, "dct")
    a, b = torch.randn(16, 40), torch.randn(16, 40)
    assert torch.allclose(sketch(a + 2 * b), sketch(a) + 2 * sketch(b), atol=1e-4)
    assert torch.allclose(torch.dist(sketch(a), sketch(b)), torch.dist(a, b), rtol=1e-4)


def test_diversity_is_the_mean_distance_to_the_memory():
    logits = [torch.randn(5, 20) for _ in range(3)]
    sketch = Sketch(20, 8, 4, 10)
    memory = torch.randn(6, 40)
    scores, sketches = uds(logits, memory, sketch, alpha=0.5)
    wanted = [float(nuclear_norm(z)) + 0.5 * np.mean([np.linalg.norm(s - m) for m in memory.numpy()]) for z, s in zip(logits, sketches.numpy())]
    assert np.allclose(scores.numpy(), wanted, rtol=1e-4)


def batch(n):
    return Batch([{} for _ in range(n)], np.arange(n))


def test_equal_rows_score_alike_and_alpha_zero_ignores_the_memory():
    z = torch.randn(4, 16)
    sketch = Sketch(16, 8, 2, 8)
    scores, _ = uds([z, z.clone()], torch.randn(3, 16), sketch, alpha=0.1)
    assert scores[0] == scores[1]
    logits = [torch.randn(4, 16) for _ in range(6)]
    a, _ = uds(logits, torch.randn(3, 16), sketch, alpha=0.0)
    b, _ = uds(logits, None, sketch, alpha=0.0)
    assert torch.equal(a, b)


def test_the_best_share_is_kept_and_remembered_in_order():
    ctx = Context(seed=0)
    method = UDS(candidates=2, memory=5, positions=8, sketch_columns=8, sketch_rows=2, alpha=0)
    logits = [s * torch.randn(4, 16) for s in (1, 9, 2, 8, 3, 7)]
    weights = method.pick(batch(6), {"logits": logits}, ctx)
    assert weights.tolist() == [0, 1, 0, 1, 0, 1]
    method.pick(batch(6), {"logits": logits}, ctx)
    queue = ctx.queue("uds", 5)
    assert len(queue) == 5 and queue.ids.tolist() == [3, 5, 1, 3, 5]
    assert torch.equal(queue["sketch"][1], method._sketch(logits[5]))


def test_groups_are_compared_among_themselves_and_the_memory_grows_between_them():
    method = UDS(candidates=3, group=3, positions=8, sketch_columns=8, sketch_rows=2, alpha=1e6)
    z = torch.randn(4, 16)
    # in the second group the row that equals the one just kept is the least diverse
    logits = [9 * z, 0.1 * z, 0.2 * z, 9 * z, -z, 0.0 * z]
    weights = method.pick(batch(6), {"logits": logits})
    assert weights.tolist()[:3] == [1, 0, 0] and weights.tolist()[3:] == [0, 1, 0]


def test_rows_are_taken_as_they_come_before_the_start():
    ctx = Context(seed=0)
    method = UDS(candidates=2, start=5)
    assert method.pick(batch(4), {}, ctx).tolist() == [1, 1, 0, 0] and not ctx.store


def test_keeping_all_keeps_all():
    assert UDS(candidates=1).pick(batch(3), {"logits": [torch.randn(2, 8) for _ in range(3)]}).tolist() == [1, 1, 1]


def test_bad_settings():
    with pytest.raises(RecipeError, match="candidates"):
        UDS(candidates=0.5)
