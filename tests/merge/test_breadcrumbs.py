import itertools

import numpy as np
import pytest
import torch

from luthier.errors import RecipeError
from luthier.merge.breadcrumbs import Breadcrumbs, breadcrumbs
from luthier.merge.task_arithmetic import task_arithmetic


def kept(values, keep, remove, order, ranks):
    """One unit's entries after both cuts, made one after the other on the values themselves."""

    def remove_top(x):
        for i in ranks(x)[: int(len(values) * remove)]:
            x[i] = 0.0

    def keep_top(x):
        for i in ranks(x)[int(len(values) * keep) :]:
            x[i] = 0.0

    x = np.array(values, dtype=np.float64)
    for cut in (remove_top, keep_top) if order == "remove-first" else (keep_top, remove_top):
        cut(x)
    return x


def oracle(base, tuned, keep, remove, scale, granularity, order, ranks):
    names = [n for n in base if n != "steps"]
    total = {n: np.zeros(base[n].shape) for n in names}
    for t in tuned:
        d = {n: (t[n].double() - base[n].double()).numpy() for n in names}
        for group in [["layers.0", "layers.1"], ["embed.weight"], ["norm.weight"], ["scale"]] if granularity == "layer" else [[n] for n in names]:
            for unit in group:
                members = sorted(n for n in names if n.startswith(unit)) if granularity == "layer" else [unit]
                if base[members[0]].ndim == 0:
                    total[members[0]] += d[members[0]]
                elif granularity == "row":
                    rows = d[unit].reshape(-1, d[unit].shape[-1])
                    total[unit] += np.stack([kept(r, keep, remove, order, ranks) for r in rows]).reshape(d[unit].shape)
                else:
                    flat = kept(np.concatenate([d[n].ravel() for n in members]), keep, remove, order, ranks)
                    for n in members:
                        total[n] += flat[: d[n].size].reshape(d[n].shape)
                        flat = flat[d[n].size :]
    return {n: base[n].double() + scale * torch.from_numpy(total[n]) for n in names} | {"steps": base["steps"]}


@pytest.mark.parametrize("granularity", ["tensor", "row", "layer"])
@pytest.mark.parametrize("order", ["remove-first", "keep-first"])
@pytest.mark.parametrize(("keep", "remove"), [(0.5, 0.25), (0.2, 0.1), (0.1, 0.4), (0.9, 0.3)])
def test_both_cuts_made_one_after_the_other(state, same, ranks, granularity, order, keep, remove):
    base, tuned = state(0), [state(1), state(2)]
    found = dict(breadcrumbs(base, tuned, keep, remove, 0.4, granularity, order))
    same(found, oracle(base, tuned, keep, remove, 0.4, granularity, order, ranks))


def test_keeping_all_is_task_arithmetic(state, same):
    base, tuned = state(0), [state(1), state(2)]
    for granularity in ("tensor", "row", "layer"):
        same(dict(breadcrumbs(base, tuned, 1.0, 0.0, 0.3, granularity)), dict(task_arithmetic(base, tuned, 0.3)), rtol=1e-6, atol=1e-6)


def test_counts_of_what_is_left(state, ranks):
    base, tuned = state(0), state(1)
    merged = breadcrumbs(base, tuned, 0.5, 0.2)
    for name in set(base) - {"steps", "scale"}:
        n = base[name].numel()
        changed = (merged[name] != base[name]).flatten().nonzero()[:, 0].tolist()
        assert len(changed) == int(0.5 * n)
        assert not set(changed) & set(ranks((tuned[name] - base[name]).numpy())[: int(0.2 * n)])


def test_rows_too_short_for_a_share_vanish():
    base = {"bias": torch.zeros(8)}
    merged = breadcrumbs(base, {"bias": torch.arange(1.0, 9.0)}, keep=0.1, remove=0.0, granularity="row")
    assert not merged["bias"].any()


@pytest.mark.parametrize(("density", "gamma"), [(0.5, 0.01), (0.3, 0.2), (0.7, 0.1), (0.4, 0.0)])
def test_the_band_of_whole_tensors_is_mergekits(density, gamma):
    """Ascending order, positions n_bot .. n - n_top, where n_bot = n - int(density n) - int(gamma n)."""
    values = torch.randn(17, 13, generator=torch.Generator().manual_seed(0))
    merged = breadcrumbs({"w": torch.zeros(17, 13)}, {"w": values}, keep=density, remove=gamma, scale=1.0)
    n = values.numel()
    ascending = np.argsort(values.abs().flatten().numpy(), kind="stable")
    n_top = int(gamma * n)
    band = set(ascending[n - int(density * n) - n_top : n - n_top].tolist())
    assert set(merged["w"].flatten().nonzero()[:, 0].tolist()) == band


def test_the_order_of_tasks_does_not_matter(state, same):
    base, tuned = state(0), [state(i) for i in (1, 2, 3)]
    results = [dict(breadcrumbs(base, list(p))) for p in itertools.permutations(tuned)]
    for other in results[1:]:
        same(other, results[0], rtol=1e-6, atol=1e-7)


def test_lazy(lazily):
    lazily(lambda base, tuned: Breadcrumbs().merge(base, tuned))
    lazily(lambda base, tuned: Breadcrumbs(granularity="layer").merge(base, tuned), whole=True)


def test_a_layer_reads_its_block_only(state, counting):
    base, tuned = counting(state(0)), counting(state(1))
    Breadcrumbs(granularity="layer").merge(base, [tuned])["layers.1.attn.bias"]
    assert set(tuned.read) == {n for n in base if n.startswith("layers.1.")}


@pytest.mark.parametrize("field", ["keep", "remove"])
def test_bad_shares(field):
    with pytest.raises(RecipeError, match=f"`{field}` of breadcrumbs is 85"):
        Breadcrumbs(**{field: 85})
