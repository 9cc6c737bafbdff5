import itertools
import math

import pytest
import torch

from luthier.core.context import Context
from luthier.errors import DataError, RecipeError
from luthier.objective._shared import preference
from luthier.synthesize.self_play import SelfPlay, self_play
from tests.helpers import tiny_llama

ROWS = [{"prompt": f"w{i} w{i + 1}", "completion": f"w{i + 2}"} for i in range(4)]


def test_given_answers_are_chosen_and_equal_ones_left_out():
    pairs = self_play(ROWS, ["w2", "w9", "", "w7 w8"])
    assert pairs == [
        {"prompt": "w1 w2", "chosen": "w3", "rejected": "w9"},
        {"prompt": "w3 w4", "chosen": "w5", "rejected": "w7 w8"},
    ]


def test_pairs_of_the_last_rounds_are_kept_and_the_opponent_is_the_rounds():
    opponent = tiny_llama(seed=5)
    ctx = Context(tiny_llama(seed=1), models={"round": opponent})
    method = SelfPlay(max_new_tokens=4, keep_rounds=2)
    sizes = []
    for round_number in range(3):
        ctx.round = round_number
        sizes.append((len(method.synthesize(ROWS, ctx)), len(ctx.store["self-play/rounds"])))
    fresh = [len(r) for r in ctx.store["self-play/rounds"]]
    assert sizes[2] == (sum(fresh), 2)


def test_at_the_opponent_itself_the_loss_is_log_two_and_its_gradient_half_beta():
    chosen, rejected = torch.randn(5, requires_grad=True), torch.randn(5, requires_grad=True)
    loss = preference(torch.stack([chosen, rejected], 1), torch.stack([chosen, rejected], 1).detach(), link="sigmoid", beta=0.3)
    value = loss if isinstance(loss, torch.Tensor) else loss[0]
    assert torch.allclose(value, torch.full_like(value, math.log(2)))
    value.sum().backward()
    assert torch.allclose(chosen.grad, torch.full((5,), -0.15)) and torch.allclose(rejected.grad, torch.full((5,), 0.15))


def test_the_exact_update_contracts_towards_the_data():
    """With the inner game solved exactly, log(p_data / p_t) is multiplied by 1 - 1/beta up to a constant: p_{t+1} ~ p_t (p_data / p_t)^(1/beta)."""
    torch.manual_seed(0)
    data, p = torch.distributions.Dirichlet(torch.ones(32)).sample((2,))
    gaps = []
    for _ in range(4):
        gaps.append(float((data * (data / p).log()).sum()))
        p = p * (data / p) ** (1 / 2.0)
        p = p / p.sum()
    assert all(b < 0.5 * a for a, b in itertools.pairwise(gaps))
    one = p * (data / p)
    assert torch.allclose(one / one.sum(), data, atol=1e-6)


def test_bad_input():
    with pytest.raises(RecipeError, match="samples from a model"):
        SelfPlay().synthesize(ROWS)
    with pytest.raises(RecipeError, match="temperature"):
        SelfPlay(temperature=-1)
    with pytest.raises(DataError, match="no pair"):
        SelfPlay(max_new_tokens=2, drop_unfinished=True, temperature=0).synthesize([{"prompt": "w1", "completion": "w2"}], Context(tiny_llama()))
