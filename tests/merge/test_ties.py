import itertools

import numpy as np
import pytest
import torch

from luthier.errors import RecipeError
from luthier.merge.ties import Ties, ties


def oracle(base, tuned, density, scope, elect="mass", weights=None, combine="mean", scale=1.0, ranks=None):
    """Entry by entry, with plain numbers."""
    names = sorted(n for n in base if n != "steps")
    weights = weights or [1.0] * len(tuned)
    trimmed = []
    for t in tuned:
        vector = {n: (t[n].double() - base[n].double()).numpy().ravel().copy() for n in names}
        groups = [names] if scope == "all" else [[n] for n in names]
        for group in groups:
            flat = np.concatenate([vector[n] for n in group])
            keep = set(ranks(flat)[: max(scope == "tensor", int(density * len(flat)))])
            at = 0
            for n in group:
                for i in range(len(vector[n])):
                    if at + i not in keep:
                        vector[n][i] = 0.0
                at += len(vector[n])
        trimmed.append(vector)
    balance = {}
    for n in names:
        for i in range(len(trimmed[0][n])):
            values = [w * v[n][i] for w, v in zip(weights, trimmed)]
            balance[n, i] = np.sign(sum(np.sign(v) if elect == "count" else v for v in values))
    majority = -1.0 if sum(balance.values()) < 0 else 1.0
    out = {"steps": base["steps"]}
    for n in names:
        merged = np.zeros(len(trimmed[0][n]))
        for i in range(len(merged)):
            sign = balance[n, i] or majority
            agree = [(w, w * v[n][i]) for w, v in zip(weights, trimmed) if np.sign(w * v[n][i]) == sign]
            if agree:
                total = sum(v for _, v in agree)
                merged[i] = {"mean": total / sum(w for w, _ in agree), "sum": total, "max": sign * max(abs(v) for _, v in agree)}[combine]
        out[n] = base[n].double() + scale * torch.from_numpy(merged.reshape(base[n].shape))
    return out


@pytest.mark.parametrize("scope", ["all", "tensor"])
@pytest.mark.parametrize(("elect", "combine", "weights"), [("mass", "mean", None), ("count", "mean", [0.5, 1.0, 2.0]), ("mass", "sum", [1.0, 3.0, 1.0]), ("mass", "max", None)])
def test_trim_elect_merge_entry_by_entry(state, same, ranks, scope, elect, combine, weights):
    base, tuned = state(0), [state(i) for i in (1, 2, 3)]
    found = dict(ties(base, tuned, 0.37, 0.8, scope, elect, combine, weights))
    same(found, oracle(base, tuned, 0.37, scope, elect, weights, combine, 0.8, ranks))


def test_exactly_the_stated_number_of_entries_survives(state):
    base, tuned = state(0), state(1)
    merged = ties(base, tuned, density=0.2)
    names = [n for n in base if n != "steps"]
    total = sum(base[n].numel() for n in names)
    assert sum(int((merged[n] != base[n]).sum()) for n in names) == int(0.2 * total)
    by_tensor = ties(base, tuned, density=0.2, scope="tensor")
    assert all(int((by_tensor[n] != base[n]).sum()) == max(1, int(0.2 * base[n].numel())) for n in names)  # as mergekit, a small tensor keeps an entry


def test_full_density_with_one_sign_is_the_mean_and_one_model_is_itself(state, same):
    base = state(0)
    tuned = [{n: b + state(i)[n].abs() if n != "steps" else b for n, b in base.items()} for i in (1, 2)]
    same(dict(ties(base, tuned, density=1.0)), {n: (tuned[0][n].double() + tuned[1][n].double()) / 2 if n != "steps" else base[n] for n in base})
    assert all(torch.equal(ties(base, state(1), density=1.0)[n], state(1)[n]) for n in base if n != "steps")


def test_entries_that_balance_take_the_majority_sign():
    base = {"a": torch.zeros(4)}
    tuned = [{"a": torch.tensor([1.0, -1.0, -2.0, 0.0])}, {"a": torch.tensor([-1.0, -1.0, -2.0, 0.0])}]
    assert ties(base, tuned, 1.0)["a"].tolist() == [-1.0, -1.0, -2.0, 0.0]
    assert ties(base, [{"a": -t["a"]} for t in tuned], 1.0)["a"].tolist() == [1.0, 1.0, 2.0, 0.0]


def test_count_and_mass_differ():
    base = {"a": torch.zeros(1)}
    tuned = [{"a": torch.tensor([v])} for v in (5.0, -1.0, -2.0)]
    assert ties(base, tuned, 1.0, elect="mass")["a"].item() == 5.0
    assert ties(base, tuned, 1.0, elect="count")["a"].item() == -1.5


def test_the_order_of_models_does_not_matter(state, same):
    base, tuned = state(0), [state(i) for i in (1, 2, 3)]
    results = [dict(ties(base, list(p), 0.3)) for p in itertools.permutations(tuned)]
    for other in results[1:]:
        same(other, results[0], rtol=1e-6, atol=1e-7)


def test_lazy(lazily):
    lazily(lambda base, tuned: Ties(scope="tensor").merge(base, tuned))
    lazily(lambda base, tuned: Ties().merge(base, tuned), whole=True)


def test_bad_density():
    with pytest.raises(RecipeError, match="`density` of ties is 20"):
        Ties(density=20)
