"""Merging in blocks of rows: the same bits as in one piece, and no large tensor on the way."""

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from luthier.core import sparse
from luthier.core.source import TensorSource, aligned, applied, delta
from luthier.core.windows import BLOCK, Window, whole, window, windows
from luthier.errors import ModelError
from luthier.merge.breadcrumbs import Breadcrumbs
from luthier.merge.dare import DareLinear, DareTies
from luthier.merge.della import Della, DellaLinear
from luthier.merge.linear import Linear
from luthier.merge.lines import Lines
from luthier.merge.model_stock import ModelStock
from luthier.merge.portllm import PortLLM
from luthier.merge.straggler_sparsify import StragglerSparsify
from luthier.merge.task_arithmetic import TaskArithmetic
from luthier.merge.ties import Ties
from luthier.merge.uniform_soup import UniformSoup

SHAPES = {"embed.weight": (40, 6), "layers.0.mlp.weight": (11, 30), "layers.0.mlp.bias": (11,), "layers.1.mlp.weight": (11, 30), "stack.weight": (3, 4, 50), "scale": ()}
MERGERS = [
    UniformSoup(), Linear(normalise=False, weights=[1.0, 0.5, -0.5]), TaskArithmetic(scale=0.4), Ties(density=0.3), Ties(density=0.3, scope="tensor"),
    Ties(density=0.5, elect="count", combine="max", weights=[1.0, 2.0, 0.5]), Ties(density=0.4, elect="count", combine="sum", scope="tensor"), Breadcrumbs(),
    Breadcrumbs(granularity="layer", keep=0.3), Breadcrumbs(granularity="row", keep=0.4, order="keep-first"), Lines(alpha=0.2, beta=0.7), Lines(alpha=0.2, beta=0.7, after="ties"),
    StragglerSparsify(stragglers=["layers.1", "embed"]), PortLLM(), DareLinear(), DareTies(rescale="density", normalise=True), Della(), DellaLinear(rescale="none"), ModelStock(), ModelStock(filter_wise=True),
]  # fmt: skip


def state(seed, dtype=torch.float32):
    """Coarse numbers, so that many changes are equally large and many signs balance."""
    generator = torch.Generator().manual_seed(seed)
    return {n: (torch.randint(-6, 7, s, generator=generator) / 4).to(dtype) for n, s in SHAPES.items()} | {"steps": torch.arange(40).reshape(20, 2)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("merger", MERGERS, ids=lambda m: f"{m.name}-{list(vars(m).values())}"[:60])
def test_blocks_of_rows_are_the_whole_to_the_bit(merger, dtype):
    base, tuned = state(0, dtype), [state(i, dtype) for i in (1, 2, 3)]
    expected = dict(merger.merge(base, tuned))
    result = TensorSource.of(merger.merge(base, tuned))
    result.by_rows |= bool(merger.by_rows)
    assert result.by_rows
    for name in result:
        parts = list(result.pieces(name, 24))
        assert len(parts) > 1 or expected[name].ndim < 2
        assert torch.equal(torch.cat(parts) if len(parts) > 1 else parts[0], expected[name])


class Largest(TorchDispatchMode):
    """The most entries that any operation made anew."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for made in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in given:
                self.entries = max(self.entries, made.numel())
        return out


@pytest.mark.parametrize("merger", [Ties(), Ties(scope="tensor"), TaskArithmetic(), Linear(), Breadcrumbs(), StragglerSparsify(stragglers=["w"]), DareTies(), Della(), ModelStock(), ModelStock(filter_wise=True)], ids=lambda m: m.name)
def test_no_operation_makes_a_large_tensor(merger, tmp_path, monkeypatch):
    monkeypatch.setattr(sparse, "CHUNK", BLOCK)
    monkeypatch.setattr(sparse, "IN_MEMORY", BLOCK)
    shape = (2 * BLOCK // 1024 + 3, 1024)
    base, tuned = {"w": torch.zeros(shape)}, [{"w": torch.randn(shape)} for _ in range(2)]
    result = TensorSource.of(merger.merge(base, tuned))
    result.by_rows = True
    with Largest() as largest:
        result.save(tmp_path / "made.safetensors")
    assert 0 < largest.entries <= BLOCK
    assert torch.equal(load_file(tmp_path / "made.safetensors")["w"], dict(merger.merge(base, tuned))["w"])


def test_windows_cover_the_rows_once_and_leave_small_tensors_and_vectors_alone():
    assert windows("w", (10, 4), 12) == [Window("w", 0, 3), Window("w", 3, 6), Window("w", 6, 9), Window("w", 9, 10)]
    assert windows("w", (10, 4), 3)[1] == Window("w", 1, 2)
    assert windows("w", (10, 4), 40) == [] and windows("w", (BLOCK + 1,)) == [] and windows("w", ()) == []


def test_a_window_is_on_one_tensor_and_closes():
    source = TensorSource.of({"a": torch.arange(6).reshape(3, 2), "b": torch.ones(3, 2)})
    with window("a", 1, 2):
        assert source["a"].tolist() == [[2, 3]] and source["b"].shape == (3, 2)
        with whole():
            assert source["a"].shape == (3, 2)
    assert source["a"].shape == (3, 2)


def test_tied_tensors_are_read_in_blocks_under_their_other_name():
    weight = torch.randn(8, 5)
    base = TensorSource.of({"embed": weight, "head": weight})
    update = delta(base, TensorSource.of({"head": weight + 1}))
    made = applied(base, update)
    assert torch.equal(torch.cat(list(made.pieces("embed", 10))), made["embed"]) and torch.equal(made["embed"], weight + 1)
    with window("embed", 2, 4):
        assert aligned(base, TensorSource.of({"head": weight}))["embed"].shape == (2, 5)


def test_a_merger_that_promises_rows_wrongly_is_found_out():
    base = TensorSource.of({"w": torch.randn(6, 4)})
    wrong = TensorSource(base, lambda name: base[name].sum(0), base.meta)
    wrong.by_rows = True
    with pytest.raises(ModelError, match="by_rows"):
        list(wrong.pieces("w", 8))


def test_of_equal_scores_a_block_passes_those_that_the_whole_passes():
    scores = TensorSource.of({"w": torch.tensor([[1.0, 2.0], [2.0, 0.5], [2.0, 2.0], [3.0, 2.0]])})
    chosen = sparse.cut(scores, 4)
    expected = chosen.mask("w", scores["w"])
    assert expected.flatten().nonzero().flatten().tolist() == [1, 2, 4, 6]
    for start, stop in ((0, 1), (1, 3), (3, 4)):
        with window("w", start, stop):
            assert torch.equal(chosen.mask("w", scores["w"]), expected[start:stop])
